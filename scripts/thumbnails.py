"""Remake the pictures of the template browser: run each workflow on FlashVideo-Nano and show the result.

    python scripts/thumbnails.py [WORDS ...]

Writes `workflows/NAME.jpg` beside each `workflows/NAME.json`; WORDS pick the workflows whose name contains one of them.
*Text to Video* also gives the README its moving picture, `docs/demo.webp`.
Workflows that refine a clip get a procedural scene, as FlashVideo-Nano knows them, scaled down to a draft's size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import set_up
from harness.bed import ROOT, Bed, say, seconds

if TYPE_CHECKING:
    from PIL import Image

SIDE = 512
_QUALITY = 85
_CLIP, _CLIP_SIZE, _SCALE = "scene.mp4", (112, 64), 4
_FRAMES, _RATE = 17, 8
# Seeds of the scenes, by a word of the workflow's name, so that the pictures differ.
_SCENES = {"Wan": 106, "LTX": 126, "Hunyuan": 168, "Long": 116, "Compare": 129, "Region": 126}
_OTHER_SCENE = 138
_LINE = 4  # pixels of the line between before and after
_FILM, _FILM_OF = ROOT / "docs" / "demo.webp", "Text to Video"


def main() -> int:
    """Command line; returns the exit code."""
    arguments = _arguments()
    return set_up.run_inside(__file__, lambda: _make_all(arguments.words))


def _make_all(words: Sequence[str]) -> None:
    """Run the workflows on one server. The imports inside functions need the bed's Python, in which this now runs."""
    from harness.comfy_server import ComfyServer
    from harness.workflow_files import shipped

    files = [path for path in shipped() if not words or any(word.lower() in path.stem.lower() for word in words)]
    bed = Bed.load()
    if bed is None or not files:
        raise RuntimeError("No workflow has such a name." if bed else "The ComfyUI in .bed/ is not complete.")
    with ComfyServer(bed, bed.base) as server:
        for path in files:
            seed = next((seed for word, seed in _SCENES.items() if word in path.stem), _OTHER_SCENE)
            spent = _make(server, path, _write_scene(server.input / _CLIP, seed))
            say(f"{path.stem}: {seconds(spent)}")


def _make(server: Any, path: Path, text: str) -> float:
    """Run one workflow and write its picture; returns the seconds of the run."""
    from harness.workflow_files import committed
    from harness.workflow_runs import run_workflow

    file = committed(path, own_clip=True)
    run = run_workflow(server, file, lambda _line: None, adjust=lambda prompt: _use_scene(prompt, text))
    outputs = {Path(prefix).name: paths[0] for prefix, paths in run.files.items()}
    if "after" in path.stem:  # the clip stands in for what another model would have made
        outputs["draft"] = server.input / _CLIP
    _picture(outputs).save(path.with_suffix(".jpg"), quality=_QUALITY, optimize=True)
    if _FILM_OF in path.stem:
        _film(outputs["draft"], outputs["refined"])
    return run.seconds


def _use_scene(prompt: dict[str, Any], text: str) -> None:
    """Let the workflow's video loaders load the scene, and its prompt say what the scene shows."""
    loaders = [node for node in prompt.values() if node["class_type"] in ("LoadVideo", "FlashVideoExampleClip")]
    for node in loaders:
        node |= {"class_type": "LoadVideo", "inputs": {"file": _CLIP}}
    for node in prompt.values():
        if loaders and node["class_type"] == "FlashVideoTextEncode":
            node["inputs"]["text"] = text


def _write_scene(target: Path, seed: int) -> str:
    """Write a procedural scene as a small clip; returns what it shows."""
    import av
    from PIL import Image

    sys.path.append(str(ROOT))  # last, so that nothing of the pack hides another module
    from flashvideo.training.scenes.captions import caption
    from flashvideo.training.scenes.rendering import render
    from flashvideo.training.scenes.stream import random_scene

    scene = random_scene(seed, "validation")
    width, height = _CLIP_SIZE
    video = render(scene, _FRAMES, height * _SCALE, width * _SCALE)
    frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            small = Image.fromarray(frame).resize(_CLIP_SIZE, Image.Resampling.BILINEAR)
            container.mux(stream.encode(av.VideoFrame.from_image(small)))
        container.mux(stream.encode(None))
    return caption(scene, seed)


def _picture(outputs: dict[str, Path]) -> Image.Image:
    """A square picture of what a workflow saved, by the last part of the files' prefix."""
    makers: tuple[tuple[tuple[str, ...], Callable[..., Image.Image]], ...] = (
        (("grid",), _four_squares),
        (("side-by-side",), lambda pair: _split(*_halves(pair))),
        (("draft", "refined"), _split),
        (("refined",), _square),
        (("draft",), _square),
    )
    for names, make in makers:
        if all(name in outputs for name in names):
            return make(*(_middle_frame(outputs[name]) for name in names))
    raise RuntimeError(f"The workflow saved nothing to show, only {', '.join(outputs) or 'nothing'}.")


def _middle_frame(file: Path) -> Image.Image:
    from harness.contact_sheet import read_frames
    from PIL import Image

    if file.suffix == ".png":
        return Image.open(file).convert("RGB")
    frames = read_frames(file)
    return frames[len(frames) // 2]


def _square(picture: Image.Image, side: int = SIDE) -> Image.Image:
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)


def _halves(pair: Image.Image) -> tuple[Image.Image, Image.Image]:
    middle = pair.width // 2
    return pair.crop((0, 0, middle, pair.height)), pair.crop((middle, 0, pair.width, pair.height))


def _split(before: Image.Image, after: Image.Image) -> Image.Image:
    """The left half of one picture and the right half of the other, with a line between."""
    picture, right = _square(before), _square(after)
    middle = SIDE // 2
    picture.paste(right.crop((middle, 0, SIDE, SIDE)), (middle, 0))
    picture.paste((255, 255, 255), (middle - _LINE // 2, 0, middle + _LINE // 2, SIDE))
    return picture


def _film(draft: Path, refined: Path) -> None:
    """Write the README's moving picture: the draft, enlarged, and beside it what was made of it."""
    from harness.contact_sheet import read_frames
    from PIL import Image

    pictures = []
    for before, after in zip(read_frames(draft), read_frames(refined), strict=True):
        picture = Image.new("RGB", (2 * after.width + _LINE, after.height), "white")
        picture.paste(before.resize(after.size, Image.Resampling.BICUBIC))
        picture.paste(after, (after.width + _LINE, 0))
        pictures.append(picture)
    pictures[0].save(
        _FILM, save_all=True, append_images=pictures[1:], duration=1000 // _RATE, loop=0, quality=_QUALITY, method=6
    )


def _four_squares(grid: Image.Image) -> Image.Image:
    """A grid of two by two wide pictures as one of square ones."""
    from PIL import Image

    width, height, side = grid.width // 2, grid.height // 2, SIDE // 2
    picture = Image.new("RGB", (SIDE, SIDE))
    for row in range(2):
        for column in range(2):
            left, top = column * width, row * height
            cell = grid.crop((left, top, left + width, top + height))
            picture.paste(_square(cell, side), (column * side, row * side))
    return picture


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the template browser's pictures from real runs.")
    parser.add_argument("words", nargs="*", help="only workflows whose name contains one of these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
