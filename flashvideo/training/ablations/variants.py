"""Networks that differ in one thing, trained equally long: each once, in a folder that its settings name."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...atomic_files import sha256
from ...checkpoints import STAGE_METADATA, load_dit
from ...checkpoints.architecture import dit_config
from ...dit import FlashVideoDiT
from ..loop.checkpointing import LAST, export_weights
from ..loop.trainer import MINUTE, Limits, Task, Trainer
from ..randomness import generator_for
from ..tasks.lora import merged_state
from ..tasks.losses import Network
from ..tasks.networks import as_called
from ..tasks.positions import AbsolutePositionsDiT
from ..tasks.stage2 import Stage2Settings, Stage2Task

KINDS = ("rotary", "absolute", "cascade")


class Paused(Exception):
    """The time is over, or a signal came; what is done is kept, and the same command resumes."""

    def __init__(self, signal_number: int | None = None) -> None:
        super().__init__("stopped")
        self.signal_number = signal_number


@dataclass(frozen=True)
class Deadline:
    """When to stop: a moment of the monotonic clock, or never."""

    at: float = math.inf

    @classmethod
    def after(cls, minutes: float | None) -> Deadline:
        """So many minutes from now."""
        return cls() if minutes is None else cls(time.monotonic() + minutes * MINUTE)

    @property
    def minutes(self) -> float | None:
        """What is left."""
        return None if math.isinf(self.at) else (self.at - time.monotonic()) / MINUTE

    def check(self) -> None:
        """Raise Paused if it is over."""
        if time.monotonic() >= self.at:
            raise Paused


def variant_network(dit: FlashVideoDiT, kind: str, seed: int) -> FlashVideoDiT:
    """A stage II network as one of KINDS.

    "rotary" is itself; "absolute" has the same weights and adds sinusoidal positions; "cascade" starts from noise alone
    and sees the draft's latent in 16 more input channels.
    """
    weight = dit.proj_out.weight
    factory = {"device": weight.device, "dtype": weight.dtype}
    state = dict(dit.state_dict())
    if kind == "absolute":
        variant: FlashVideoDiT = AbsolutePositionsDiT(dit.config, **factory)
    elif kind == "cascade":
        channels = dit.config.in_channels
        variant = FlashVideoDiT(dataclasses.replace(dit.config, in_channels=2 * channels), **factory)
        own = state["patch_embed.proj.weight"]
        limit = math.sqrt(3 / own[0].numel())
        more = nn.init.uniform_(torch.empty(own.shape), -limit, limit, generator=generator_for(seed, "cascade"))
        state["patch_embed.proj.weight"] = torch.cat((own, more.to(own)), dim=1)
    else:
        return dit
    variant.load_state_dict(state)
    return variant


def load_variant(path: Path, kind: str, device: torch.device) -> FlashVideoDiT:
    """Read a trained variant, in float32."""
    if kind == "cascade":  # its input channels are none that the loader knows
        state = load_file(path)
        dit = FlashVideoDiT(dit_config({name: tuple(tensor.shape) for name, tensor in state.items()}), device=device)
        dit.load_state_dict(state)
    else:
        dit = variant_network(load_dit(path, device=device, dtype=torch.float32, stage=2), kind, 0)
    return dit.eval()


def beside(network: Network, reference: Tensor) -> Network:
    """A cascade's network that is shown the reference [B, C, T, h, w] beside whatever it is called with."""

    def call(latent: Tensor, *arguments: Any, **options: Any) -> Tensor:
        shown = reference.repeat(len(latent) // len(reference), 1, 1, 1, 1).to(latent)
        return network(torch.cat((latent, shown), dim=1), *arguments, **options)

    return call


class VariantTask(Stage2Task):
    """Stage II with another network."""

    def __init__(self, settings: Stage2Settings, device: torch.device, kind: str) -> None:
        self.kind = kind
        super().__init__(settings, device)

    def network(self) -> FlashVideoDiT:
        """Make the network that learns."""
        return variant_network(super().network(), self.kind, self.settings.seed)

    def called(self, reference: Tensor) -> Network:
        """The network, which sees the scaled reference if it is a cascade."""
        network = as_called(self.model, checkpoint_blocks=self.settings.network.checkpoint_blocks)
        return beside(network, reference) if self.kind == "cascade" else network


def train_once(
    name: str, settings: Any, make_task: Callable[[], Task], folder: Path, deadline: Deadline, kind: str = ""
) -> Path:
    """Train a variant to the end of its schedule, and write the mean of its weights; return the file.

    A finished training is taken as it is, an interrupted one resumes. Other settings, another VAE, or other weights to
    start from get another folder. Raises Paused at the deadline or on a signal, with a checkpoint.
    """
    run = folder / f"{name}-{_digest(settings, kind)}"
    path = run / "weights.safetensors"
    if path.is_file():
        return path
    deadline.check()
    sys.stdout.write(f"{name}: {settings.loop.steps} steps in {run}\n")
    task = make_task()
    trainer = Trainer(task, settings.loop, run)
    ended_by = trainer.train(Limits(minutes=deadline.minutes), resume=(run / LAST).is_file())
    if ended_by is not None or trainer.step < settings.loop.steps:
        raise Paused(ended_by)
    dit = task.model if isinstance(task.model, FlashVideoDiT) else task.model["dit"]
    with trainer.mean.applied():
        metadata = {STAGE_METADATA: str(dit.config.stage), "flashvideo.seconds": f"{trainer.seconds:.0f}"}
        export_weights(path, merged_state(dit), metadata)
    sys.stdout.write(f"{name}: trained in {trainer.seconds / MINUTE:.1f} minutes\n")
    return path


def _digest(settings: Any, kind: str) -> str:
    """Name of a training: it depends on the content of its files, not on their paths."""
    weights = settings.network.weights
    files = [settings.vae, *([Path(weights)] if weights else []), Path(settings.text)]
    contents = [sha256(path, lambda *_: None) for path in files if path.is_file()]
    network = dataclasses.replace(settings.network, weights="")
    plain = dataclasses.replace(
        settings, out=Path(), cache=Path(), vae=Path(), text="", **({"network": network} if not weights else {})
    )
    return hashlib.sha256(repr((plain, kind, contents)).encode()).hexdigest()[:12]
