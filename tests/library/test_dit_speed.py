"""The network's two ways through a layer: whole for autograd and compilers, in pieces and in place otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashvideo.checkpoints import load_dit
from flashvideo.config import NANO_STAGE1
from flashvideo.dit import FlashVideoDiT, token_chunks
from flashvideo.dit.rope import rope_table, rotate, rotate_
from flashvideo.dit.token_chunks import CHUNK_BYTES_CPU, CHUNK_ELEMENTS, CHUNK_MULTIPLE, tokens_per_chunk
from flashvideo.nano import build_nano

TOLERANCE = 2e-6  # float32: the two ways sum in different orders


@pytest.fixture(scope="module")
def nano() -> FlashVideoDiT:
    return load_dit(build_nano(1)["stage2"], dtype=torch.float32)


def inputs(frames: int = 2, rows: int = 16, columns: int = 24, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(batch, 16, frames, rows, columns, generator=generator)
    context = torch.randn(batch, 40, NANO_STAGE1.text_dim, generator=generator)
    return latent, torch.full((batch,), 700.0), context


def cut(monkeypatch: pytest.MonkeyPatch, piece: int, network: FlashVideoDiT, batch: int = 2) -> None:
    """Let pieces be of at most so many tokens, in float32."""
    monkeypatch.setattr(token_chunks, "CHUNK_BYTES_CPU", piece * batch * network.config.ff_dim * torch.float32.itemsize)


@pytest.mark.parametrize("piece", [128, 256, 10_000])
def test_pieces_give_what_the_whole_sequence_gives(
    nano: FlashVideoDiT, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """232 tokens, 40 of them text: the first border of pieces lies among the video's, or there is none."""
    arguments = inputs()
    with torch.enable_grad():
        whole = nano(*arguments, degradation_step=675).detach()
    cut(monkeypatch, piece, nano)
    with torch.inference_mode():
        assert (nano(*arguments, degradation_step=675) - whole).abs().max() <= TOLERANCE


def test_a_border_between_pieces_may_lie_inside_the_text(nano: FlashVideoDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, timestep, _ = inputs()
    context = torch.randn(2, 150, NANO_STAGE1.text_dim, generator=torch.Generator().manual_seed(4))
    whole = nano(latent, timestep, context, degradation_step=675).detach()
    cut(monkeypatch, 128, nano)
    with torch.no_grad():
        assert (nano(latent, timestep, context, degradation_step=675) - whole).abs().max() <= TOLERANCE


def test_inputs_and_weights_stay_as_they_are(nano: FlashVideoDiT) -> None:
    arguments = inputs()
    before = [x.clone() for x in (*arguments, *nano.state_dict().values())]
    with torch.inference_mode():
        first = nano(*arguments, degradation_step=675)
        second = nano(*arguments, degradation_step=675)
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, (*arguments, *nano.state_dict().values())))


@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 1, torch.float32), ("cpu", 2, torch.float32), ("cpu", 1, torch.bfloat16), ("cuda", 2, torch.bfloat16)],
)
@pytest.mark.parametrize("width", [512, 1024, 7680, 12288])
@pytest.mark.parametrize("count", [1, 127, 1024, 6466, 104_746])
def test_pieces_are_even_and_within_their_limit(
    count: int, width: int, device: str, batch: int, dtype: torch.dtype
) -> None:
    """The limit may be passed by rounding up to what kernels like, and by no more."""
    size = tokens_per_chunk(count, batch * width, dtype.itemsize, device)
    assert size == count or size % CHUNK_MULTIPLE == 0
    pieces = math.ceil(count / size)
    assert size - count / pieces < CHUNK_MULTIPLE * (1 + 1 / pieces)
    rounded_off = max(1, size - CHUNK_MULTIPLE) * batch * width
    limit = CHUNK_BYTES_CPU / dtype.itemsize if device == "cpu" else CHUNK_ELEMENTS
    assert rounded_off <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_place_equals_the_formula(dtype: torch.dtype) -> None:
    cos, sin = rope_table(2, 3, 4, 64, torch.device("cpu"))
    x = torch.randn(2, 24, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = rotate(x, cos, sin)
    result = rotate_(x, cos, sin)
    assert result is x
    # float32: fused multiply-adds; bfloat16: those, next to a rounding border.
    torch.testing.assert_close(x, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_gradients_are_those_of_the_function_without_autograd(nano: FlashVideoDiT) -> None:
    """The in-place way's finite difference along a direction is the other way's gradient."""
    latent, timestep, context = (x.double() if x.ndim > 1 else x for x in inputs(batch=1))
    network = load_dit(nano.state_dict(), dtype=torch.float64)
    direction = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    latent.requires_grad_(True)
    network(latent, timestep, context, degradation_step=675).square().sum().backward()
    expected = float((latent.grad * direction).sum())
    step = 1e-2  # rotations compute in float32: a smaller step would show their rounding
    with torch.no_grad():
        ends = [
            network(latent + sign * step * direction, timestep, context, degradation_step=675).square().sum()
            for sign in (1, -1)
        ]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-3)


def test_activations_take_three_units_and_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a token fall to those of the residual stream, keys and values as the sequence grows."""
    config = replace(NANO_STAGE1, num_layers=2, patch_size=2)
    network = FlashVideoDiT(config).eval()
    cut(monkeypatch, 128, network, batch=1)
    peaks = [peak(network, *inputs(frames, 32, 32, batch=1)) for frames in (4, 12)]
    unit = config.hidden_size * 4  # bytes of one float32 vector
    units = (peaks[1] - peaks[0]) / (8 * 256 * unit)
    # Beside the three: positions in float32 (64 numbers a token, half a unit at this width), latent and result.
    assert 3 <= units <= 4.5


def peak(network: FlashVideoDiT, *arguments: Tensor) -> int:
    """Bytes that a forward pass holds at its peak."""
    with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        network(*arguments)
    held = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_compiles_whole_and_new_sizes_recompile_once(nano: FlashVideoDiT, grad: bool) -> None:
    """No graph breaks (fullgraph refuses them); of four sizes the second makes the graph dynamic, then it stays."""
    torch._dynamo.reset()
    network = load_dit(nano.state_dict(), dtype=torch.float32)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _examples: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for block in network.blocks:
        block.compile(backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for rows, columns in ((8, 12), (12, 8), (16, 24), (10, 6)):
            arguments = inputs(2, rows, columns, batch=1)
            expected = nano(*arguments, degradation_step=675)
            result = network(*arguments, degradation_step=675)
            assert (result - expected).abs().max() <= TOLERANCE
    torch._dynamo.reset()
    assert len(graphs) == 2
