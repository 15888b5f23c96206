"""Stage II in windows of time: every frame is covered, and no border can be told, whole or frame by frame."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from draws import normal
from torch import Tensor
from torch.nn import functional

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.config import NANO_STRENGTH, SOLVERS, STAGE2_LATENT_SCALE, TEMPORAL_FACTOR
from flashvideo.degradation import degrade_latent
from flashvideo.nano import NANO_SEED, build_part, nano_state
from flashvideo.refiner.windows import (
    LEAD,
    MANY,
    Wavefront,
    WindowPlan,
    flow_evaluations,
    frame_noise,
    plan_windows,
    windowed_velocity,
)
from flashvideo.samplers import Velocity, guided_velocity, sample_stage2, solve_flow
from flashvideo.schedule import stage2_times
from flashvideo.training.scenes.rendering import render
from flashvideo.training.scenes.stream import random_scene
from flashvideo.training.scenes.vocabulary import Scene
from flashvideo.vae import DECODE_CHUNK

TIMES = stage2_times(4)
STRENGTH = NANO_STRENGTH


def mixing(latent: Tensor, time: Tensor) -> Tensor:
    """A velocity that, like attention, makes each frame depend on all the others of its window, and on its place."""
    weights = normal(latent.shape[1], latent.shape[1]) / latent.shape[1] ** 0.5
    mixed = torch.einsum("dc,bcthw->bdthw", weights, latent)
    place = torch.arange(latent.shape[2]).view(-1, 1, 1) / 50
    return torch.tanh(mixed + mixed.mean(2, keepdim=True) + place) - latent * time


def through_wavefront(front: Wavefront, latent: Tensor) -> Tensor:
    """All frames of a latent, fed one by one."""
    finished = []
    while front.finished < latent.shape[2]:
        if front.ready:
            moved = front.step()
            finished += [] if moved is None else [moved]
        else:
            front.feed(latent[:, :, front.fed : front.fed + 1])
    return torch.cat(finished, dim=2)


@pytest.mark.parametrize("frames", [13, 14, 21, 29, 13 + 9 * 7, 13 + 9 * 8, 200])
def test_windows_lie_elsewhere_at_every_evaluation_and_still_cover_every_frame(frames: int) -> None:
    plan = plan_windows(frames)
    plans = [plan.at(time) for time in TIMES[:-1]]
    assert plans[0].starts == plan.starts
    for each in plans:
        assert (each.length, each.starts[0], each.starts[-1]) == (plan.length, 0, frames - plan.length)
        assert all(0 < after - before <= 9 for before, after in zip(each.starts, each.starts[1:], strict=False))
        assert len(each.starts) - len(plan.starts) <= (len(plan.starts) > MANY)
        sums = torch.zeros(frames)
        for start, weights in zip(each.starts, each.weights, strict=True):
            sums[start : start + each.length] += weights
        torch.testing.assert_close(sums, torch.ones(frames))
    if len(plan.starts) > MANY:
        assert [each.starts[1] for each in plans] == [9, 7, 5, 3]
    for off in (-1e-4, 1e-4):  # samplers round times in ways of their own
        assert [plan.at(time + off).starts for time in TIMES[:-1]] == [each.starts for each in plans]


def random_plan(seed: int) -> WindowPlan:
    """Windows over a video of 1 to 200 frames."""
    pick = random.Random(seed)
    window = pick.randrange(1, 82, 4)
    return plan_windows(pick.randint(1, 51), window, pick.randrange(0, window, 4))


@pytest.mark.parametrize("seed", range(40))
def test_windows_cover_every_frame_and_overlap_as_asked(seed: int) -> None:
    pick = random.Random(seed)
    frames, window = pick.randint(1, 300), pick.randrange(1, 82, 4)
    overlap = pick.randrange(0, window, 4)
    plan = plan_windows(frames, window, overlap)

    assert plan.length == min(frames, (window + 3) // 4)
    assert plan.starts[0] == 0
    assert plan.starts[-1] + plan.length == frames
    steps = [after - before for before, after in zip(plan.starts, plan.starts[1:], strict=False)]
    assert all(0 < step <= plan.length - overlap // 4 for step in steps)
    sums = torch.zeros(frames)
    for start, weights in zip(plan.starts, plan.weights, strict=True):
        sums[start : start + plan.length] += weights
    torch.testing.assert_close(sums, torch.ones(frames))
    assert float(plan.weights.min()) > 0


def test_weights_fade_smoothly_over_the_overlap() -> None:
    plan = plan_windows(22, 49, 16)
    assert plan.starts == (0, 9)
    first, second = plan.weights
    shared = first[9:13]
    assert torch.equal(first[:9], torch.ones(9))
    assert (shared.diff() < 0).all()
    torch.testing.assert_close(shared + second[:4], torch.ones(4))
    torch.testing.assert_close(shared, second[:4].flip(0))


@pytest.mark.parametrize(
    ("window", "overlap", "words"),
    [(48, 16, "4n\\+1 .* got 48"), (0, 0, "4n\\+1 .* got 0"), (49, 6, "multiple of 4 .* got 6"), (17, 20, "got 20")],
)
def test_other_windows_are_refused(window: int, overlap: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_windows(100, window, overlap)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(12))
def test_frame_by_frame_gives_what_the_whole_gives(seed: int, solver: str) -> None:
    plan = random_plan(seed)
    latent = normal(1, 4, plan.frames, 2, 3, seed=seed)
    whole = solve_flow(windowed_velocity(mixing, plan), latent, TIMES, solver)
    front = Wavefront(mixing, flow_evaluations(TIMES, solver), plan)
    assert torch.equal(through_wavefront(front, latent), whole)
    assert front.evaluated == front.total


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_window_is_the_plain_sampler(solver: str) -> None:
    latent = normal(1, 4, 13, 2, 3)
    plan = plan_windows(13)
    plain = solve_flow(mixing, latent, TIMES, solver)
    assert torch.equal(solve_flow(windowed_velocity(mixing, plan), latent, TIMES, solver), plain)


def test_a_wavefront_can_be_put_aside_after_any_evaluation() -> None:
    plan = plan_windows(31, 17, 8)
    latent = normal(1, 4, 31, 2, 3)
    evaluations = flow_evaluations(TIMES, "heun")
    whole = solve_flow(windowed_velocity(mixing, plan), latent, TIMES, "heun")
    front, finished = Wavefront(mixing, evaluations, plan), []
    while front.finished < 31:
        if not front.ready:
            front.feed(latent[:, :, front.fed : front.fed + 1])
            continue
        moved = front.step()
        finished += [] if moved is None else [moved]
        state = {name: tensor.clone() for name, tensor in front.state().items()}
        front = Wavefront(mixing, evaluations, plan)
        front.restore(state)
    assert torch.equal(torch.cat(finished, dim=2), whole)


class Threads:
    """Helpers that are threads, of which some lose what they were given. They answer in an order of their own."""

    def __init__(self, count: int, *, losses: int = 0, seed: int = 0) -> None:
        self.count, self.losses, self.pick = count, losses, random.Random(seed)
        self.pool, self.under_way, self.evaluated = ThreadPoolExecutor(max(count, 1)), [], set()

    @property
    def places(self) -> int:
        return 2 * self.count

    @property
    def idle(self) -> bool:
        return len(self.under_way) < self.count

    @property
    def room(self) -> bool:
        return len(self.under_way) < self.places

    def order(self, latent: Tensor, time: Tensor) -> Future:
        order = self.pool.submit(self.work, latent.clone(), time)
        self.under_way.append(order)
        return order

    def work(self, latent: Tensor, time: Tensor) -> Tensor:
        self.evaluated.add(threading.get_ident())
        return mixing(latent, time)

    def finished(self, orders: Sequence[Future], *, wait: bool) -> Future | None:
        done = [order for order in orders if order.done() or (wait and order.exception() is None)]
        return self.pick.choice(done) if done and (wait or self.pick.random() < 0.5) else None

    def velocity(self, order: Future) -> Tensor | None:
        self.under_way.remove(order)
        self.losses -= 1
        return None if self.losses >= 0 else order.result()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(12))
def test_windows_that_others_evaluate_give_the_same_numbers(seed: int, solver: str) -> None:
    plan = random_plan(seed)
    latent = normal(1, 4, plan.frames, 2, 3, seed=seed)
    whole = solve_flow(windowed_velocity(mixing, plan), latent, TIMES, solver)
    helpers = Threads(seed % 4, losses=seed % 3, seed=seed)
    front = Wavefront(mixing, flow_evaluations(TIMES, solver), plan, helpers)
    assert torch.equal(through_wavefront(front, latent), whole)
    assert front.evaluated == front.total
    assert not helpers.under_way
    assert helpers.evaluated or seed % 4 == 0 or len(plan.starts) == 1


def test_a_state_between_windows_that_others_evaluate_resumes_without_them() -> None:
    plan = plan_windows(51, 17, 8)
    latent = normal(1, 4, 51, 2, 3)
    evaluations = flow_evaluations(TIMES, "heun")
    whole = solve_flow(windowed_velocity(mixing, plan), latent, TIMES, "heun")
    front = Wavefront(mixing, evaluations, plan, Threads(3))
    finished = []
    while not front.finished:
        if front.ready:
            moved = front.step()
            finished += [] if moved is None else [moved]
        else:
            front.feed(latent[:, :, front.fed : front.fed + 1])
    alone = Wavefront(mixing, evaluations, plan)
    alone.restore(front.state())
    assert torch.equal(torch.cat([*finished, through_wavefront(alone, latent)], dim=2), whole)


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_what_a_wavefront_holds_does_not_grow_with_the_video(helpers: int) -> None:
    def most(frames: int) -> int:
        front = Wavefront(mixing, flow_evaluations(TIMES), plan_windows(frames), Threads(helpers))
        latent, held = normal(1, 4, frames, 2, 2), 0
        while front.finished < frames:
            if front.ready:
                front.step()
            else:
                front.feed(latent[:, :, front.fed : front.fed + 1])
            held = max(held, sum(tensor.numel() for tensor in front.state().values()))
        return held

    # Windows that move from evaluation to evaluation, the last of them regular: one that is moved back waits for more.
    short, long = most(13 + MANY * 9), most(13 + 30 * 9)
    assert helpers or long == short  # with helpers it depends on who is first
    most_held = 4 * (13 + 4) + 9 * (LEAD * 2 * helpers + 2 if helpers else 0)  # windows, overlaps, the lead
    assert long < most_held * 4 * 2 * 2 + 10  # and the counts
    assert short < most_held * 4 * 2 * 2 + 10


def test_noise_depends_on_seed_and_frame_number_alone() -> None:
    shape = (16, 8, 6)
    frames = torch.stack([frame_noise(shape, 5, index) for index in range(20)])
    assert torch.equal(frames[7], frame_noise(shape, 5, 7))
    assert not torch.equal(frames[7], frame_noise(shape, 6, 7))
    expected = torch.tensor([-0.0599609, -1.0187253, 1.6895623, -0.9398739])  # as in every release
    torch.testing.assert_close(frame_noise((1, 1, 4), 5, 7).flatten(), expected, rtol=0, atol=1e-6)
    flat = frames.flatten(1)
    assert abs(float(flat.mean())) < 4 / flat.numel() ** 0.5
    assert abs(float(flat.std()) - 1) < 4 / (2 * flat.numel()) ** 0.5
    likeness = torch.corrcoef(flat) - torch.eye(20)
    assert float(likeness.abs().max()) < 5 / flat.shape[1] ** 0.5


def wandering(frames: int, seed: int) -> Tensor:
    """A latent [1, 16, frames, 8, 8] that changes slowly and keeps its spread: nine tenths of a frame stay."""
    keep, noise = 0.9, normal(1, 16, frames, 8, 8, seed=seed)
    latent = [noise[:, :, 0]]
    for index in range(1, frames):
        latent.append(keep * latent[-1] + (1 - keep**2) ** 0.5 * noise[:, :, index])
    return torch.stack(latent, dim=2)


def looking_around(latent: Tensor, time: Tensor) -> Tensor:
    """A smooth velocity that depends on the mean of all frames, so that every window has its own opinion."""
    weights = normal(latent.shape[1], latent.shape[1]) / latent.shape[1] ** 0.5
    mixed = torch.einsum("dc,bcthw->bdthw", weights, latent)
    return torch.tanh(mixed + mixed.mean(2, keepdim=True) / 2) - latent * time


@pytest.fixture(scope="module")
def nano() -> Velocity:
    """Nano's velocity."""
    return nano_velocity(nano_state("stage2"))


def nano_velocity(state: dict[str, Tensor], strength: int = 675) -> Velocity:
    """The velocity of a stage II of Nano's size, for an arbitrary text."""
    dit = load_dit(state, dtype=torch.float32)
    context = normal(1, 8, dit.config.text_dim)
    velocity = guided_velocity(dit, context, torch.zeros_like(context), 1.0, strength)
    return torch.no_grad()(velocity)


@pytest.mark.parametrize(("name", "side", "most"), [("looking around", 8, 1.2), ("Nano", 4, 2.0)])
def test_windows_begin_and_end_without_a_step(name: str, side: int, most: float, nano: Velocity) -> None:
    """By how much the difference from the whole changes from frame to frame: with hard cuts it is 2.6 and 5.3."""
    network = nano if name == "Nano" else looking_around
    plan = plan_windows(40)
    steps = torch.zeros(39)
    for seed in range(3):
        latent = wandering(40, seed)[..., :side, :side]
        difference = solve_flow(windowed_velocity(network, plan), latent, TIMES) - solve_flow(network, latent, TIMES)
        steps += difference.diff(dim=2).square().mean((0, 1, 3, 4))
    cuts = [*plan.starts[1:], *(start + plan.length for start in plan.starts[:-1])]
    border = torch.zeros(39, dtype=torch.bool)
    border[[cut - 1 for cut in cuts]] = True
    assert float(steps.min()) > 0  # the windows do have opinions of their own
    assert float((steps[border].mean() / steps[~border].mean()).sqrt()) < most


def beat(quality: Tensor, period: int) -> float:
    """Power of a quality in time at this period, over that of the frequencies next to it."""
    whole_periods = quality[: len(quality) // period * period]
    power = torch.fft.rfft(whole_periods - whole_periods.mean()).abs().square()
    at = len(whole_periods) // period
    neighbours = torch.cat((power[at - 4 : at], power[at + 1 : at + 5])).mean()
    return float(power[at] / neighbours)


# By chance a line of a spectrum is above 5 times the mean of its eight neighbours once in 50, and the mean of two such
# ratios above 3.7.
BEATS, TWO_BEAT = 5, 3.7


def test_fresh_windows_do_not_beat_at_their_period() -> None:
    network = nano_velocity(build_part("stage2", NANO_SEED))
    period, windows = 9, 15  # latent frames from one window's start to the next
    plan = plan_windows(13 + period * windows)
    refined = solve_flow(windowed_velocity(network, plan), wandering(plan.frames, 7), TIMES)
    steady = refined[:, :, period : period * (windows + 1)]
    assert beat(steady.std((0, 1, 3, 4)), period) < BEATS
    assert beat(steady.diff(dim=4).square().mean((0, 1, 3, 4)).sqrt(), period) < BEATS
    assert beat(steady.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt()[: -period + 1], period) < BEATS


@torch.no_grad()
def test_a_refined_clip_beats_neither_with_the_windows_nor_with_the_chunks() -> None:
    """Pieces of two scenes in which nothing moves for a minute, draft to frames with the trained Nano."""
    still = [
        scene
        for scene in (random_scene(seed, "test") for seed in range(200))
        if scene.camera == "static" and [subject.direction for subject in scene.subjects] == ["still"]
    ]
    window, chunk = 36, DECODE_CHUNK * TEMPORAL_FACTOR
    qualities = [quality for scene in still[:2] for quality in _sharpness_and_motion(scene, window)]
    for period in (window, chunk):
        for kind in (qualities[::2], qualities[1::2]):
            beats = [beat(quality, period) for quality in kind]
            assert max(beats) < BEATS
            assert sum(beats) / len(beats) < TWO_BEAT


def _sharpness_and_motion(scene: Scene, window: int) -> tuple[Tensor, Tensor]:
    """Of each refined frame of a scene; `window` frames lie between one window's start and the next."""
    frame = render(scene, 1, 256, 448)[:, :, 104:152, 200:248]
    draft = functional.interpolate(frame.transpose(0, 1), scale_factor=0.25, mode="area")
    blurred = functional.interpolate(draft, scale_factor=4.0, mode="bilinear").transpose(0, 1)
    vae = load_vae(nano_state("vae"), dtype=torch.float32)
    latent = vae.encode(blurred[None].expand(-1, -1, 25, -1, -1)).mode() * STAGE2_LATENT_SCALE
    still = latent[:, :, -1:]  # nothing moves, and the encoder's look back has ended long before
    torch.testing.assert_close(latent[:, :, -4:], still.expand(-1, -1, 4, -1, -1), rtol=0, atol=1e-4)
    latent = torch.cat([latent, still.expand(-1, -1, 13 + 14 * window // 4 + 1 - latent.shape[2], -1, -1)], dim=2)
    noise = torch.stack([frame_noise((16, 6, 6), 1, index) for index in range(latent.shape[2])], dim=1)
    start = degrade_latent(latent, noise[None], STRENGTH)
    plan = plan_windows(latent.shape[2])
    assert (plan.starts[1] - plan.starts[0]) * TEMPORAL_FACTOR == window
    network = nano_velocity(nano_state("stage2"), STRENGTH)
    refined = vae.decode(solve_flow(windowed_velocity(network, plan), start, TIMES) / STAGE2_LATENT_SCALE)[0]
    steady = refined[:, window:]
    return steady.diff(dim=3).square().mean((0, 2, 3)).sqrt(), steady.diff(dim=1).square().mean((0, 2, 3)).sqrt()


def test_guidance_in_two_passes_is_the_samplers_in_one() -> None:
    dit = load_dit(nano_state("stage2"), dtype=torch.float32)
    start, context = normal(1, 16, 3, 4, 6), normal(1, 8, dit.config.text_dim)
    together = sample_stage2(dit, start, context, torch.zeros_like(context))
    with torch.no_grad():
        apart = solve_flow(guided_velocity(dit, context, torch.zeros_like(context), 13.0, 675), start, TIMES)
    # Batches of two and of one take sums in another order; guidance multiplies the difference by 13, four times over.
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-3)
