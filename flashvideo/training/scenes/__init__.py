"""Procedural scenes: endless drawn videos with captions, and a judge of what a video shows.

vocabulary (what there is) -> patterns, backgrounds, rendering (the picture) and captions (the words) -> stream (the
data set) -> judge, prompts (whether a video follows a prompt).
"""

from .captions import caption, parse_prompt
from .prompts import HELD_OUT_PROMPTS, judge_prompts
from .rendering import FRAME_RATE, render
from .stream import SceneStream, random_scene

__all__ = [
    "FRAME_RATE",
    "HELD_OUT_PROMPTS",
    "SceneStream",
    "caption",
    "judge_prompts",
    "parse_prompt",
    "random_scene",
    "render",
]
