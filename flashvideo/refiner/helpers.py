"""Windows of one clip on several workers that have the networks: latents go there, and velocities come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dit import FlashVideoDiT
from ..parallel import Ranks
from ..parallel.team import Team
from ..samplers import Velocity, guided_velocity
from .tiles import tiled_velocity

Part = tuple[np.ndarray, Tensor]  # a window's latent [B, C, t, H, W], and the time; arrays travel without copies


@dataclass(frozen=True)
class Conditions:
    """What all windows of a clip have in common: the prompt's encoding [1, L, text_dim], and stage II's settings."""

    context: Tensor
    cfg: float
    strength: int
    tile: int

    def velocity(self, dit: FlashVideoDiT, device: torch.device, ranks: Ranks | None = None) -> Velocity:
        """Stage II's velocity of a window on the device, where `dit` is."""
        context = self.context.to(device, next(dit.parameters()).dtype)
        velocity = guided_velocity(dit, context, torch.zeros_like(context), self.cfg, self.strength, ranks)
        return tiled_velocity(velocity, self.tile) if self.tile else velocity


@torch.no_grad()
def evaluate_window(dit: FlashVideoDiT, device: torch.device, conditions: Conditions, part: Part) -> np.ndarray:
    """A helper's work."""
    latent, time = part
    return conditions.velocity(dit, device)(_tensor(latent, device), time).cpu().numpy()


class WindowHelpers:
    """A team's workers as a wavefront's `Helpers`."""

    def __init__(self, team: Team, device: torch.device) -> None:
        self._team, self._device = team, device

    @property
    def places(self) -> int:
        """How many windows they take at a time."""
        return self._team.places

    @property
    def idle(self) -> bool:
        """Whether one of them has nothing to do."""
        return self._team.idle

    @property
    def room(self) -> bool:
        """Whether one of them takes a window."""
        return self._team.room

    def order(self, latent: Tensor, time: Tensor) -> Any:
        """Hand over a window."""
        return self._team.order((latent.cpu().numpy(), time.cpu()))

    def finished(self, orders: Sequence[Any], *, wait: bool) -> Any | None:
        """The first of some orders that is done."""
        return self._team.finished(orders, wait=wait)

    def velocity(self, order: Any) -> Tensor | None:
        """Of a finished order."""
        result = self._team.result(order)
        return None if result is None else _tensor(result, self._device)


@contextmanager
def window_helpers(
    team: Team | None, windows: int, conditions: Conditions, device: torch.device
) -> Iterator[WindowHelpers | None]:
    """Helpers for a clip of so many windows; None without a team."""
    if team is None:
        yield None
        return
    with team.at_work(windows - 1, conditions):
        yield WindowHelpers(team, device)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)  # a copy: what has travelled can't be written to
