"""Stage II in tiles: where they lie, that they agree, and what they cost."""

from __future__ import annotations

import random

import pytest
import torch
from draws import normal
from torch import Tensor

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.dit import FlashVideoDiT
from flashvideo.nano import nano_state
from flashvideo.refiner import Networks, RefineSettings, helpers
from flashvideo.refiner import run as refine
from flashvideo.refiner.tiles import plan_tiles, tiled_velocity
from flashvideo.samplers import guided_velocity, solve_flow
from flashvideo.schedule import stage2_times

TIMES = stage2_times(4)


@pytest.fixture(scope="module")
def dit() -> FlashVideoDiT:
    """Nano's refiner."""
    return load_dit(nano_state("stage2"), dtype=torch.float32)


@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_any_picture_cover_it_with_weights_that_sum_to_one(seed: int) -> None:
    pick = random.Random(seed)
    height, width = (2 * pick.randint(1, 120) for _ in range(2))
    tile = 16 * pick.randint(8, 64)
    sums = torch.zeros(height, width)
    for piece in plan_tiles(height, width, tile):
        rows, columns = piece.at[3:]
        assert (rows.start % 2, columns.start % 2) == (0, 0)
        assert sums[rows, columns].shape == (min(height, tile // 8), min(width, tile // 8)) == piece.weight.shape
        assert piece.weight.min() > 0
        sums[rows, columns] += piece.weight
    torch.testing.assert_close(sums, torch.ones(height, width))


def test_neighbours_share_a_quarter_and_1080p_is_few_tiles() -> None:
    pieces = plan_tiles(136, 240, 768)
    starts = [sorted({piece.at[axis].start for piece in pieces}) for axis in (3, 4)]
    assert starts == [[0, 40], [0, 72, 144]]
    assert all(after - before <= 72 for each in starts for before, after in zip(each, each[1:], strict=False))


@pytest.mark.parametrize("tile", [0, 112, 120, 250, -256])
def test_tiles_that_cannot_be_are_refused(tile: int) -> None:
    with pytest.raises(ValueError, match=rf"a multiple of 16 pixels, at least 128; got {tile}"):
        plan_tiles(64, 64, tile)


def test_a_velocity_that_looks_at_each_place_alone_is_the_same_in_tiles() -> None:
    latent = normal(1, 16, 3, 34, 50)

    def alone(x: Tensor, time: Tensor) -> Tensor:
        return (x * 1.5 - time).tanh()

    torch.testing.assert_close(tiled_velocity(alone, 128)(latent, TIMES[1]), alone(latent, TIMES[1]))


def test_a_picture_of_one_tile_is_refined_as_before_to_the_last_bit(dit: FlashVideoDiT) -> None:
    latent, context = normal(1, 16, 2, 16, 16), normal(1, 8, dit.config.text_dim)
    velocity = guided_velocity(dit, context, torch.zeros_like(context), 4.0, 450)
    with torch.no_grad():
        assert torch.equal(tiled_velocity(velocity, 128)(latent, TIMES[1]), velocity(latent, TIMES[1]))


def test_the_network_never_sees_more_than_a_tile(dit: FlashVideoDiT) -> None:
    seen = set()

    def watch(latent: Tensor, _time: Tensor) -> Tensor:
        seen.add(tuple(latent.shape[3:]))
        return torch.zeros_like(latent)

    tiled_velocity(watch, 256)(normal(1, 16, 1, 68, 120), TIMES[1])
    assert seen == {(32, 32)}


def test_tiles_differ_from_the_whole_picture_no_more_at_their_borders_than_inside(dit: FlashVideoDiT) -> None:
    context = normal(1, 8, dit.config.text_dim)
    velocity = guided_velocity(dit, context, torch.zeros_like(context), 1.0, 450)
    latent = normal(1, 16, 1, 16, 36)
    with torch.no_grad():
        difference = solve_flow(tiled_velocity(velocity, 128), latent, TIMES) - solve_flow(velocity, latent, TIMES)
    squares = difference.square().mean((0, 1, 2))
    border = torch.zeros(16, 36, dtype=torch.bool)
    for piece in plan_tiles(16, 36, 128):
        rows, columns = piece.at[3:]
        for edge in (rows.start, rows.stop):
            border[max(edge - 1, 0) : edge + 1] |= 0 < edge < 16
        for edge in (columns.start, columns.stop):
            border[:, max(edge - 1, 0) : edge + 1] |= 0 < edge < 36
    assert 0 < border.float().mean() < 0.6
    assert float(squares.min()) > 0
    assert float((squares[border].mean() / squares[~border].mean()).sqrt()) <= 1.05


def test_the_refiner_takes_a_tile(dit: FlashVideoDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks(dit, load_vae(nano_state("vae"), dtype=torch.float32), normal(1, 8, dit.config.text_dim))
    seen = []
    plain = helpers.guided_velocity

    def watched(*arguments: object) -> object:
        velocity = plain(*arguments)

        def watch(latent: Tensor, time: Tensor) -> Tensor:
            seen.append(tuple(latent.shape[3:]))
            return velocity(latent, time)

        return watch

    monkeypatch.setattr(helpers, "guided_velocity", watched)
    frames = torch.rand(5, 144, 160, 3, generator=torch.Generator().manual_seed(0))
    settings = RefineSettings(refine.TargetSize("keep"), steps=1, cfg=1.0, tile=128)
    refined = refine.refine_frames(networks, frames, settings)
    assert refined.shape == frames.shape
    assert set(seen) == {(16, 16)}
    assert len(seen) == len(plan_tiles(18, 20, 128)) == 4
    with pytest.raises(ValueError, match="a tile's side"):
        RefineSettings(tile=100)
