"""Named sets of stage II's numbers, between faithful and rich.

- faithful: strength 600 is below the official 650 to 750, and within what the network was trained for (600 to 900,
  later 600 to 750). Of the strengths in docs/ablations.md, table 10, it has the highest PSNR and the smallest colour
  error. cfg 10, the lower end of what is official, is softer.
- balanced: the official numbers, which are the defaults everywhere.
- rich: strength 750, the upper end of what is official. 6 steps, the upper end, too: in table 8 the gradient-energy
  error falls from 59.5 % with 4 to 56.9 % (real clip: 46.6 to 42.2 %), and hardly any further.
- fast: 3 steps have most of what 4 add to 1 in table 8 (gradient-energy error 61.6, 59.5 and 78.0 %; real clip: 49.9,
  46.6 and 70.5 %). With cfg 1 the network is evaluated once a step, 3 times in place of 8; most of the prompt's effect
  is lost.

The shift is the official 2.5 in all: nothing here measures another one to be better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .config import DEGRADATION_STEP, STAGE2_SCALE, STAGE2_SHIFT

BALANCED = "balanced"


@dataclass(frozen=True)
class Preset:
    """Stage II's numbers. `strength` is that of the official size; smaller pictures get its equivalent."""

    strength: int = DEGRADATION_STEP
    steps: int = 4
    cfg: float = STAGE2_SCALE
    shift: float = STAGE2_SHIFT

    @property
    def choices(self) -> dict[str, Any]:
        """Fields of `RefineSettings`."""
        # None is the default's own form: a run with the balanced preset is the same as one without a preset.
        from .degradation import AutoStrength  # brings PyTorch, and a command's help shows presets

        strength = None if self.strength == DEGRADATION_STEP else AutoStrength(self.strength)
        return {"strength": strength, **self.sampling}

    @property
    def sampling(self) -> dict[str, Any]:
        """The numbers beside the strength."""
        return {"steps": self.steps, "cfg": self.cfg, "shift": self.shift}

    def __str__(self) -> str:
        """The numbers beside the strength, as text."""
        return f"steps {self.steps}, cfg {self.cfg:g}, shift {self.shift:g}"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "faithful": Preset(strength=600, cfg=10.0),
        BALANCED: Preset(),
        "rich": Preset(strength=750, steps=6),
        "fast": Preset(steps=3, cfg=1.0),
    }
)
