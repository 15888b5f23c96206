"""What all tables share: models, held-out clips, trained variants and the evaluator, each made when first needed."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...atomic_files import sha256
from ..data.latents import ClipSettings
from ..errors import TrainingError
from ..loop.trainer import Task
from ..tasks.networks import FrozenText, NetworkSettings
from ..tasks.preference import PreferenceSettings, PreferenceTask
from ..tasks.stage1 import SheetSettings as DraftSheet
from ..tasks.stage1 import Stage1Settings, Stage1Task
from ..tasks.stage2 import DegradationSettings, Phase, SheetSettings, Stage2Settings
from .clips import ClipStore, RealClip, Suite
from .evaluation import AUTO, Evaluator, Method
from .judges import Judges
from .results import Row
from .settings import AblationSettings, Preference, Shipped, Variants
from .variants import Deadline, VariantTask, train_once

LARGER = 1.5  # times the training resolution, in table 5
STAGE1, STAGE2, AUTOENCODER = "stage I", "stage II", "VAE"
SIDE = 16  # sides are multiples of so many pixels


class Lab:
    """The models of a config on a device."""

    def __init__(
        self,
        settings: AblationSettings,
        device: torch.device,
        clip: Path | None,
        deadline: Deadline,
        real_clips: tuple[RealClip, ...] = (),
    ) -> None:
        """Check that the models of most tables are there; nothing is made yet.

        `clip` is measured beside the scenes of every table, `real_clips` are those of the table `quality`.
        """
        shipped = settings.shipped
        for path in (shipped.stage2, shipped.vae, Path(shipped.text)):
            _check(path)
        if clip is not None and not clip.is_file():
            raise TrainingError(f"{clip}: there is no such video.")
        self.settings, self.device, self.deadline = settings, device, deadline
        held_out, self.real_clips = settings.held_out, real_clips
        self.real = () if clip is None else (RealClip(clip, held_out.when, held_out.caption),)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator, made when first needed."""
        shipped, out = self.settings.shipped, self.settings.out
        text = FrozenText(shipped.text, shipped.tokenizer, self.device)
        store = ClipStore(out / "clips", shipped.vae, text, self.device)
        return Evaluator(store, out / "results", self.device, self.deadline, Judges(out / "judges"))

    # Clips

    def suite(self, draft: str | None = None) -> Suite:
        """Held-out clips of full size."""
        held_out = self.settings.held_out
        source = ClipSettings(held_out.height, held_out.width, held_out.frames, clips=1)
        return Suite(source, held_out.clips, draft or held_out.draft, self.real)

    def small_suite(self, scale: float = 1.0) -> Suite:
        """Held-out clips of the size that variants are trained at, or a multiple of it."""
        held_out, clips = self.settings.held_out, self.settings.variants.clips
        height, width = (round(side * scale / SIDE) * SIDE for side in (clips.height, clips.width))
        source = dataclasses.replace(clips, height=height, width=width)
        return Suite(source, held_out.clips, held_out.draft, self.real)

    # Ways from a draft to a finished video

    def suite_of(self, height: int, width: int, frames: int) -> Suite:
        """A suite with a size and no clips."""
        return Suite(ClipSettings(height, width, frames, clips=1), 0, self.settings.held_out.draft)

    def strength(self, suite: Suite) -> int:
        """The strength that stage II is run with on a suite's clips, where a table doesn't vary it."""
        return self.refiner().strength_at(suite.source.height, suite.source.width)

    def said_strength(self, suite: Suite) -> str:
        """That strength in words."""
        number = str(self.strength(suite))
        return f"auto, {number}" if self.settings.refiner.strength == AUTO else number

    def refiner(self, weights: Path | None = None, kind: str = "rotary", **changes: int | str) -> Method:
        """Stage II, the shipped one if no weights are given, with the config's settings but for `changes`."""
        weights = weights or self.settings.shipped.stage2
        return dataclasses.replace(Method(kind, weights, **dataclasses.asdict(self.settings.refiner)), **changes)

    def rows(self, ways: list[tuple[str, Method]], suite: Suite) -> list[Row]:
        """Measure ways, each with its label, on a suite."""
        return [Row.of(label, self.evaluator.suite(label, method, suite)) for label, method in ways]

    # Training

    def variant(self, name: str, degradation: DegradationSettings, kind: str = "rotary") -> Path:
        """Weights of a stage II trained from nothing."""
        settings = Stage2Settings(**self._shared(self.settings.variants), degradation=degradation)
        return self._train(name, settings, lambda: VariantTask(settings, self.device, kind), kind)

    def preferred(self, name: str, candidates: int) -> Path:
        """Weights of the shipped stage II after tuning on the best of so many samples of a clip."""
        tuning, refiner = self.settings.preference, self.settings.refiner
        choice = dataclasses.replace(
            tuning.choice, candidates=candidates, steps=refiner.steps, cfg=refiner.cfg, strength=tuning.strength
        )
        network = NetworkSettings(weights=str(self.settings.shipped.stage2))
        degradation = self.settings.variants.degradation
        settings = PreferenceSettings(**self._shared(tuning), degradation=degradation, network=network, choice=choice)
        return self._train(name, settings, lambda: PreferenceTask(settings, self.device))

    def draft_settings(self, weights: Path, lora_rank: int = 0) -> Stage1Settings:
        """Stage I at the size that it is tuned for."""
        tuning = self.settings.draft_tuning
        rate = tuning.lora_learning_rate if lora_rank else tuning.loop.learning_rate
        return Stage1Settings(
            **self._places(),
            clips=tuning.clips,
            batch=tuning.batch,
            loop=dataclasses.replace(tuning.loop, learning_rate=rate),
            network=NetworkSettings(weights=str(weights), lora_rank=lora_rank),
            sheet=DraftSheet(count=2, steps=tuning.steps, scale=tuning.scale),
        )

    def tuned_draft(self, name: str, lora_rank: int) -> Path:
        """Weights of the shipped stage I after tuning for another size, all of them or through adapters."""
        _check(self.settings.shipped.stage1)
        settings = self.draft_settings(self.settings.shipped.stage1, lora_rank)
        return self._train(name, settings, lambda: Stage1Task(settings, self.device))

    def _places(self) -> dict[str, Any]:
        """What every training's settings begin with."""
        shipped = self.settings.shipped
        places = {"vae": shipped.vae, "text": shipped.text, "tokenizer": shipped.tokenizer}
        return {"seed": self.settings.seed, "out": Path(), "cache": self.settings.cache, **places}

    def _shared(self, budget: Variants | Preference) -> dict[str, Any]:
        """What every training of stage II has alike."""
        refiner = self.settings.refiner
        return {
            **self._places(),
            "loop": budget.loop,
            "phases": (Phase(budget.loop.steps, budget.batch, budget.clips),),
            "shift": refiner.shift,
            "sheet": SheetSettings(clips=1, steps=refiner.steps, cfg=refiner.cfg),
        }

    def _train(self, name: str, settings: Any, make_task: Callable[[], Task], kind: str = "") -> Path:
        return train_once(name, settings, make_task, self.settings.out / "variants", self.deadline, kind)

    # Facts about a measurement, for the document

    def facts(self, stage: str = STAGE2, /, **more: str) -> dict[str, str]:
        """Sha256 of the shipped `stage` and the VAE, device, date, and whatever a table adds."""
        cpu = f"CPU, {torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "CPU, one thread"
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        weights = shipped_weights(self.settings.shipped)
        shipped = {name: weights[name] for name in (stage, AUTOENCODER)}
        return {**more, **shipped, "device": device, "date": datetime.date.today().isoformat()}

    def clip_facts(self, suite: Suite) -> dict[str, str]:
        """How many clips of which size, and with which drafts."""
        scenes = [f"{suite.count} held-out scenes"] if suite.count else []
        real = [clip.path.name for clip in suite.real] if len(suite.real) < 2 else [f"{len(suite.real)} real clips"]
        return {"clips": ", and ".join([*scenes, *real]), "size": suite.size, "drafts": suite.draft}

    def budget_facts(self) -> dict[str, str]:
        """How long variants are trained, and at which degradation strengths where a table doesn't vary them."""
        variants = self.settings.variants
        low, high = variants.degradation.latent_steps
        budget = f"{variants.loop.steps} steps of {variants.batch} clips from nothing, every variant alike"
        often = ", weak ones more often" if variants.degradation.latent_power > 1 else ""
        return {"training": f"{budget}; strengths {low} to {high}{often}"}


def shipped_weights(shipped: Shipped) -> dict[str, str]:
    """How facts name what is shipped: the beginnings of the files' sha256."""
    files = {STAGE1: shipped.stage1, STAGE2: shipped.stage2, AUTOENCODER: shipped.vae}
    return {name: sha256(path, lambda *_: None)[:8] for name, path in files.items() if path.is_file()}


def _check(model: Path) -> None:
    if not model.is_file():
        raise TrainingError(f"{model}: there is no such model. Train it first: python -m flashvideo train nano.")
