"""The VAE over spatial tiles: the same numbers as the whole picture, within a memory budget, at any tile size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashvideo.checkpoints import load_vae
from flashvideo.config import VAE, VAEConfig
from flashvideo.nano import nano_state
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.vae import Posterior, VideoVAE, decode_chunks
from flashvideo.vae.memory import SMALLEST_TILE_LATENT, TilePlan, decode_bytes, encode_bytes, plan_vae_tiles
from flashvideo.vae.stream import TiledVAEStream
from flashvideo.vae.tiles import Moments, Tile, decode_in_tiles, encode_in_tiles, measure

TINY = VAEConfig(4, (1, 1, 2, 2), encoder_blocks=1, decoder_blocks=1, latent_channels=4, norm_groups=2)
SIZE = (6, 6, 10)  # latents, rows, columns: three chunks to decode and two to encode
ROUNDING = 3e-5  # of values up to 5: sums of statistics in another order, through 20 norms
# Bytes that may be stored between groups of units; with the second, some groups have several and some one.
ONE_GROUP, SOME, EVERY_UNIT = 0.0, 1e6, 1e12
WAYS = [
    (4, EVERY_UNIT, True),
    (8, EVERY_UNIT, True),
    (8, EVERY_UNIT, False),
    (8, SOME, True),
    (8, SOME, False),
    (8, ONE_GROUP, True),
    (8, ONE_GROUP, False),
]


@pytest.fixture(scope="module")
def tiny() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(TINY).requires_grad_(False)


@pytest.fixture(scope="module")
def latent() -> Tensor:
    return torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def decoded(tiny: VideoVAE, latent: Tensor) -> Tensor:
    """The latent decoded as a whole picture."""
    return tiny.decode(latent)


@pytest.fixture(scope="module")
def video() -> Tensor:
    """Brighter to the right, so that no tile's own statistics are the picture's."""
    noise = torch.rand(1, 3, 21, 48, 80, generator=torch.Generator().manual_seed(2))
    return noise * torch.linspace(0.1, 2, 80) - 1


@pytest.fixture(scope="module")
def encoded(tiny: VideoVAE, video: Tensor) -> Posterior:
    """The video encoded as a whole picture."""
    return tiny.encode(video)


@pytest.fixture(scope="module")
def wide(tiny: VideoVAE) -> tuple[Tensor, Tensor]:
    """A latent of 20 columns, and what it decodes to as a whole picture."""
    latent = torch.randn(1, 4, 7, 4, 20, generator=torch.Generator().manual_seed(3))
    return latent, tiny.decode(latent)


def plan(network: torch.nn.Module, side: int, store: float = EVERY_UNIT, by_chunk: bool = True) -> TilePlan:
    return plan_vae_tiles(network, SIZE, torch.float32, 1e12, store, side, by_chunk=by_chunk)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


@pytest.mark.parametrize(("side", "store", "by_chunk"), WAYS)
def test_tiles_decode_what_the_whole_picture_gives(
    tiny: VideoVAE, latent: Tensor, decoded: Tensor, side: int, store: float, by_chunk: bool
) -> None:
    cut = plan(tiny.decoder, side, store, by_chunk)
    assert (1 < len(cut.groups) < len(tiny.decoder.units())) == (store == SOME)
    tiled = decode_in_tiles(tiny, latent[:1], cut, torch.empty_like(decoded[:1]), "cpu")
    assert error(tiled, decoded[:1]) <= ROUNDING


@pytest.mark.parametrize(("side", "store", "by_chunk"), WAYS)
def test_tiles_encode_what_the_whole_picture_gives(
    tiny: VideoVAE, video: Tensor, encoded: Posterior, side: int, store: float, by_chunk: bool
) -> None:
    tiled = encode_in_tiles(tiny, video, plan(tiny.encoder, side, store, by_chunk), "cpu")
    assert error(tiled.mean, encoded.mean) <= ROUNDING
    assert error(tiled.logvar, encoded.logvar) <= ROUNDING


@torch.no_grad()
def test_tiles_of_the_trained_vae_leave_no_seams_on_a_scene() -> None:
    """In and out of tiles of 64 pixels: inside them and along their borders the same, and hardly off the whole's."""
    nano = load_vae(nano_state("vae"), dtype=torch.float32)
    clip = SceneStream("test", 96, 160, 5, 4).sample(0)[0][None]
    size = (2, 12, 20)
    whole = nano.encode(clip).mean
    tiled = encode_in_tiles(
        nano, clip, plan_vae_tiles(nano.encoder, size, torch.float32, 1e12, EVERY_UNIT, 8), "cpu"
    ).mean
    pictures = nano.decode(whole)
    decoding = plan_vae_tiles(nano.decoder, size, torch.float32, 1e12, EVERY_UNIT, 8)
    difference = (decode_in_tiles(nano, tiled, decoding, torch.empty_like(pictures), "cpu") - pictures).abs() * 127.5
    assert float(difference.mean()) <= 1.5
    border = torch.zeros(96, 160, dtype=torch.bool)
    for tile in Tile(0, 12, 0, 20).split(8):
        top, bottom, left, right = (8 * side for side in tile)
        for line in {top, bottom} - {0, 96}:
            border[line - 16 : line + 16, left:right] = True
        for line in {left, right} - {0, 160}:
            border[top:bottom, line - 16 : line + 16] = True
    assert border.any() and not border.all()
    exact = 1e-3  # of 255: the numbers' own rounding, where a ratio would compare noise with noise
    assert float(difference[..., border].mean()) <= max(1.05 * float(difference[..., ~border].mean()), exact)


def test_one_frame_works_and_inputs_stay_as_they_were(tiny: VideoVAE, video: Tensor) -> None:
    frame = video[:, :, :1].clone()
    mean = encode_in_tiles(tiny, frame, plan(tiny.encoder, 5), "cpu").mean
    assert error(mean, tiny.encode(frame).mean) <= ROUNDING
    kept = mean.clone()
    picture = decode_in_tiles(tiny, mean, plan(tiny.decoder, 5), torch.empty_like(frame), "cpu")
    assert error(picture, tiny.decode(mean)) <= ROUNDING
    assert torch.equal(frame, video[:, :, :1])
    assert torch.equal(mean, kept)


@pytest.mark.parametrize(("side", "by_chunk"), [(8, True), (8, False), (10, True), (10, False)])
@pytest.mark.parametrize("moment", [1, 3, 5])
def test_out_of_memory_halves_the_tiles_and_keeps_what_others_have_done(
    tiny: VideoVAE, latent: Tensor, decoded: Tensor, side: int, by_chunk: bool, moment: int
) -> None:
    """At any chunk, in several tiles or in one that is the whole picture."""

    class MemoryGoneError(Exception):
        pass

    areas = []

    def fail(_module: object, args: tuple) -> None:
        areas.append(args[0][0, 0, 0].numel())
        if len(areas) == moment:
            raise MemoryGoneError

    handle = tiny.decoder.up_blocks[3].resnets[0].conv2.register_forward_pre_hook(fail)
    steps = []
    video = torch.full_like(decoded, torch.nan)
    try:
        tiled = decode_in_tiles(
            tiny,
            latent,
            plan(tiny.decoder, side, by_chunk=by_chunk),
            video,
            "cpu",
            on_step=lambda *step: steps.append(step),
            is_out_of_memory=lambda found: isinstance(found, MemoryGoneError),
        )
    finally:
        handle.remove()
    assert error(tiled, decoded) <= ROUNDING
    assert max(areas[moment:]) < areas[0] if side == 8 else min(areas[moment:]) < areas[0]
    assert steps[-1][0] == steps[-1][1]


@pytest.fixture(scope="module")
def start(tiny: VideoVAE, latent: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of one latent, and what it decodes to as a whole picture."""
    return latent[:1, :, :3], tiny.decode(latent[:1, :, :3])


@pytest.mark.parametrize("moment", range(1, 20))
def test_out_of_memory_after_a_result_was_made_spoils_nothing(
    tiny: VideoVAE, start: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """A sum may take the place of what was added up: a second try must still find that."""

    class MemoryGoneError(Exception):
        pass

    calls = []

    def fail(x: Tensor, groups: int) -> Moments:
        calls.append(groups)
        if len(calls) == moment:
            raise MemoryGoneError
        return measure(x, groups)

    latent, whole = start
    monkeypatch.setattr("flashvideo.vae.tiles.measure", fail)
    options = {"is_out_of_memory": lambda found: isinstance(found, MemoryGoneError)}
    tiled = decode_in_tiles(tiny, latent, plan(tiny.decoder, 8), torch.empty_like(whole), "cpu", **options)
    assert len(calls) > 20
    assert error(tiled, whole) <= ROUNDING


def test_tiles_that_are_halved_in_a_later_chunk_find_what_larger_ones_have_left(
    tiny: VideoVAE, wide: tuple[Tensor, Tensor]
) -> None:
    """20 latent pixels in tiles of 9 are cut at 6 and 13, which tiles of 4 over the whole picture would straddle."""

    class MemoryGoneError(Exception):
        pass

    calls = []

    def fail(_module: object, _args: tuple) -> None:
        calls.append(1)
        if len(calls) == 5:  # of three tiles, in the second chunk
            raise MemoryGoneError

    latent, whole = wide
    cut = plan_vae_tiles(tiny.decoder, (7, 4, 20), torch.float32, 1e12, EVERY_UNIT, 9, by_chunk=True)
    handle = tiny.decoder.up_blocks[1].resnets[0].conv2.register_forward_pre_hook(fail)
    options = {"is_out_of_memory": lambda found: isinstance(found, MemoryGoneError)}
    try:
        tiled = decode_in_tiles(tiny, latent, cut, torch.empty_like(whole), "cpu", **options)
    finally:
        handle.remove()
    assert error(tiled, whole) <= ROUNDING


@pytest.mark.parametrize("moment", [2, 5, 9])
def test_a_stream_whose_tiles_were_halved_can_be_put_aside(
    tiny: VideoVAE, wide: tuple[Tensor, Tensor], moment: int
) -> None:
    """In the middle of a chunk, so that some layers have left something in large tiles and others in small ones."""
    calls = []

    def fail(_module: object, _args: tuple) -> None:
        calls.append(1)
        if len(calls) == moment:
            raise MemoryError

    latent, whole = wide
    cut = plan_vae_tiles(tiny.decoder, (5, 4, 20), torch.float32, 1e12, EVERY_UNIT, 9, by_chunk=True)
    handle = tiny.decoder.up_blocks[1].resnets[0].conv2.register_forward_pre_hook(fail)
    pieces, state, sizes = [], {}, decode_chunks(7)
    try:
        for done, chunk in enumerate(latent.split(sizes, dim=2)):
            stream = TiledVAEStream(tiny.decoder, sizes, cut, torch.device("cpu"))
            stream.restore(done, state)
            pieces.append(stream(chunk))
            state = {name: tensor.clone() for name, tensor in stream.state().items()}
            places = [name.rsplit(" ", 2)[0] for name in state if name.endswith("up_blocks.3.resnets.0.conv2")]
            columns = sum(int(right) - int(left) for *_, left, right in map(str.split, places))
            assert columns == (20 if done < len(sizes) - 1 else 0)  # what larger tiles left isn't kept for ever
    finally:
        handle.remove()
    assert len(calls) > moment
    assert error(torch.cat(pieces, dim=2), whole) <= ROUNDING


def test_other_errors_and_a_cancel_pass_through(tiny: VideoVAE, latent: Tensor) -> None:
    class CancelledError(Exception):
        pass

    steps = []

    def cancel(done: int, _total: int) -> None:
        steps.append(done)
        raise CancelledError

    with pytest.raises(CancelledError):
        decode_in_tiles(tiny, latent, plan(tiny.decoder, 8), torch.empty(2, 3, 21, 48, 80), "cpu", on_step=cancel)
    assert steps == [1]


def test_progress_counts_every_chunk_of_every_tile(tiny: VideoVAE, video: Tensor) -> None:
    steps = []
    encode_in_tiles(tiny, video, plan(tiny.encoder, 5), "cpu", on_step=lambda *step: steps.append(step))
    halves, steps_down = (4 + 2) * 2, 3
    total = (
        (1 + halves + steps_down + 1) * 2 * 2 * 2
    )  # 2 x 2 tiles, 2 chunks; each norm measured with what is before it
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_tiles_cover_the_picture_once() -> None:
    covered = torch.zeros(23, 40)
    whole = Tile(0, 23, 0, 40)
    tiles = whole.split(9)
    for tile in tiles:
        tile.cut(covered, whole).add_(1)
        assert tile.bottom - tile.top <= 9 and tile.right - tile.left <= 9
    assert torch.equal(covered, torch.ones_like(covered))
    assert Tile(0, 5, 35, 40).grown(3, whole) == Tile(0, 8, 32, 40)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_smaller_budget_gives_smaller_tiles_that_keep_to_it(way: str) -> None:
    """The official network at 1080p and 2K."""
    vae = VideoVAE(VAE, device="meta", dtype=torch.float16)
    network = vae.encoder if way == "encode" else vae.decoder
    for size, budgets in (((13, 136, 240), (24, 12, 6)), ((13, 180, 320), (24, 12))):
        latents, rows, columns = size
        shape = (1, 16, *size) if way == "decode" else (1, 3, 4 * latents - 3, 8 * rows, 8 * columns)
        whole = (decode_bytes if way == "decode" else encode_bytes)(vae, shape, torch.float16)
        assert whole > 24 * 2**30
        sides = []
        for budget in budgets:
            found = plan_vae_tiles(network, size, torch.float16, budget * 2**30, 8 * 2**30)
            assert found.device_bytes <= budget * 2**30
            assert found.stored_bytes <= 8 * 2**30
            sides.append(found.side)
        assert sides == sorted(sides, reverse=True)
        assert sides[-1] >= 4 * SMALLEST_TILE_LATENT


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_plan_counts_the_work_of_its_groups_and_a_larger_store_saves_some(half: str) -> None:
    """Every unit's convolution runs once for each norm of its group that comes later, and once to the end."""
    network, (latents, rows, columns) = getattr(VideoVAE(VAE, device="meta"), half), (13, 136, 240)
    found = []
    for gigabytes in (0.1, 1, 4, 16, 64):
        plan = plan_vae_tiles(network, (latents, rows, columns), torch.float16, 2**34, gigabytes * 2**30)
        work = 0
        for group in plan.groups:
            for place, unit in enumerate(group):
                runs = 1 + sum(later.norms for later in group[place + 1 :])
                work += runs * unit.work * ((latents - 1) * unit.time + 1) * unit.scale**2 * rows * columns
        assert plan.work == work
        found.append(work)
    assert found == sorted(found, reverse=True) and found[0] > 1.5 * found[-1]
