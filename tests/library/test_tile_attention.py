"""Windowed attention: exact where a window holds everything, blind outside its window, and light on memory."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from draws import normal
from torch import Tensor

from flashvideo.checkpoints import load_dit
from flashvideo.config import NANO_STAGE2
from flashvideo.dit import FlashVideoDiT, attention_sdpa, token_chunks
from flashvideo.dit.tile_attention import NEIGHBOURS, VIEWS, Grid, WindowAttention, share
from flashvideo.nano import build_nano

TEXT, GRID = 40, (4, 9, 11)
# Each view, windows in time, and so many tiles that some axis has fewer places than tiles.
CUTS = [*VIEWS.values(), (4, 2, 1), (4, 5, 20)]
TOLERANCE = 2e-6  # float32: the two ways sum in different orders


def sequence(grid: Grid = GRID, text: int = TEXT, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values [2, 3, N, 16]."""
    return [normal(2, 3, text + math.prod(grid), 16, seed=seed + index) for index in range(3)]


def window_mask(text: int, grid: Grid, tiles: Grid) -> Tensor:
    """Which key a query sees, by the definition: [N, N] over the tokens by frame, row and column."""
    sees = torch.ones(grid * 2, dtype=torch.bool)  # frame, row, column of the query, then of the key
    for axis, (size, parts) in enumerate(zip(grid, tiles, strict=True)):
        count = min(parts, size)
        tile = torch.empty(size, dtype=torch.long)
        for index in range(count):
            tile[index * size // count : (index + 1) * size // count] = index
        middle = tile.clamp(min(1, count - 1), max(count - 2, 0)) if count > 2 else torch.zeros_like(tile)
        near = (middle[:, None] - tile[None]).abs() <= (1 if count > 2 else count)
        shape = [1] * 6
        shape[axis], shape[axis + 3] = size, size
        sees &= near.view(shape)
    mask = torch.ones(text + math.prod(grid), text + math.prod(grid), dtype=torch.bool)
    mask[text:, text:] = sees.view(math.prod(grid), math.prod(grid))
    return mask


def in_tiles(windows: WindowAttention, text: int) -> Tensor:
    """The order of the whole sequence, text first."""
    return torch.cat((torch.arange(text), text + windows.order))


@pytest.mark.parametrize("tiles", CUTS)
@pytest.mark.parametrize("text", [0, 1, TEXT])
def test_it_is_masked_attention(tiles: Grid, text: int) -> None:
    q, k, v = sequence(text=text)
    windows = WindowAttention(text, GRID, tiles)
    order = in_tiles(windows, text)
    result = windows(*(x[:, :, order] for x in (q, k, v)), 3)
    mask = window_mask(text, GRID, tiles)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(result, expected[:, order], rtol=0, atol=TOLERANCE)
    assert windows.computed_share == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("tiles", list(product((1, 2, 3), repeat=3)))
def test_windows_over_everything_are_exact_and_copy_nothing(tiles: Grid) -> None:
    q, k, v = sequence()
    windows = WindowAttention(TEXT, GRID, tiles)
    order = in_tiles(windows, TEXT)
    q, k, v = (x[:, :, order] for x in (q, k, v))
    torch.testing.assert_close(windows(q, k, v, 3), attention_sdpa(q, k, v, 3), rtol=0, atol=TOLERANCE)
    assert windows.computed_share == 1
    assert all(len(span.keys) == 1 for span in windows.spans)


def test_only_what_is_in_the_window_has_influence() -> None:
    """In tiles of 2 x 2 patches the corner's tile is seen by the first two tiles along each axis, and by the text."""
    grid = (2, 8, 8)
    windows = WindowAttention(TEXT, grid, (1, 4, 4))
    order = in_tiles(windows, TEXT)
    place = order.argsort()  # in the sequence, of a token by frame, row and column
    q, k, v = (x[:, :, order] for x in sequence(grid))
    before = windows(q, k, v, 3)
    for changed in (k, v):
        after = changed.clone()
        after[:, :, place[TEXT + 64]] += 1.0  # second frame, first row, first column
        result = windows(q, after if changed is k else k, after if changed is v else v, 3)
        differs = (result != before).any(dim=2).all(dim=0)[place]  # by frame, row and column
        assert differs[:TEXT].all()
        expected = torch.zeros(grid, dtype=torch.bool)
        expected[:, :4, :4] = True
        assert torch.equal(differs[TEXT:].view(grid), expected)


@pytest.mark.parametrize("tiles", CUTS)
def test_every_place_sees_the_same_number_of_tiles(tiles: Grid) -> None:
    grid = (4, 10, 20)
    counts = [min(parts, size) for parts, size in zip(tiles, grid, strict=True)]
    tile = math.prod(grid) // math.prod(counts)
    seen = [sum(run.stop - run.start for run in span.keys) for span in WindowAttention(0, grid, tiles).spans[1:]]
    if all(size % count == 0 for size, count in zip(grid, counts, strict=True)):
        assert set(seen) == {tile * math.prod(min(count, NEIGHBOURS) for count in counts)}
    else:
        assert min(seen) >= 0.6 * max(seen)


def test_shares_of_the_views() -> None:
    """On a picture that the tiles divide, without text, the share is the definition's."""
    for tiles in VIEWS.values():
        exact = WindowAttention(0, tiles, tiles).computed_share
        assert exact == pytest.approx(share(tiles))
    assert [round(100 * share(tiles)) for tiles in VIEWS.values()] == [56, 36, 18]


@pytest.fixture(scope="module")
def nano() -> FlashVideoDiT:
    return load_dit(build_nano(1)["stage2"], dtype=torch.float32)


def inputs(frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A latent for so many patches, a time and a text."""
    side = NANO_STAGE2.patch_size
    latent = normal(1, 16, frames, side * rows, side * columns)
    return latent, torch.tensor([700.0]), normal(1, TEXT, NANO_STAGE2.text_dim)


def test_the_order_of_the_patches_changes_nothing_by_itself(nano: FlashVideoDiT) -> None:
    arguments = inputs(*GRID)
    order = torch.randperm(math.prod(GRID), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = nano(*arguments, degradation_step=675)
        shuffled = nano(*arguments, degradation_step=675, order=order)
    assert (shuffled - plain).abs().max() <= TOLERANCE


@pytest.mark.parametrize("piece", [128, 10_000])
def test_the_network_gives_the_same_in_pieces_whole_and_compiled(
    nano: FlashVideoDiT, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    arguments = inputs(*GRID)
    windows = WindowAttention(TEXT, GRID, (1, 1, 5))  # few, as each is a part of the compiled graph
    run = {"degradation_step": 675, "attention": windows, "order": windows.order}
    whole = nano(*arguments, **run).detach()  # under autograd
    exact = nano(*arguments, degradation_step=675).detach()
    assert (whole - exact).abs().max() > 100 * TOLERANCE
    row = arguments[0].shape[0] * nano.config.ff_dim
    monkeypatch.setattr(token_chunks, "CHUNK_BYTES_CPU", piece * row * torch.float32.itemsize)
    torch._dynamo.reset()
    network = load_dit(nano.state_dict(), dtype=torch.float32)
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert (nano(*arguments, **run) - whole).abs().max() <= TOLERANCE
        assert (network(*arguments, **run) - whole).abs().max() <= TOLERANCE
    torch._dynamo.reset()


def test_it_holds_one_window_beside_what_it_is_given() -> None:
    grid, tiles = (3, 24, 24), (1, 6, 6)
    windows = WindowAttention(TEXT, grid, tiles)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in sequence(grid))
    with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        windows(q, k, v, 3)
    held = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    unit = k.numel() * k.element_size()
    window = (TEXT + share(tiles) * math.prod(grid)) / (TEXT + math.prod(grid))
    # Keys and values of a window, what was attended (twice while it is put together), and the kernel's own.
    assert most <= (2 * window + 2 + 0.3) * unit
