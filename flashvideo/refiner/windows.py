"""Stage II over a long video: temporal windows that are blended at every evaluation of the network.

The network sees one window of frames at a time, with the window's own positions and frame count. Where windows overlap,
their velocities are averaged, with weights that fade towards a window's ends, and only then the latent is advanced
(MultiDiffusion, arXiv 2302.08113, over time). The windows' borders move from evaluation to evaluation, so that
differences at the borders don't add up. All windows work on one latent, and no borders are visible.

Two implementations give the same numbers. `windowed_velocity` makes one velocity of a whole latent, for any solver.
`Wavefront` takes the frames in order and returns the finished ones in order: a frame advances as soon as no later
window covers it, so that the last evaluation's windows follow the first one's at a short distance. It holds a few
windows, however long the video is, and its state can be saved and restored between any two evaluations.

A window's velocity depends on nothing but its frames and the time, so that others may evaluate windows meanwhile
(`Helpers`). What overlaps is added in the order of the windows whoever is done first, and the numbers stay the same.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import OVERLAP_FRAMES, SOLVERS, STAGE2_SHIFT, TEMPORAL_FACTOR, WINDOW, is_video_length, latent_frames
from ..samplers import Velocity
from ..schedule import shift_times

PLACES = 8  # offsets of the windows at different times of the flow, within one step from window to window
LEAD = 2  # windows begun before the next one is blended, for each that helpers take at a time
MANY = 8  # windows; with so many, one more costs little


class Piece(NamedTuple):
    """A part of a latent [B, C, T, H, W] that one evaluation of the network sees."""

    at: tuple[slice, slice, slice, slice, slice]
    weight: Tensor  # broadcast over the part; the weights of all pieces sum to one everywhere


def blend(pieces: Iterable[Piece], evaluate: Callable[[Piece], Tensor], latent: Tensor) -> Tensor:
    """The weighted sum of `evaluate(piece)` over all pieces of `latent`, in its shape."""
    total = None
    for piece in pieces:
        part = evaluate(piece) * piece.weight.to(latent)
        if total is None:
            total = part.new_zeros(latent.shape)
        total[piece.at] += part
    return total


State = tuple[Tensor, ...]  # a solver's state for some frames: the latent first, [B, C, T, H, W] each


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie on `frames` latent frames.

    `starts` ascend; every window has `length` frames. weights[i, p] is the weight of window i's frame p. The weights of
    the windows that cover a frame sum to one. Overlapping windows share `shared` frames or more.
    """

    frames: int
    length: int
    shared: int
    starts: tuple[int, ...]
    weights: Tensor

    def at(self, time: Tensor | float) -> WindowPlan:
        """The windows of an evaluation at a time of the flow, 0 to 1; at 0 these windows.

        For evaluations that are evenly spread on the flow's usual grid the windows' borders are evenly spread too. Few
        windows move only as far as no additional window is needed.
        """
        even = float(shift_times(torch.as_tensor(time, dtype=torch.float32).cpu(), 1 / STAGE2_SHIFT))
        step, count = self.length - self.shared, len(self.starts)
        room = step if count > MANY else (count - 1) * step - self.starts[-1] + 1
        return _plan(self.frames, self.length, self.shared, round(PLACES * even) % PLACES * room // PLACES)

    def pieces(self) -> list[Piece]:
        """The windows."""
        rows = zip(self.starts, self.weights.view(-1, self.length, 1, 1), strict=True)
        every = slice(None)
        return [Piece((every, every, slice(start, start + self.length), every, every), row) for start, row in rows]

    @property
    def settled(self) -> tuple[int, ...]:
        """Number of frames that are finished after each window: those that no later window covers."""
        return (*self.starts[1:], self.frames)


def plan_windows(frames: int, window: int = WINDOW, overlap: int = OVERLAP_FRAMES) -> WindowPlan:
    """Windows of `window` frames (4n + 1), each overlapping the one before by `overlap` (a multiple of 4) or more.

    `frames` counts latent frames, the other two video frames. The last window is moved back to be whole; a video
    shorter than a window is one window. Raises ValueError for invalid numbers.
    """
    if frames < 1:
        raise ValueError(f"a video has at least one frame; got {frames} latent frames.")
    if not is_video_length(window):
        raise ValueError(f"a window must have 4n+1 frames (1, 5, 9, ... 49, ...); got {window}.")
    if overlap % TEMPORAL_FACTOR or not 0 <= overlap < window:
        raise ValueError(f"windows overlap by a multiple of 4 frames, from 0 to less than {window}; got {overlap}.")
    length = min(frames, latent_frames(window))
    return _plan(frames, length, min(overlap // TEMPORAL_FACTOR, length - 1), 0)


def _plan(frames: int, length: int, shared: int, earlier: int) -> WindowPlan:
    """Windows that share `shared` frames with the next, all but the first and last `earlier` frames earlier."""
    step, last = length - shared, frames - length
    starts = tuple(sorted({0, *range(step - earlier, last, step), last}))
    return WindowPlan(frames, length, shared, starts, _weights(frames, length, starts, shared))


def _weights(frames: int, length: int, starts: tuple[int, ...], overlap: int) -> Tensor:
    """[windows, length]: a raised cosine over the overlap at both ends, divided by the sum at each frame."""
    from_end = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 1.0
    fade = torch.sin(math.pi / 2 * (from_end / (overlap + 1)).clamp(max=1)).square()
    sums = torch.zeros(frames)
    for start in starts:
        sums[start : start + length] += fade
    return torch.stack([fade / sums[start : start + length] for start in starts])


def windowed_velocity(velocity: Velocity, plan: WindowPlan) -> Velocity:
    """A velocity of the whole latent from a velocity of windows."""
    return lambda latent, time: blend(plan.at(time).pieces(), lambda piece: velocity(latent[piece.at], time), latent)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network: its time, and how its velocity advances a state."""

    time: Tensor
    advance: Callable[[State, Tensor], State]


def flow_evaluations(times: Tensor, solver: str = "euler") -> list[Evaluation]:
    """The evaluations of `solve_flow` over the grid `times` [steps + 1]."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; one of {', '.join(SOLVERS)}")
    evaluations = []
    for step, (t, t_next) in enumerate(pairwise(times)):
        if solver == "heun" and step < len(times) - 2:
            evaluations += [Evaluation(t, _predict(t_next - t)), Evaluation(t_next, _correct(t_next - t))]
        else:
            evaluations.append(Evaluation(t, _straight(t_next - t)))
    return evaluations


def _straight(span: Tensor) -> Callable[[State, Tensor], State]:
    return lambda state, slope: (state[0] + span * slope,)


def _predict(span: Tensor) -> Callable[[State, Tensor], State]:
    return lambda state, slope: (state[0] + span * slope, state[0], slope)


def _correct(span: Tensor) -> Callable[[State, Tensor], State]:
    def advance(state: State, slope: Tensor) -> State:
        _, before, first = state
        return (before + span * ((first + slope) / 2),)

    return advance


class Helpers(Protocol):
    """Others that evaluate windows while this process does. An order stands for a window that one of them has.

    `places`: how many windows all of them take at a time.
    """

    places: int

    @property
    def idle(self) -> bool:
        """Whether one of them has nothing to do."""

    @property
    def room(self) -> bool:
        """Whether one of them takes a window, perhaps to begin with it after another."""

    def order(self, latent: Tensor, time: Tensor) -> Any:
        """Hand over a window [B, C, t, H, W]."""

    def finished(self, orders: Sequence[Any], *, wait: bool) -> Any | None:
        """The first of some orders that is done, or None; with `wait` one that is done within a moment."""

    def velocity(self, order: Any) -> Tensor | None:
        """Of a finished order; None if whoever had it has ended."""


class _Alone:
    """No helpers."""

    places, idle, room = 0, False, False

    def finished(self, orders: Sequence[Any], *, wait: bool) -> None:
        """Nothing is ordered."""


class Wavefront:
    """The frames of a video in all evaluations at once. Frames are fed and finished in order.

    Call `feed` while it is not `ready`, and `step` while it is.
    """

    def __init__(
        self, velocity: Velocity, evaluations: Iterable[Evaluation], plan: WindowPlan, helpers: Helpers | None = None
    ) -> None:
        self._velocity, self._helpers, self._frames = velocity, helpers or _Alone(), plan.frames
        self._passes = [_Pass(evaluation, plan.at(evaluation.time)) for evaluation in evaluations]
        self.fed = 0  # frames
        self.finished = 0  # frames

    @property
    def evaluated(self) -> int:
        """Number of windows evaluated and blended so far, over all evaluations."""
        return sum(each.window for each in self._passes)

    @property
    def total(self) -> int:
        """Number of windows to evaluate in all."""
        return sum(len(each.plan.starts) for each in self._passes)

    @property
    def ready(self) -> bool:
        """Whether there is something to do: a window for this process, and one for helpers that take it."""
        if self._feeds:
            return self._waiting > self._helpers.room
        return self._waiting > 0 or any(each.answers for each in self._passes)

    def feed(self, latent: Tensor) -> None:
        """Add the next frames [B, C, t, H, W] of the degraded latent, in the model's scaled space, float32."""
        self._passes[0].push((latent,))
        self.fed += latent.shape[2]

    def step(self) -> Tensor | None:
        """Evaluate one window, of the latest evaluation that has one; returns the frames that are finished, if any.

        With helpers, hand windows over first; what one of them has evaluated counts as the step, and where there is
        nothing else to do this waits a moment for it.
        """
        self._hand_over()
        place = self._answered(wait=False)
        if place is None:
            mine = self._latest_waiting() if self._goes_on else None
            if mine is not None:
                each = self._passes[mine]
                each.answers.append(self._velocity(each.next_window(), each.evaluation.time))
            place = self._answered(wait=mine is None and not (self._feeds and self._helpers.room))
        return None if place is None else self._advance(place)

    def state(self) -> dict[str, Tensor]:
        """The state as tensors, for `restore`. Windows that helpers have are evaluated again after it."""
        tensors = {"counts": torch.tensor([self.fed, self.finished, *(each.window for each in self._passes)])}
        for place, each in enumerate(self._passes):
            tensors |= {f"{place}.state.{index}": tensor for index, tensor in enumerate(each.held)}
            if each.carried is not None:
                tensors[f"{place}.carried"] = each.carried
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Resume from a `state` with the same plan and evaluations."""
        self.fed, self.finished, *windows = tensors["counts"].tolist()
        for place, each in enumerate(self._passes):
            each.window = windows[place]
            names = (f"{place}.state.{index}" for index in range(len(tensors)))
            each.held = tuple(tensors[name].to(device) for name in names if name in tensors)
            carried = tensors.get(f"{place}.carried")
            each.carried = None if carried is None else carried.to(device)

    @property
    def _goes_on(self) -> bool:
        """Whether more windows may begin: one that is late must not let the others pile up."""
        return sum(len(each.answers) for each in self._passes) <= LEAD * self._helpers.places

    @property
    def _feeds(self) -> bool:
        return self.fed < self._frames and self._goes_on

    @property
    def _waiting(self) -> int:
        return sum(each.waiting for each in self._passes)

    def _latest_waiting(self) -> int | None:
        return max((place for place, each in enumerate(self._passes) if each.waiting), default=None)

    def _hand_over(self) -> None:
        """Give each helper a window, and a second one where enough are left for this process."""
        helpers = self._helpers
        while self._goes_on and helpers.room and (place := self._latest_waiting()) is not None:
            if not helpers.idle and self._waiting == 1:
                return
            each = self._passes[place]
            each.answers.append(_Order(helpers.order(each.next_window(), each.evaluation.time)))

    def _answered(self, *, wait: bool) -> int | None:
        """The latest evaluation whose next window can be blended."""
        firsts = {place: each.answers[0] for place, each in reversed([*enumerate(self._passes)]) if each.answers}
        for place, answer in firsts.items():
            if isinstance(answer, Tensor):
                return place
        orders = [answer.order for answer in firsts.values()]
        found = self._helpers.finished(orders, wait=wait) if orders else None
        return None if found is None else [*firsts][orders.index(found)]

    def _advance(self, place: int) -> Tensor | None:
        """Blend the next window of an evaluation; returns the frames that finish."""
        each = self._passes[place]
        answer = each.answers.popleft()
        if not isinstance(answer, Tensor):
            answer = self._helpers.velocity(answer.order)
        if answer is None:
            answer = self._velocity(each.first_window(), each.evaluation.time)
        moved = each.blend(answer)
        if place + 1 < len(self._passes):
            self._passes[place + 1].push(moved)
            return None
        self.finished += moved[0].shape[2]
        return moved[0]


class _Order(NamedTuple):
    """A window that a helper has."""

    order: Any


class _Pass:
    """One evaluation of the wavefront, and the frames that wait for it."""

    def __init__(self, evaluation: Evaluation, plan: WindowPlan) -> None:
        self.evaluation, self.plan = evaluation, plan
        self.window = 0  # the next one to blend; what is held starts at its first frame
        self.answers: deque[Tensor | _Order] = deque()  # velocities of the windows from there on
        self.held: State = ()
        self.carried: Tensor | None = None  # what earlier windows add to the first of these frames' velocity

    @property
    def waiting(self) -> int:
        """Number of windows whose frames are here, and which nobody evaluates."""
        if not self.held or self.window == len(self.plan.starts):
            return 0
        last = self.plan.starts[self.window] + self.held[0].shape[2] - self.plan.length
        return bisect_right(self.plan.starts, last) - self.window - len(self.answers)

    def push(self, state: State) -> None:
        if self.held:
            state = tuple(torch.cat(pair, dim=2) for pair in zip(self.held, state, strict=True))
        self.held = state

    def next_window(self) -> Tensor:
        """The latent of the first window that waits."""
        return self._latent(self.window + len(self.answers))

    def first_window(self) -> Tensor:
        """The latent of the next window to blend."""
        return self._latent(self.window)

    def _latent(self, number: int) -> Tensor:
        first = self.plan.starts[number] - self.plan.starts[self.window]
        return self.held[0][:, :, first : first + self.plan.length].contiguous()  # as it arrives at a helper

    def blend(self, slope: Tensor) -> State:
        """Add the next window's velocity; returns the frames that advance to the next evaluation."""
        plan, length = self.plan, self.plan.length
        slope = slope * plan.weights[self.window].to(slope).view(-1, 1, 1)
        if self.carried is not None:
            slope[:, :, : self.carried.shape[2]] += self.carried
        done = plan.settled[self.window] - plan.starts[self.window]
        moved = self.evaluation.advance(tuple(part[:, :, :done] for part in self.held), slope[:, :, :done])
        # Copies, so that the memory of the frames that advanced is freed.
        self.carried = slope[:, :, done:].clone() if done < length else None
        self.held = tuple(part[:, :, done:].clone() for part in self.held)
        self.window += 1
        return moved


def frame_noise(shape: tuple[int, ...], seed: int, frame: int) -> Tensor:
    """Standard normal noise for latent frame number `frame` of a video, [C, H, W], on the CPU, float32.

    It depends on seed, number and shape only, so it is the same in every window, and in resumed runs.
    """
    digest = hashlib.blake2b(f"{seed} {frame}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randn(shape, generator=generator)
