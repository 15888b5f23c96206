"""Frames in, frames out: exact counts and sizes, nothing moved, nothing lost on the way through the phases."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.color import Detail, match_colors
from flashvideo.config import COLOR_MATCHES, NANO_DETAIL_GAIN, NANO_DETAIL_SIZE, STAGE2_LATENT_SCALE
from flashvideo.degradation import auto_strength, degrade_latent
from flashvideo.errors import CommandError
from flashvideo.frames import PictureSize, TargetSize, finish, prepare, to_frames, to_video
from flashvideo.nano import nano_state
from flashvideo.refiner.run import ENCODE, Networks, RefineRun, RefineSettings, TensorClip, refine_frames
from flashvideo.refiner.windows import frame_noise, plan_windows, windowed_velocity
from flashvideo.refiner.work_folder import MemoryWork, WorkFolder
from flashvideo.samplers import guided_velocity, solve_flow
from flashvideo.schedule import stage2_times
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.vae import decode_chunks, encode_chunks
from flashvideo.vae.stream import TiledVAEStream, latent_of, stream_within

KEEP = TargetSize("keep")


@pytest.fixture(scope="module")
def nano() -> Networks:
    """FlashVideo-Nano."""
    dit = load_dit(nano_state("stage2"), dtype=torch.float32)
    return Networks(dit, load_vae(nano_state("vae"), dtype=torch.float32), torch.zeros(1, 8, dit.config.text_dim))


def picture_waves(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Frames [T, H, W, 3] in [0, 1]: soft shapes that move."""
    noise = torch.randn(1, 3, count // 4 + 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    waves = torch.nn.functional.interpolate(noise, (count, height, width), mode="trilinear")
    return torch.sigmoid(2 * waves[0]).permute(1, 2, 3, 0).contiguous()


def whole(networks: Networks, frames: Tensor, settings: RefineSettings) -> Tensor:
    """What the phases do, written down at once, with everything in memory."""
    prepared = prepare(frames, settings.size, settings.resample)
    with torch.no_grad():
        latent = networks.vae.encode(to_video(prepared.frames)).mode().half().float() * STAGE2_LATENT_SCALE
        noise = [frame_noise(tuple(latent[0, :, 0].shape), settings.seed, index) for index in range(latent.shape[2])]
        start = degrade_latent(latent, torch.stack(noise, dim=1)[None], settings.strength)
        plan = plan_windows(latent.shape[2], settings.window, settings.overlap)
        velocity = guided_velocity(
            networks.dit, networks.context, torch.zeros_like(networks.context), settings.cfg, settings.strength
        )
        times = stage2_times(settings.steps, settings.shift)
        refined = solve_flow(windowed_velocity(velocity, plan), start, times, settings.solver)
        video = networks.vae.decode(refined.half().float() / STAGE2_LATENT_SCALE)
    return finish(to_frames(video), prepared.reference, settings.color_match)


@pytest.mark.parametrize("seed", range(24))
def test_any_clip_comes_out_with_its_frames_and_the_wanted_size(seed: int, tiny_networks: Networks) -> None:
    pick = random.Random(seed)
    count, height, width = pick.choice([1, 2, 5, 17, pick.randint(1, 60)]), pick.randint(16, 50), pick.randint(16, 50)
    frames = picture_waves(count, height, width, seed)
    if pick.random() < 0.3:
        frames = (frames * 255).byte()
    untouched = frames.clone()
    size = TargetSize("exact", width=pick.randint(16, 70), height=pick.randint(16, 70))
    settings = RefineSettings(size, color_match=pick.choice(COLOR_MATCHES), window=17, overlap=8, steps=2, seed=seed)
    refined = refine_frames(tiny_networks, frames, settings)

    assert refined.shape == (count, size.height, size.width, 3)
    assert float(refined.min()) >= 0
    assert float(refined.max()) <= 1
    assert torch.equal(frames, untouched)


@pytest.mark.parametrize("color_match", COLOR_MATCHES)
@pytest.mark.parametrize(("count", "solver"), [(1, "euler"), (43, "euler"), (30, "heun")])
def test_piece_by_piece_gives_what_all_at_once_gives(
    count: int, solver: str, color_match: str, tiny_networks: Networks
) -> None:
    settings = RefineSettings(
        TargetSize("scale", scale=1.5), window=17, overlap=8, solver=solver, color_match=color_match
    )
    frames = picture_waves(count, 19, 27)
    refined = refine_frames(tiny_networks, frames, settings)
    torch.testing.assert_close(refined, whole(tiny_networks, frames, settings), rtol=0, atol=1e-5)


def test_nano_gives_the_same_for_the_same_seed_and_another_for_another(nano: Networks) -> None:
    frames = picture_waves(9, 16, 32)
    first, again, other = (
        refine_frames(nano, frames, RefineSettings(KEEP, cfg=1, steps=2, window=17, overlap=8, seed=seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert float((first - other).abs().mean()) > 1e-3


def test_the_refiner_for_real_footage_gives_the_detail_that_its_source_supports() -> None:
    dit = load_dit(nano_state("footage_stage2"), dtype=torch.float32)
    vae = load_vae(nano_state("footage_vae"), dtype=torch.float32)
    networks = Networks(dit, vae, torch.zeros(1, 8, dit.config.text_dim))
    frames = picture_waves(5, 12, 16)
    settings = RefineSettings(TargetSize("scale", scale=4.0), cfg=1, strength=60, window=17, overlap=8, steps=1)
    refined, result = (
        refine_frames(networks, frames, replace(settings, color_match=name)) for name in ("none", "wavelet")
    )
    expected = match_colors(
        refined, prepare(frames, settings.size).reference, "wavelet", Detail(NANO_DETAIL_SIZE, NANO_DETAIL_GAIN)
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert (result - match_colors(refined, expected, "wavelet", Detail(9))).abs().max() > 1e-3


def test_with_a_refiner_that_does_nothing_the_chain_is_the_vaes_round_trip(nano: Networks) -> None:
    """No shift in space or time, and no other change, in whatever size and length."""
    nothing = load_dit(nano_state("stage2"), dtype=torch.float32)
    torch.nn.init.zeros_(nothing.proj_out.weight)
    torch.nn.init.zeros_(nothing.proj_out.bias)
    networks = Networks(nothing, nano.vae, nano.context)
    frames = picture_waves(11, 24, 34)
    settings = RefineSettings(KEEP, strength=0, window=17, overlap=8, color_match="none")
    refined = refine_frames(networks, frames, settings)

    prepared = prepare(frames, KEEP)
    with torch.no_grad():
        latent = nano.vae.encode(to_video(prepared.frames)).mode()
        round_trip = to_frames(nano.vae.decode(latent))[:11, :24, :34]
    # Strength 0 still adds noise of 0.03 standard deviations.
    assert float((refined - round_trip).abs().mean()) < 0.02
    assert shift_between(refined, round_trip) == (0, 0, 0)


@torch.no_grad()
def test_the_vae_moves_nothing_in_space_or_time(nano: Networks) -> None:
    for index in range(3):
        clip = SceneStream("test", 64, 112, 17, 13).sample(index)[0][None]
        back = nano.vae.decode(nano.vae.encode(clip).mode()).clamp(-1, 1)
        assert shift_between(to_frames(back), to_frames(clip)) == (0, 0, 0)


def shift_between(frames: Tensor, others: Tensor) -> tuple[int, ...]:
    """By how many half steps frames [T, H, W, 3] are moved in time, down and right: where their phases agree best."""
    luma, other = (torch.fft.fftn(clip.mean(3) - clip.mean()) for clip in (frames, others))
    cross = luma * other.conj()
    phases = torch.fft.fftshift(cross / cross.abs().clamp_min(1e-9))
    shape = [2 * side for side in phases.shape]  # zeros around the spectrum: the peak is found to half a step
    padded = torch.zeros(shape, dtype=phases.dtype)
    padded[tuple(slice(side - side // 2, side - side // 2 + side) for side in phases.shape)] = phases
    peak = torch.fft.ifftn(torch.fft.ifftshift(padded)).real.argmax()
    return tuple(
        (int(at) + side // 2) % side - side // 2
        for at, side in zip(torch.unravel_index(peak, shape), shape, strict=True)
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_would_be_seen(axis: int) -> None:
    frames = picture_waves(11, 24, 34)
    halves = [0, 0, 0]
    halves[axis] = 2
    assert shift_between(frames.roll(1, axis), frames) == tuple(halves)


@pytest.mark.parametrize("budget", [None, 2e5])
def test_encoder_and_decoder_can_be_put_aside_after_any_chunk(budget: float | None, tiny_networks: Networks) -> None:
    video = to_video(picture_waves(37, 48, 64))
    vae = tiny_networks.vae
    with torch.no_grad():
        latent = vae.encode(video).mode()
        for network, sizes, source, piece_of, expected in (
            (vae.encoder, encode_chunks(37), video, latent_of, latent),
            (vae.decoder, decode_chunks(10), latent, lambda piece: piece, vae.decode(latent)),
        ):
            pieces, state = [], {}
            for done, chunk in enumerate(source.split(sizes, dim=2)):
                stream = stream_within(network, sizes, (6, 8), budget, tiny_networks.device)
                assert isinstance(stream, TiledVAEStream) == (budget is not None)
                stream.restore(done, state)
                pieces.append(piece_of(stream(chunk)))
                state = {name: tensor.clone() for name, tensor in stream.state().items()}
            # In tiles, norms sum up in another order.
            torch.testing.assert_close(torch.cat(pieces, dim=2), expected, rtol=0, atol=2e-4 if budget else 0)


def test_a_memory_budget_for_the_vae_changes_nothing_but_rounding(tiny_networks: Networks) -> None:
    frames = picture_waves(26, 48, 64)
    settings = RefineSettings(KEEP, window=17, overlap=8, cfg=1)
    little, size = replace(tiny_networks, vae_memory=2e5), PictureSize(48, 64)
    assert RefineRun(little, TensorClip(frames), size, settings, MemoryWork(ENCODE)).main_bytes() > 0  # in tiles
    assert RefineRun(tiny_networks, TensorClip(frames), size, settings, MemoryWork(ENCODE)).main_bytes() == 0
    refined = refine_frames(little, frames, settings)
    # Latents rest in half precision, where rounding may turn either way.
    torch.testing.assert_close(refined, refine_frames(tiny_networks, frames, settings), rtol=0, atol=1e-2)


def test_a_state_that_does_not_fit_the_disk_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvideo.refiner.work_folder.SAVE_SHARE", 0)  # however soon it comes
    work = WorkFolder(tmp_path / "work", {}, ENCODE)
    assert work.save(ENCODE, 1, lambda: {"state": torch.zeros(1000)})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("flashvideo.refiner.work_folder.shutil.disk_usage", lambda path: usage)
    assert not work.save(ENCODE, 2, lambda: {"state": torch.ones(1000)})
    monkeypatch.undo()
    work.close()
    progress = WorkFolder(tmp_path / "work", {}, ENCODE).progress()
    assert (progress.phase, progress.done) == (ENCODE, 1)
    assert torch.equal(progress.tensors["state"], torch.zeros(1000))


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks available"), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_told_and_used(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flashvideo.atomic_files.FileLock.acquire", lambda _: (_ for _ in ()).throw(error))
    with closing(WorkFolder(tmp_path / "work", {}, ENCODE)) as work:
        assert work.save(ENCODE, 1, dict, always=True)
        work.remove()
    assert "can't be locked" in caplog.text
    assert not (tmp_path / "work").exists()


def test_a_lock_that_fails_for_another_reason_is_no_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(errno.EACCES, "not yours")
    monkeypatch.setattr("flashvideo.atomic_files.FileLock.acquire", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(CommandError, match="can't be used for unfinished work: Permission denied"):
        WorkFolder(tmp_path / "work", {}, ENCODE)


class Interrupted(Exception):
    """Ends a run in a test."""


@pytest.mark.parametrize("color_match", ["wavelet", "adain"])
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_result(
    color_match: str, tiny_networks: Networks, tmp_path: Path
) -> None:
    settings = RefineSettings(KEEP, window=17, overlap=8, color_match=color_match)
    clip, size = TensorClip(picture_waves(50, 16, 16)), PictureSize(16, 16)
    uninterrupted: dict[int, Tensor] = {}
    RefineRun(tiny_networks, clip, size, settings, MemoryWork(ENCODE), segment_chunks=4).run(collecting(uninterrupted))

    parts: dict[int, Tensor] = {}
    for stops in range(100):
        steps = iter(range(5))

        def stop(*_at: object, steps: Iterator[int] = steps) -> None:
            if next(steps, None) is None:
                raise Interrupted

        with closing(WorkFolder(tmp_path / "work", {}, ENCODE)) as work:
            run = RefineRun(tiny_networks, clip, size, settings, work, stop, 4)
            try:
                run.run(collecting(parts))
            except Interrupted:
                continue
        assert stops > 5
        break
    assert torch.equal(joined(parts), joined(uninterrupted))


def collecting(parts: dict[int, Tensor]) -> Callable[[int, Iterator[Tensor]], None]:
    """A receiver of segments that keeps them."""
    return lambda number, chunks: parts.update({number: torch.cat(list(chunks))})


def joined(parts: dict[int, Tensor]) -> Tensor:
    """All segments in their order."""
    return torch.cat([parts[number] for number in sorted(parts)])


@pytest.mark.parametrize(
    ("strength", "by_area", "by_area_and_time", "small_by_area", "small_by_area_and_time"),
    [(650, 266, 153, 113, 53), (675, 298, 177, 134, 64), (750, 412, 276, 220, 119), (900, 711, 609, 556, 425)],
)
def test_auto_strength_keeps_the_signal_to_noise_ratio_of_a_share_of_the_picture(
    strength: int, by_area: int, by_area_and_time: int, small_by_area: int, small_by_area_and_time: int
) -> None:
    """Worked out apart from the code, from the zero-SNR table: 448x256 and 128x128, 17 frames."""
    assert auto_strength(256, 448, strength=strength) == by_area
    assert auto_strength(448, 256, 5, strength=strength) == by_area_and_time
    assert auto_strength(128, 128, strength=strength) == small_by_area
    assert auto_strength(128, 128, 5, strength=strength) == small_by_area_and_time
    assert auto_strength(1072, 1920, 13, strength=strength) == auto_strength(1072, 1920, strength=strength) == strength


@pytest.mark.parametrize("arguments", [(0, 16), (16, 16, 0)])
def test_auto_strength_needs_a_picture(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1 pixel and 1 frame"):
        auto_strength(*arguments)


def test_auto_refines_as_the_number_that_it_stands_for(tiny_networks: Networks) -> None:
    frames, size = picture_waves(5, 40, 64), TargetSize("scale", scale=2)
    settings = RefineSettings(size, steps=1, strength=None)
    chosen = auto_strength(80, 128)  # padded: 80 is a multiple of 16
    assert settings.strength_for(settings.size.resolve(40, 64), tiny_networks.dit.config) == chosen
    automatic = refine_frames(tiny_networks, frames, settings)
    assert torch.equal(automatic, refine_frames(tiny_networks, frames, replace(settings, strength=chosen)))
    assert not torch.equal(automatic, refine_frames(tiny_networks, frames, replace(settings, strength=675)))
