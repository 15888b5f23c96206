"""Ten prompts about combinations that training never saw, and whether drafts of them show what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .captions import parse_prompt
from .judge import judge

# Every (colour, shape, direction) is in HELD_OUT, and every colour stands out from its background.
HELD_OUT_PROMPTS = (
    "a striped red circle moves left over a green hill",
    "a blue ring moves to the right over a yellow desert",
    "a white square moves right on a plain red background",
    "a dotted purple cross moves down over a printed page",
    "a cyan star moves down in a night sky with stars",
    "a checked orange square is moving down in front of a green forest",
    "a yellow circle moves slowly down over a blue sea with waves",
    "a pink square moves up in front of a grey brick wall",
    "a black star moves up over a yellow desert",
    "a purple star is moving up over a green hill",
)


@dataclass(frozen=True)
class Verdict:
    """The judge's result for one video."""

    prompt: str
    wanted: dict[str, str]
    shown: dict[str, bool]  # "colour", "shape" and "direction"

    @property
    def follows(self) -> bool:
        """Whether colour, shape and direction are all as asked."""
        return all(self.shown.values())

    def __str__(self) -> str:
        wrong = [f"not {self.wanted[name]}" for name, shown in self.shown.items() if not shown]
        return f"{'yes' if self.follows else ', '.join(wrong)}: {self.prompt}"


def judge_prompts(prompts: Sequence[str], videos: Sequence[Tensor]) -> list[Verdict]:
    """Judge videos [3, T, H, W] in [-1, 1] of prompts. Raises ValueError for a prompt without the scenes' words."""
    verdicts = []
    for prompt, video in zip(prompts, videos, strict=True):
        wanted = parse_prompt(prompt)
        if wanted is None:
            raise ValueError(f"This prompt names no colour, shape and direction of the procedural scenes: {prompt!r}.")
        verdicts.append(Verdict(prompt, wanted, judge(video, wanted)))
    return verdicts
