"""When frames and packets are shown: clocks that run forward, whatever the file says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

JOIN = Fraction(1, 2)  # seconds: where times step back further, another recording was joined
_REORDERED = 16  # frames: H.264 and HEVC move no picture further
_REGULAR = 0.9  # share of equal steps from which on a video has a constant rate
_GAP = 1.5  # steps: from there on a frame is missing in a video of a constant rate


class Clock:
    """Makes a track's times start with its file and go forward.

    A time that is missing follows from the one before; one that was there already is a tick later; and where another
    recording was joined, whose clock begins anew, it runs on.
    """

    def __init__(self, time_base: Fraction, start: Fraction) -> None:
        self._join = max(1, int(JOIN / time_base))
        self._shift = -int(start / time_base)
        self._next: int | None = None  # when what comes next is due
        self._last = 0

    def __call__(self, time: int | None, duration: int) -> int:
        """The time of a picture or packet that lasts so long, all in ticks."""
        duration = max(1, duration)
        if self._next is None:
            now = 0 if time is None else time + self._shift
        elif time is None:
            now = self._next
        else:
            if time + self._shift < self._last - self._join:
                self._shift = self._next - time
            now = max(time + self._shift, self._last + 1)
        self._last, self._next = now, now + duration
        return now


def in_order(times: Sequence[int | None]) -> list[int | None]:
    """Times of frames in the order in which they are shown, where the file gave them in that of decoding.

    AVI and raw streams know no other order. A step back is one of decoding if the times pass it again within a few
    frames and are all different; else another recording was joined there, and its times stay.
    """
    result, start = list(times), 0
    for index in range(1, len(times) + 1):
        if index == len(times) or _is_join(times, index):
            section = range(start, index)
            known = [place for place in section if result[place] is not None]
            for place, time in zip(known, sorted(result[place] for place in known), strict=True):
                result[place] = time
            start = index
    return result


def _is_join(times: Sequence[int | None], index: int) -> bool:
    before = [time for time in times[max(0, index - _REORDERED) : index] if time is not None]
    after = [time for time in times[index : index + _REORDERED] if time is not None]
    if times[index] is None or not before or times[index] >= max(before):
        return False
    if len({*before, *after}) < len(before) + len(after):
        return True
    far_back = len(before) == _REORDERED and times[index] < min(before)
    goes_on = index + _REORDERED < len(times)  # so that the times before would be passed
    return far_back or (goes_on and max(after) <= max(before))


def missing_frames(times: Sequence[int]) -> list[tuple[int, int]]:
    """Where a video of a constant rate has gaps: (number of the frame after it, how many frames are missing).

    Empty for a video whose rate changes.
    """
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    if not steps:
        return []
    usual, _ = Counter(steps).most_common(1)[0]
    # Matroska's milliseconds round a constant rate to steps that differ by one.
    if sum(abs(step - usual) <= 1 for step in steps) < _REGULAR * len(steps):
        return []
    step = sum(each for each in steps if abs(each - usual) <= 1) / sum(abs(each - usual) <= 1 for each in steps)
    return [(index, round(each / step) - 1) for index, each in enumerate(steps, start=1) if each > _GAP * step]
