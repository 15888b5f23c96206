"""Alpha goes with the picture: read exactly, enlarged along the picture's edges, written where the file has room."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from flashvideo.frames import TargetSize, prepare
from flashvideo.refiner import Networks, RefineSettings
from flashvideo.refiner.alpha import AlphaLayer, enlarge_alpha, make_transparent
from flashvideo.refiner.file_options import FileOptions
from flashvideo.refiner.files import refine_picture, refine_video
from flashvideo.refiner.outputs import open_source, output_of
from flashvideo.video_files import orientation_of
from flashvideo.video_files.alpha import alpha_of, has_alpha, is_transparent

HEIGHT, WIDTH, COUNT = 32, 48, 6
COLOUR = (200, 90, 40)
CHEAP = RefineSettings(TargetSize("scale", scale=2), steps=1, cfg=1.0, color_match="none")


def layer(index: int, height: int = HEIGHT, width: int = WIDTH, radius: float = 9.0) -> np.ndarray:
    """A soft disc that moves, straight RGBA uint8 [H, W, 4]; outside it the hidden colour is white."""
    y, x = np.mgrid[:height, :width]
    scale = height / HEIGHT
    distance = np.hypot(y / scale - 15, x / scale - 14 - 2 * index)
    alpha = np.clip((radius - distance) / 3 + 0.5, 0, 1)
    picture = np.full((height, width, 4), 255, np.uint8)
    picture[alpha > 0, :3] = COLOUR
    picture[..., 3] = np.round(alpha * 255)
    return picture


def opaque_shares(index: int) -> np.ndarray:
    return layer(index)[..., 3] / 255


def centre(alpha: np.ndarray) -> np.ndarray:
    """The mean place of what is opaque, as row and column."""
    places = np.indices(alpha.shape)
    return (places * alpha).sum((1, 2)) / alpha.sum()


def on_grey(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What a person sees before grey, [H, W, 3] in 255ths."""
    return colours * alpha[..., None] + 128 * (1 - alpha[..., None])


def write_pictures(folder: Path, ending: str) -> Path:
    """The layers as numbered pictures; returns their pattern."""
    folder.mkdir()
    for index in range(COUNT):
        picture, path = layer(index), folder / f"{index + 1:04d}{ending}"
        if ending != ".exr":
            Image.fromarray(picture).save(path)
            continue
        light = (picture / 255).astype(np.float32)
        light[..., :3] = light[..., :3] ** 2.2 * light[..., 3:]  # OpenEXR's own way: premultiplied
        context = av.CodecContext.create("exr", "w")
        context.height, context.width, context.pix_fmt = HEIGHT, WIDTH, "gbrapf32le"
        context.time_base = Fraction(1, 24)
        frame = av.VideoFrame.from_ndarray(light, format="gbrapf32le")
        path.write_bytes(b"".join(map(bytes, [*context.encode(frame), *context.encode(None)])))
    return folder / f"%04d{ending}"


def write_video(path: Path, codec: str, pixels: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        if codec.startswith("libvpx"):
            stream.metadata["alpha_mode"] = "1"
            stream.options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
            if codec == "libvpx-vp9":
                stream.options = {"auto-alt-ref": "0", "lossless": "1"}
        for index in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(layer(index), format="rgba")))
        container.mux(stream.encode())
    return path


def frames_of(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def copy(source: Path, target: Path, **choices: object) -> tuple[str, ...]:
    """What the refiner does to a file without a network; returns what it says gets lost."""
    options = FileOptions(**choices)
    clip = open_source(source, options)
    output = output_of(clip, (clip.height, clip.width), target, options)
    warned: list[str] = []
    output.check(FileOptions(warn=warned.append, **choices), resumes=False)
    layers = zip(clip.frames(), clip.alpha(), strict=True)
    with_alpha = [torch.cat([frame, alpha[..., None]], dim=2) for frame, alpha in layers]
    frames = torch.stack(with_alpha if output.form.keeps_alpha else list(clip.frames()))
    segment = output.encode([frames])
    output.write([segment], lambda _part: None, force=False)
    return tuple(output.form.losses())


@pytest.mark.parametrize(("pixels", "steps"), [
    ("yuva420p", 255), ("yuva444p10le", 1023), ("yuva444p12le", 4095), ("gbrap", 255), ("gbrap12le", 4095),
    ("gbrapf32le", None), ("rgba", 255), ("bgra", 255), ("rgba64le", 65535), ("ya8", 255), ("ya16be", 65535),
])  # fmt: skip
def test_alpha_is_read_as_it_is_stored(pixels: str, steps: int | None) -> None:
    """Every kind of pixels that holds it, at a width with space behind its rows."""
    height, width = 4, 30
    expected = np.linspace(0, 1, height * width).reshape(height, width)
    frame = av.VideoFrame(width, height, pixels)
    component = next(each for each in frame.format.components if each.is_alpha)
    stored = expected if steps is None else np.round(expected * steps)
    kind = np.dtype("<f4" if steps is None else f"{'>' if pixels.endswith('be') else '<'}u{1 if steps == 255 else 2}")
    plane = frame.planes[component.plane]
    a_pixel = 1 if frame.format.is_planar else len(frame.format.components)
    rows = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
    rows[:, a_pixel - 1 : width * a_pixel : a_pixel] = stored
    plane.update(rows.tobytes())
    found = alpha_of(frame)
    assert has_alpha(frame) and is_transparent(frame)
    assert np.abs(found - stored / (steps or 1)).max() < 1e-6


def test_a_palette_may_be_transparent(tmp_path: Path) -> None:
    picture = Image.new("P", (WIDTH, HEIGHT), 1)
    picture.putpalette([255, 255, 255, *COLOUR])
    picture.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    picture.info["transparency"] = 0
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "1.png")
    clip = open_source(tmp_path / "in" / "%d.png", FileOptions())
    (frame,), (alpha,) = clip.frames(), clip.alpha()
    assert clip.transparent
    assert (alpha[:, : WIDTH // 2] == 0).all() and (alpha[:, WIDTH // 2 :] == 1).all()
    assert (frame[:, : WIDTH // 2] == 0).all()  # not white, which is hidden
    assert ((frame[:, WIDTH // 2 :] * 255).round() == torch.tensor(COLOUR)).all()


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_pictures_keep_alpha_and_colours(ending: str, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", ending)
    assert copy(source, tmp_path / "out" / f"%04d{ending}") == ()
    for index in range(COUNT):
        with Image.open(tmp_path / "out" / f"{index + 1:04d}{ending}") as image:
            assert image.mode == "RGBA"
            found, before = np.array(image).astype(float), layer(index).astype(float)
        assert np.array_equal(found[..., 3], before[..., 3])
        visible = before[..., 3] > 0
        assert np.abs(found - before)[visible].max() <= 1
        assert (found[~visible] == 0).all()


@pytest.mark.parametrize(("kind", "seen"), [(2, (50, 22.5, 10)), (1, (100, 45, 20))], ids=["straight", "premultiplied"])
def test_a_tiff_may_be_premultiplied(kind: int, seen: tuple[float, ...], tmp_path: Path) -> None:
    """What it calls associated alpha; Pillow writes the other kind, whose mark is one number."""
    half, path = np.full((HEIGHT, WIDTH, 4), (100, 45, 20, 128), np.uint8), tmp_path / "1.tif"
    Image.fromarray(half).save(path)
    before, after = (struct.pack("<HHIH", 338, 3, 1, each) for each in (2, kind))  # tag, short numbers, how many, which
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))
    clip = open_source(tmp_path / "%d.tif", FileOptions())
    (frame,), (alpha,) = clip.frames(), clip.alpha()
    assert np.abs(frame[0, 0].numpy() * 255 - seen).max() <= 0.5
    assert float(alpha[0, 0]) == pytest.approx(128 / 255)


def test_openexr_keeps_alpha_and_premultiplied_light(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", ".exr")
    assert copy(source, tmp_path / "out" / "%04d.exr") == ()
    for index in range(COUNT):
        name = f"{index + 1:04d}.exr"
        found, before = (frames_of(tmp_path / folder / name)[0].to_ndarray() for folder in ("out", "in"))
        assert np.abs(found[..., 3] - before[..., 3]).max() < 1 / 2048  # half precision
        assert np.abs(found[..., :3] - before[..., :3]).max() < 0.004


@pytest.mark.parametrize("make", [
    lambda folder: write_video(folder / "in.mov", "prores_ks", "yuva444p10le"),
    lambda folder: write_video(folder / "in.mov", "qtrle", "argb"),
    lambda folder: write_video(folder / "in.mkv", "ffv1", "bgra"),
    lambda folder: write_video(folder / "in.apng", "apng", "rgba"),
    lambda folder: write_video(folder / "in.webm", "libvpx-vp9", "yuva420p"),
    lambda folder: write_pictures(folder / "in", ".png"),
], ids=["prores", "qtrle", "ffv1", "apng", "webm", "pictures"])  # fmt: skip
def test_prores_keeps_alpha(make: Callable[[Path], Path], tmp_path: Path) -> None:
    target = tmp_path / "out.mov"
    assert not any("transparency" in text for text in copy(make(tmp_path), target, codec="prores"))
    frames = frames_of(target)
    assert len(frames) == COUNT
    for index, frame in enumerate(frames):
        stored, alpha = alpha_of(frame), opaque_shares(index)
        assert np.abs(stored - alpha).max() * 255 <= 1.2  # swscale makes the WebM's, one off at most; here 10 bits
        assert (stored[alpha == 1] == 1).all() and (stored[alpha == 0] == 0).all()
        colours = frame.reformat(format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=5).to_ndarray()
        seen, meant = on_grey(colours.astype(float), stored), on_grey(layer(index)[..., :3].astype(float), alpha)
        assert np.abs(seen - meant).mean() < 2


def test_what_has_no_room_for_it_says_what_has(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mov", "qtrle", "argb")
    (lost,) = copy(source, tmp_path / "out.mp4")
    assert "transparency gets lost" in lost and "--codec prores" in lost
    for frame, index in zip(frames_of(tmp_path / "out.mp4"), range(COUNT), strict=True):
        black = frame.to_ndarray(format="rgb24")[layer(index)[..., 3] == 0]
        assert black.mean() < 3  # not white, which is hidden


@pytest.mark.parametrize(("ending", "options"), [
    (".webp", {"lossless": True, "exact": True}), (".avif", {"quality": 100}), (".gif", {"disposal": 2}),
])  # fmt: skip
def test_an_animated_picture_keeps_alpha(ending: str, options: dict[str, object], tmp_path: Path) -> None:
    """As Pillow reads it: GIF has no half-transparent pixels."""
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow doesn't write AVIF")
    pages, source = [Image.fromarray(layer(index)) for index in range(COUNT)], tmp_path / f"in{ending}"
    pages[0].save(source, save_all=True, append_images=pages[1:], duration=40, **options)
    copy(source, tmp_path / "out" / "%d.png")
    with Image.open(source) as before:
        for index in range(COUNT):
            before.seek(index)
            meant = np.array(before.convert("RGBA"))[..., 3]
            assert 0 in meant and 255 in meant
            with Image.open(tmp_path / "out" / f"{index + 1}.png") as image:
                assert np.array_equal(np.array(image)[..., 3], meant)


def test_vp8_has_alpha_as_well(tmp_path: Path) -> None:
    clip = open_source(write_video(tmp_path / "in.webm", "libvpx", "yuva420p"), FileOptions())
    found = [alpha.numpy() for alpha in clip.alpha()]
    assert len(found) == COUNT
    assert max(np.abs(alpha - opaque_shares(index)).max() for index, alpha in enumerate(found)) < 0.1


def test_a_picture_that_stays_keeps_its_alpha() -> None:
    generator = torch.Generator().manual_seed(3)
    alpha, picture = (torch.rand(*shape, generator=generator) for shape in ((20, 30), (20, 30, 3)))
    assert (enlarge_alpha(alpha, picture, picture) - alpha).abs().max() < 1e-5


def on_black(index: int) -> tuple[Tensor, Tensor]:
    """A layer [1, H, W, 3] as it stands on black, and its alpha [1, H, W]."""
    stored = torch.from_numpy(layer(index)).float()[None] / 255
    return stored[..., :3] * stored[..., 3:], stored[..., 3]


@pytest.mark.parametrize("scale", [0.5, 1, 2, 3, 4])
def test_without_a_network_frames_in_memory_keep_alpha_and_colours(scale: float) -> None:
    """Alpha as it is enlarged alone; the colours that were straight before are so again."""
    straight = torch.from_numpy(layer(0)).float()[None] / 255
    prepared = prepare(straight, TargetSize("scale", scale=scale))
    colours, alpha = make_transparent(prepared.reference, prepared.reference, prepared.alpha)
    size = prepared.reference.shape[1:3]
    alone = F.interpolate(straight[None, ..., 3], size, mode="bilinear", antialias=True)[0]
    assert (alpha - alone).abs().max() < 1 / 255
    visible = alone > 2 / 255
    assert (colours - torch.tensor(COLOUR) / 255)[visible].abs().max() < 1 / 255
    assert (colours[alpha == 0] == 0).all()


def test_frames_in_memory_follow_the_edges_as_files_do() -> None:
    """The source is read off its enlarged form, and so is a little softer than a file's."""
    source, alpha = on_black(0)
    reference = prepare(source, TargetSize("scale", scale=4)).reference
    truth = torch.from_numpy(layer(0, 4 * HEIGHT, 4 * WIDTH)).float() / 255
    refined = truth[None, ..., :3] * truth[None, ..., 3:]
    _, (found,) = make_transparent(refined, reference, alpha)
    from_file = enlarge_alpha(alpha[0], source[0], refined[0])
    (alone,) = F.interpolate(alpha[None], refined.shape[1:3], mode="bilinear")[0]
    assert (found - from_file).abs().mean() < 0.2 * (alone - from_file).abs().mean()
    assert (found - truth[..., 3]).square().mean() < (alone - truth[..., 3]).square().mean()


def test_one_mask_may_serve_all_frames_and_another_number_is_refused() -> None:
    frames, alpha = torch.rand(3, 8, 8, 3), torch.rand(1, 8, 8)
    _, found = make_transparent(frames, frames, alpha)
    assert torch.allclose(found, alpha.expand(3, 8, 8))
    with pytest.raises(ValueError, match="alpha must have 1 frame, or as many as the clip, 3; got 2"):
        make_transparent(frames, frames, torch.rand(2, 8, 8))


def small(x: Tensor, factor: int = 4) -> Tensor:
    """Means over squares, [H, W, C]."""
    return F.avg_pool2d(x.movedim(-1, 0), factor).movedim(0, -1)


def test_alpha_follows_the_edges_that_were_drawn() -> None:
    """A quarter of the size, enlarged: nearer to the truth than alone, where the picture shows the edge."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    inside = ((y - 48) / 30) ** 2 + ((x - 60) / 44) ** 2 < 1
    inside &= ~((x > 50) & (x < 57) & (y < 48))  # a slit of seven pixels
    truth = inside.float()
    colours = torch.stack([0.6 + 0.2 * torch.sin(x / 9), 0.5 + 0.2 * torch.cos(y / 7), torch.full_like(x, 0.7)], dim=2)
    shown = colours * truth[..., None]
    alpha, source = small(truth[..., None])[..., 0], small(shown)
    found = enlarge_alpha(alpha, source, shown)
    alone = F.interpolate(alpha[None, None], (96, 128), mode="bilinear")[0, 0]
    assert (found - truth).square().mean() < 0.5 * (alone - truth).square().mean()
    deep_inside, far_outside = (F.max_pool2d(each[None], 25, 1, 12)[0] == 0 for each in (1 - truth, truth))
    assert (found[deep_inside] == 1).all() and (found[far_outside] == 0).all()


def test_a_refined_video_is_transparent_in_every_segment(tiny_networks: Networks, tmp_path: Path) -> None:
    source, target = write_pictures(tmp_path / "in", ".png"), tmp_path / "out" / "%04d.png"
    refine_video(tiny_networks, source, target, CHEAP, FileOptions(segment_chunks=1))
    for index in range(COUNT):
        with Image.open(tmp_path / "out" / f"{index + 1:04d}.png") as image:
            found = np.array(image)[..., 3] / 255.0
        truth = layer(index, 2 * HEIGHT, 2 * WIDTH)[..., 3] / 255.0
        assert found.shape == truth.shape
        # The network draws what it likes; that moves no edge by much, and a frame earlier or later is 4 pixels.
        assert np.abs(centre(found) - centre(truth)).max() < 1


def test_a_refined_still_is_transparent_where_its_kind_can_be(tiny_networks: Networks, tmp_path: Path) -> None:
    source, said = tmp_path / "in.png", []
    Image.fromarray(layer(0)).save(source)
    for ending in (".png", ".webp", ".tif", *([".avif"] if features.check("avif") else [])):
        refine_picture(tiny_networks, source, tmp_path / f"out{ending}", CHEAP, note=said.append)
        with Image.open(tmp_path / f"out{ending}") as image:
            found = np.array(image.convert("RGBA"))[..., 3]
        assert (found.min(), found.max()) == (0, 255)
    assert not any("transparency" in text for text in said)
    refine_picture(tiny_networks, source, tmp_path / "out.jpg", CHEAP, note=said.append)
    assert any("transparency gets lost" in text and ".png" in text for text in said)
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "RGB"


def test_a_clip_is_read_on_from_segment_to_segment() -> None:
    """A long one would be decoded from its start for each; one that is asked for again is read again."""
    begun = []

    class Counted:
        def frames(self, start: int = 0) -> Iterator[Tensor]:
            begun.append(start)
            return iter(torch.full((8 - start, 4, 6, 3), 0.5))

        def alpha(self, start: int = 0) -> Iterator[Tensor]:
            return (torch.full((4, 6), number / 8) for number in range(start, 8))

    added = AlphaLayer(Counted())
    refined = torch.full((2, 8, 12, 3), 0.5)
    for first in (2, 4, 6, 2):
        (chunk,) = added.add(first, [refined])
        assert [float(picture[..., 3].mean()) for picture in chunk] == [first / 8, (first + 1) / 8]
    assert begun == [2, 2]


def test_the_orientation_of_a_frame_turns_its_alpha_too() -> None:
    frame = av.VideoFrame.from_ndarray(layer(0), format="rgba")
    turned = orientation_of(frame, "qtrle")._replace(transposed=True)
    assert np.array_equal(alpha_of(frame, turned), alpha_of(frame).T)
