"""The arithmetic of one optimisation: which weights learn, how fast, and their running mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoopSettings

BETA1 = 0.9
MUON_MOMENTUM = 0.95
# Muon's fifth-order Newton-Schulz iteration; the numbers push every singular value to about 1 in five rounds.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5
MUON_SIZE = 0.2  # root mean square of an update, in learning rates: about AdamW's, so that one rate serves both
MUON_SMALLEST = 16  # narrower matrices, such as the last layer's to red, green and blue, are AdamW's


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al. 2024, arXiv 2502.16982).

    A kernel counts as the matrix [outputs, everything else]. PyTorch's own takes matrices only, hence not the VAE's.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state; momenta stay in float32, whatever the weights are in."""
        super().load_state_dict(state)
        for number, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            if number in state["state"]:
                momentum = state["state"][number]["momentum"]
                self.state[parameter]["momentum"] = momentum.to(parameter.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: nn.Parameter, rate: float, decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - MUON_MOMENTUM)
        update = orthogonal(gradient.lerp(momentum, MUON_MOMENTUM).flatten(1))
        size = MUON_SIZE * max(update.shape) ** 0.5
        parameter.mul_(1 - rate * decay).add_(update.view_as(parameter).to(parameter.dtype), alpha=-rate * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with singular values near 1 (0.7 to 1.2), by Newton-Schulz.

    Every round multiplies from the short side, so the rounds' product is made there, and the long side is multiplied
    twice in all instead of twice a round.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    product = one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    square = x @ x.T
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        factor = a * one + b * square + c * square @ square  # symmetric, as the square is
        product, square = factor @ product, factor @ square @ factor
    x = product @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Together:
    """Several optimisers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state."""
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimiser(model: nn.Module, settings: LoopSettings) -> torch.optim.Optimizer | Together:
    """AdamW that decays matrices and kernels, and leaves norms and biases alone; with Muon for those if asked for."""
    parameters = list(trainable(model).values())
    hidden = _matrices(model) if settings.optimiser == "muon" else []
    taken = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(BETA1, settings.beta2))
    if not hidden:
        return adamw
    return Together(Muon(hidden, settings.learning_rate, settings.weight_decay), adamw)


def load_optimiser(optimiser: torch.optim.Optimizer | Together, state: dict[str, Any]) -> None:
    """Load a checkpoint's moments, and keep the settings that the optimiser was made with."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimiser.param_groups]
    optimiser.load_state_dict(state)
    for group, values in zip(optimiser.param_groups, settings, strict=True):
        group.update(values)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the layers, large enough to be made orthogonal; tables of embeddings are none."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        parameter
        for parameter in trainable(model).values()
        if parameter.ndim > 1
        and id(parameter) not in tables
        and min(parameter.shape[0], parameter[0].numel()) >= MUON_SMALLEST
    ]


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
        """Update the mean with the weights after optimiser step `step`; at the start it follows faster."""
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
        """Load a checkpoint's mean."""
        for name, tensor in self.mean.items():
            tensor.copy_(mean[name])
