"""Weights spread over all ranks by PyTorch's FSDP2: a card holds its share of them, and one layer while it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def shard_weights(network: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Give each rank a share of the weights of `network`, which all have loaded; move that share to `device`.

    Each of its `layers` is gathered when it computes and dropped afterwards; all ranks must run the same layers in the
    same order. Not under inference mode.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
