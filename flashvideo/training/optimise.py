"""The arithmetic of one optimisation: which weights learn, how fast, and their running mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import LoopSettings

BETA1 = 0.9


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimiser(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels, and leaves norms and biases alone."""
    parameters = trainable(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(BETA1, settings.beta2))


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Rate of optimiser step `step` (from 0): a linear warm-up, then half a cosine down to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


class RunningMean:
    """Exponential mean of the learning weights over the steps, kept in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = trainable(model)
        self.mean = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`; early on the mean follows faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.mean.values()), now, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the mean weights."""
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.mean[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    def load(self, mean: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's mean."""
        for name, tensor in self.mean.items():
            tensor.copy_(mean[name])
