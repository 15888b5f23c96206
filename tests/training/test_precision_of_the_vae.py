"""Training the VAE in bfloat16 on a CPU: PyTorch's own kernels."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor

from flashvideo.checkpoints import load_vae
from flashvideo.nano import build_part
from flashvideo.training.loop.precision import cpu_has_bf16

LENGTHS = (5, 9)


@pytest.mark.skipif(not cpu_has_bf16(), reason="the processor has no bfloat16 instructions")
def test_training_in_bfloat16_on_the_cpu_gives_the_gradient_of_float32() -> None:
    """In a process of its own: what went wrong here ended it."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply_async(_gradients).get(timeout=300)
    assert len(found) == len(LENGTHS)
    for gradient, wanted in found:
        assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.999
        assert gradient.norm() == pytest.approx(wanted.norm(), rel=0.02)


def _gradients() -> list[tuple[Tensor, Tensor]]:
    """Of all weights, side by side, in bfloat16 and in float32, for a clip of each length."""
    vae = load_vae(build_part("footage_vae", 1), dtype=torch.float32).requires_grad_(True)
    pairs = []
    for frames in LENGTHS:
        noise = torch.randn(1, 3, frames, 12, 12, generator=torch.Generator().manual_seed(2))
        video, found = torch.nn.functional.interpolate(noise, size=(frames, 96, 96)), []
        for half in (True, False):
            vae.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = vae.decode(vae.encode(video).mean)
            (out.float() - video).square().mean().backward()
            found.append(torch.cat([weight.grad.flatten() for weight in vae.parameters()]))
        pairs.append((found[0], found[1]))
    return pairs
