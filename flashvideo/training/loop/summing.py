"""Gradients and losses of a step that several processes have shared, summed over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallel import Ranks
from ...parallel.counting import GRADIENTS

BUCKET = 2**24  # numbers that are summed at once, 64 MiB: more would cost memory, fewer messages time


def sum_over_ranks(ranks: Ranks, parameters: list[nn.Parameter], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the parameters' gradients by their sums over all ranks; returns the sums of the loss's terms.

    A gradient that no rank has stays None, as in one process. Sums are in float32, whatever the gradients are in.
    """
    has = [parameter.grad is not None for parameter in parameters]
    found = ranks.collect((bytes(has), {name: float(term) for name, term in terms.items()}))
    learning = [each for each, *flags in zip(parameters, *(flags for flags, _ in found), strict=True) if any(flags)]
    for bucket in _buckets(learning):
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in bucket]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        ranks.sum(flat, GRADIENTS)
        sums = flat.split([each.numel() for each in bucket])
        for parameter, gradient, total in zip(bucket, gradients, sums, strict=True):
            parameter.grad = gradient.copy_(total.view_as(gradient))
    names = list(dict.fromkeys(name for _, each in found for name in each))
    return {name: torch.tensor(sum(each.get(name, 0.0) for _, each in found)) for name in names}


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in their order, in groups of at most `BUCKET` numbers; a larger one is alone."""
    groups: list[list[nn.Parameter]] = []
    size = BUCKET
    for parameter in parameters:
        size += parameter.numel()
        if size > BUCKET:
            groups.append([])
            size = parameter.numel()
        groups[-1].append(parameter)
    return groups
