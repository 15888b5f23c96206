"""A long video in one node: what the graph of many nodes gives, piece by piece, and a run that can be cut off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from torch import Tensor

COUNT, HEIGHT, WIDTH, RATE, SOUND_RATE = 40, 48, 64, Fraction(24), 44100
WINDOWS = {"window": 17, "overlap": 8}
DETAIL_SIZE = 70
REFINING = {"strength": 675, "steps": 2, "cfg": 4.0, "shift": 2.5}
SIZE = {"size": "keep", "short_side": 1080, "scale": 4.0, "width": 64, "height": 48, "resample": "bilinear"}


def pictures(count: int = COUNT) -> Tensor:
    """A clip [count, HEIGHT, WIDTH, 3] in [0, 1]: waves of colour on the move."""
    t, y, x = torch.meshgrid(torch.arange(count), torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([((x + y * k + 3 * t) / 9 + k).sin() * 0.3 + 0.5 for k in range(3)], dim=-1)


def tone() -> dict[str, Any]:
    """As long as the clip, as an AUDIO."""
    samples = torch.arange(int(COUNT / RATE * SOUND_RATE))
    return {"waveform": (samples / 20).sin()[None, None], "sample_rate": SOUND_RATE}


@pytest.fixture(scope="module")
def in_memory() -> Any:
    """The clip as a VIDEO that has no file."""
    parts = Types.VideoComponents(images=pictures(), audio=tone(), frame_rate=RATE)
    return InputImpl.VideoFromComponents(parts)


@pytest.fixture(scope="module")
def video(in_memory: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The clip as a VIDEO from a file."""
    path = tmp_path_factory.mktemp("source") / "clip.mp4"
    in_memory.save_to(str(path))
    return InputImpl.VideoFromFile(str(path))


@pytest.fixture(scope="module")
def short_video(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Five frames as a VIDEO from a file."""
    path = tmp_path_factory.mktemp("source") / "short.mp4"
    parts = Types.VideoComponents(images=pictures(5), audio=None, frame_rate=RATE)
    InputImpl.VideoFromComponents(parts).save_to(str(path))
    return InputImpl.VideoFromFile(str(path))


@pytest.fixture(scope="module")
def networks(submodule: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Nano as MODEL and VAE, and both CONDITIONINGs."""
    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage2"))
    width = model.model.diffusion_model.config.text_dim
    context = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    return {
        "model": model,
        "vae": submodule("nodes.native.vae").load_vae_native("vae"),
        "positive": [[context, {}]],
        "negative": [[torch.zeros_like(context), {}]],
    }


@pytest.fixture(scope="module")
def refine(comfy_nodes: dict[str, Any], networks: dict[str, Any]) -> Callable[..., Path]:
    """Run the node; returns the file behind its VIDEO."""

    def run(video: Any, **changes: Any) -> Path:
        finishing = {"color_match": "wavelet", "detail_size": DETAIL_SIZE}
        choices = {**SIZE, **REFINING, **WINDOWS, "seed": 5, **finishing, **changes}
        with torch.inference_mode():
            output = comfy_nodes["FlashVideoRefineLongVideo"].execute(**{**networks, "video": video, **choices})
        return Path(output.result[0].get_stream_source())

    return run


def sound(path: Path) -> list[tuple[bytes, Fraction]]:
    """The packets of sound and their times."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [(bytes(packet), packet.pts * packet.time_base) for packet in packets]


def through_the_graph(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType], networks: dict[str, Any], images: Tensor
) -> Tensor:
    """The clip through the nodes one by one, on the noise that the long way uses."""

    def call(name: str, **inputs: Any) -> tuple[Any, ...]:
        return comfy_nodes[f"FlashVideo{name}"].execute(**inputs).result

    with torch.inference_mode():
        prepared, reference, _ = call("PrepareFrames", images=images, **SIZE)
        latent = networks["vae"].encode(prepared)
        frame_noise = submodule("flashvideo.refiner.windows").frame_noise
        shape = (latent.shape[1], *latent.shape[3:])
        noise = torch.stack([frame_noise(shape, 5, index) for index in range(latent.shape[2])], dim=1)[None]
        degraded = submodule("nodes.native.degradation").degrade({"samples": latent}, noise, REFINING["strength"])
        texts = {name: networks[name] for name in ("model", "positive", "negative")}
        settings = {name: REFINING[name] for name in ("steps", "cfg", "shift")}
        refined = call("Stage2Refiner", **texts, latent=degraded, **settings, solver="euler", **WINDOWS)[0]
        images = networks["vae"].decode(refined["samples"])[0]
        finishing = {"color_match": "wavelet", "detail_size": DETAIL_SIZE}
        return call("FinishFrames", images=images, reference=reference, **finishing)[0]


def test_a_video_comes_out_as_from_the_graph_with_its_times_and_sound(
    refine: Callable[..., Path],
    video: Any,
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    networks: dict[str, Any],
    progress: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = refine(video)
    assert path.parent == Path(folder_paths.get_temp_directory())
    assert progress["values"] == sorted(progress["values"])
    assert progress["values"][-1] == 1
    found = InputImpl.VideoFromFile(str(path)).get_components()
    source = video.get_components()
    assert found.images.shape == (COUNT, HEIGHT, WIDTH, 3)
    assert found.frame_rate == RATE
    assert sound(path) == sound(Path(video.get_stream_source()))

    files = submodule("flashvideo.video_files")
    expected = through_the_graph(comfy_nodes, submodule, networks, source.images)
    form = files.VideoFormat(files.open_clip(Path(video.get_stream_source())), HEIGHT, WIDTH)
    segment = files.encode_segment([(expected * 255).round().byte()], form)
    files.write_video(tmp_path / "expected.mp4", form, [segment])
    compressed = InputImpl.VideoFromFile(str(tmp_path / "expected.mp4")).get_components().images
    # Between the two lie latents kept in half precision, and compression that takes one grain for another.
    far = float((compressed - source.images).abs().mean())
    near = float((found.images - compressed).abs().mean())
    assert near < far / 8, (near, far)


def test_a_run_that_was_cancelled_goes_on_where_it_was(
    refine: Callable[..., Path], video: Any, progress: dict[str, Any]
) -> None:
    path = refine(video)
    whole = path.read_bytes()
    unfinished = Path(folder_paths.get_output_directory()) / "flashvideo-unfinished"
    assert list(unfinished.iterdir()) == []
    assert refine(video) == path  # made before: nothing to do
    path.unlink()

    progress["stop"], progress["values"] = 0.5, []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        refine(video)
    assert any(0.02 < value < 0.2 for value in progress["values"])  # where encoding is
    assert not path.exists()
    assert len(list(unfinished.iterdir())) == 1

    progress["stop"], progress["values"] = float("inf"), []
    assert refine(video) == path
    assert not any(0.02 < value < 0.2 for value in progress["values"])  # nothing was encoded again
    assert path.read_bytes() == whole
    assert list(unfinished.iterdir()) == []


def test_a_video_in_memory_is_copied_without_loss(
    in_memory: Any, submodule: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = submodule("nodes.native.video_source")
    path, copied = module.source_file(in_memory, tmp_path)
    before = path.stat().st_mtime_ns
    assert copied
    assert module.source_file(in_memory, tmp_path) == (path, True) and path.stat().st_mtime_ns == before
    clip = submodule("flashvideo.video_files").open_clip(path)
    assert clip.rate == RATE
    expected = (pictures() * 255).round().byte()
    assert np.array_equal(torch.stack(list(clip.frames())).numpy(), expected.numpy())
    with av.open(str(path)) as container:
        assert abs(container.duration / av.time_base - COUNT / RATE) < 0.05
    assert module.sound_suffix(path) == ".mp4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vae": object()}, "vae must come from Load FlashVideo VAE"),
        ({"window": 16}, "a window must have 4n\\+1 frames .* got 16"),
        ({"positive": []}, "positive is empty; connect FlashVideo Prompt"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(
    refine: Callable[..., Path], video: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^FlashVideo Refine Long Video: {words}"):
        refine(video, **changes)


def test_detail_size_auto_is_that_of_the_model_and_is_shown(
    refine: Callable[..., Path], short_video: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cheap = {"steps": 1, "cfg": 1.0}
    with caplog.at_level(logging.INFO):
        automatic = refine(short_video, detail_size=0, **cheap)
    assert "FlashVideo Refine Long Video: detail size 9 (auto, for FlashVideo-Nano)" in caplog.text
    by_hand = refine(short_video, detail_size=9, **cheap)
    assert automatic != by_hand and automatic.read_bytes() == by_hand.read_bytes()


def test_a_codec_of_10_bits_is_written_and_save_video_keeps_it(
    refine: Callable[..., Path], short_video: Any, tmp_path: Path
) -> None:
    cheap = {"steps": 1, "cfg": 1.0}
    plain, *deep = (refine(short_video, **cheap, **codec) for codec in ({}, {"codec": "hevc"}, {"codec": "av1"}))
    assert refine(short_video, codec="h264", **cheap) == plain
    for path, names in [(plain, ("h264",)), (deep[0], ("hevc",)), (deep[1], ("av1", "libdav1d"))]:
        saved = tmp_path / path.name
        InputImpl.VideoFromFile(str(path)).save_to(str(saved))
        for each in (path, saved):
            with av.open(str(each)) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name in names
                assert stream.pix_fmt == ("yuv420p" if path == plain else "yuv420p10le")
        difference = (decoded(saved) - decoded(plain)).abs()
        assert difference.mean() < 5 / 255


def test_hdr_stays_hdr_with_10_bits(refine: Callable[..., Path]) -> None:
    source = Path(__file__).resolve().parents[1] / "data" / "media" / "hdr_pq.mp4"
    path = refine(InputImpl.VideoFromFile(str(source)), steps=1, cfg=1.0, codec="hevc")
    streams = []
    for file in (source, path):
        with av.open(str(file)) as container:
            context = container.streams.video[0].codec_context
            streams.append((context.color_trc, context.color_primaries, context.format.components[0].bits))
    assert streams[0] == streams[1]
    assert streams[1][0] == 16  # PQ
    assert streams[1][2] == 10


def decoded(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return (
            torch.stack([torch.tensor(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]).float() / 255
        )


@pytest.mark.parametrize("is_nano", [True, False])
def test_strength_auto_suits_the_model_and_the_result_and_is_shown(
    is_nano: bool,
    refine: Callable[..., Path],
    short_video: Any,
    other_model: Any,
    submodule: Callable[[str], ModuleType],
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen, reason = submodule("flashvideo.degradation").auto_strength(HEIGHT, WIDTH), f"{WIDTH}x{HEIGHT}"
    cheap = {"steps": 1, "cfg": 1.0, "color_match": "none"}
    if is_nano:
        chosen, reason = submodule("flashvideo.config").NANO_STRENGTH, "FlashVideo-Nano"
    else:
        cheap["model"] = other_model
    with caplog.at_level(logging.INFO):
        automatic = refine(short_video, strength=-1, **cheap)
    assert f"FlashVideo Refine Long Video: strength {chosen} (auto, for {reason})" in caplog.text
    by_hand = refine(short_video, strength=chosen, **cheap)
    assert automatic.read_bytes() == by_hand.read_bytes()
    assert (automatic == by_hand) == is_nano  # a run is known by its settings: Nano's are a number, others' of a size


def test_a_preset_takes_the_place_of_its_numbers_which_are_shown(
    refine: Callable[..., Path],
    short_video: Any,
    other_model: Any,
    submodule: Callable[[str], ModuleType],
    caplog: pytest.LogCaptureFixture,
) -> None:
    strength = submodule("flashvideo.degradation").auto_strength(HEIGHT, WIDTH, strength=675)
    numbers = {"strength": strength, **submodule("flashvideo.presets").PRESETS["fast"].sampling}
    with caplog.at_level(logging.INFO):
        chosen = refine(short_video, model=other_model, preset="fast", strength=900, steps=1, cfg=2.0, shift=7.0)
    assert "FlashVideo Refine Long Video: preset fast: steps 3, cfg 1, shift 2.5" in caplog.text
    assert f"FlashVideo Refine Long Video: strength {strength} (auto, for {WIDTH}x{HEIGHT})" in caplog.text
    by_hand = refine(short_video, model=other_model, **numbers)
    assert chosen != by_hand and chosen.read_bytes() == by_hand.read_bytes()
    assert refine(short_video, model=other_model, preset="custom", **numbers) == by_hand
