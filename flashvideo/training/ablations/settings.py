"""Settings of the ablations: which models, clips and training lengths. Read from configs/ablations/*.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...config import STAGE2_SHIFT, TRAIN_STEPS
from ..config import LoopSettings
from ..data.latents import ClipSettings
from ..errors import TrainingError
from ..tasks.preference import ChoiceSettings
from ..tasks.stage2 import DegradationSettings
from .clips import DRAFTS
from .evaluation import AUTO


@dataclass(frozen=True)
class Shipped:
    """The weights that are judged."""

    stage1: Path
    stage2: Path
    vae: Path
    text: str
    tokenizer: str = ""


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: procedural clips of the "test" split, and a real clip where one is given."""

    height: int
    width: int
    frames: int
    clips: int
    draft: str = "coded"  # one of DRAFTS: what the tables and the verdict are about
    other_drafts: tuple[str, ...] = ()  # that the acceptance measures besides
    caption: str = ""  # of the real clip
    when: float = 0.5  # where it is cut from the real video: 0 the beginning, 1 the end

    def __post_init__(self) -> None:
        """Refuse unknown drafts."""
        for draft in (self.draft, *self.other_drafts):
            if draft not in DRAFTS:
                raise TrainingError(f"[held_out] drafts are {', '.join(DRAFTS)}; got {draft!r}.")


@dataclass(frozen=True)
class Refiner:
    """How stage II is run where a table doesn't vary it."""

    steps: int = 4
    cfg: float = 4.0
    shift: float = STAGE2_SHIFT
    strength: int = AUTO


@dataclass(frozen=True)
class Quality:
    """The table of real clips: their size, how they are made drafts, and how stage II is run on them."""

    height: int = 256
    width: int = 256
    frames: int = 17
    draft: str = "area"  # one of DRAFTS
    steps: int = 4
    cfg: float = 1.0
    strength: int = AUTO

    def __post_init__(self) -> None:
        """Refuse an unknown draft, and a strength or steps that can't be."""
        if self.draft not in DRAFTS:
            raise TrainingError(f"[quality] drafts are {', '.join(DRAFTS)}; got {self.draft!r}.")
        if not AUTO <= self.strength < TRAIN_STEPS:
            raise TrainingError(f"[quality] strength must be 0 to {TRAIN_STEPS - 1}, or {AUTO}; got {self.strength}.")
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise TrainingError(f"[quality] steps must be 1 to {TRAIN_STEPS}; got {self.steps}.")


@dataclass(frozen=True)
class Variants:
    """Trainings of stage II from fresh weights, all of them equally long, on the same clips in the same order."""

    batch: int
    clips: ClipSettings
    loop: LoopSettings
    degradation: DegradationSettings = field(default_factory=DegradationSettings)  # where a table doesn't vary it
    cascade_steps: tuple[int, ...] = (4, 16, 30)  # evaluations that the generate-from-noise cascade gets


@dataclass(frozen=True)
class Preference:
    """Fine-tuning of the shipped stage II on its own samples that a scorer chose."""

    batch: int
    clips: ClipSettings
    loop: LoopSettings
    strength: int  # at which samples are made, chosen and judged: one where they differ
    choice: ChoiceSettings = field(default_factory=ChoiceSettings)


@dataclass(frozen=True)
class Generated:
    """Drafts that the shipped stage I makes of held-out prompts, for stage II to refine."""

    prompts: int = 12
    height: int = 64
    width: int = 112
    frames: int = 17
    steps: int = 25
    scale: float = 6.0


@dataclass(frozen=True)
class DraftTuning:
    """Fine-tuning of the shipped stage I for another resolution: adapters against all weights."""

    batch: int
    clips: ClipSettings
    loop: LoopSettings
    lora_learning_rate: float
    lora_rank: int = 16
    prompts: int = 16
    steps: int = 20
    scale: float = 6.0


@dataclass(frozen=True)
class Note:
    """A sentence for the document that isn't measured: why an ordering has its result."""

    table: str
    text: str


@dataclass(frozen=True)
class AblationSettings:
    """A whole config file of the ablations."""

    seed: int
    out: Path
    cache: Path  # folder of latents; may be shared with the training of the miniature
    shipped: Shipped
    held_out: HeldOut
    variants: Variants
    preference: Preference
    draft_tuning: DraftTuning
    refiner: Refiner = field(default_factory=Refiner)
    quality: Quality = field(default_factory=Quality)
    generated: Generated = field(default_factory=Generated)
    long_frames: int = 117  # of clips whose quality in time is measured: a window, and two more
    notes: tuple[Note, ...] = ()
