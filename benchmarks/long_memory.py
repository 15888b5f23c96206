"""Does memory stay where it is while a long video is refined? `python benchmarks/long_memory.py`

Writes a procedural video of --minutes at --rate frames a second, refines it with FlashVideo-Nano in this process, from
file to file as the command does but without making it larger, and prints the most resident memory after a piece of work
in every minute of the video, phase by phase. One step without guidance: how often a window is evaluated doesn't change
what is held.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from common import MIB, ROOT, add_options, load_library, report

load_library()

import av  # noqa: E402
import torch  # noqa: E402

from flashvideo.checkpoints import load_dit, load_vae  # noqa: E402
from flashvideo.config import NANO_STRENGTH, TEXT_TOKENS  # noqa: E402
from flashvideo.devices import return_memory  # noqa: E402
from flashvideo.frames import TargetSize  # noqa: E402
from flashvideo.nano import nano_state  # noqa: E402
from flashvideo.refiner.files import READ, refine_video  # noqa: E402
from flashvideo.refiner.run import DECODE, ENCODE, REFINE, Networks, RefineSettings  # noqa: E402

PHASES = (READ, ENCODE, REFINE, DECODE)
SECONDS = 60  # a minute
STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=5)
    parser.add_argument("--rate", type=int, default=8, help="frames a second")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves them to PyTorch")
    parser.add_argument("--plain-allocator", action="store_true", help="leave the C library's allocator as it comes")
    add_options(parser)
    options = parser.parse_args()
    returned = not options.plain_allocator and return_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.mp4"
        write_clip(source, options.minutes * SECONDS * options.rate, options)
        held = refine(source, source.with_name("out.mp4"), options)
    rows = []
    for phase in PHASES:
        minutes = [max(held[phase, minute], default=0) / MIB for minute in range(options.minutes)]
        rows.append([phase, *minutes, 100 * (minutes[-1] / minutes[0] - 1)])
    report(
        f"Resident memory between pieces of work, {options.minutes} minutes of {options.width}x{options.height}, MiB",
        ["phase", *(f"minute {minute + 1}" for minute in range(options.minutes)), "growth, %"],
        rows,
        device=options.device,
        facts={"frames": options.minutes * SECONDS * options.rate, "large blocks returned at once": returned},
        target=options.json,
    )


def write_clip(path: Path, count: int, options: argparse.Namespace) -> None:
    """A drifting pattern with noise, so that the file is as large as a real one."""
    height, width = options.height, options.width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=options.rate, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(count):
            waves = torch.stack([(rows * a + columns * b + 3 * index) % 256 for a, b in ((1, 2), (2, 1), (1, 1))], -1)
            noise = torch.randint(0, 24, waves.shape, generator=generator)
            picture = (waves * 0.9 + noise).clamp(0, 255).byte().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def refine(source: Path, target: Path, options: argparse.Namespace) -> dict[tuple[str, int], list[int]]:
    """Resident bytes at every report of progress, by phase and minute of the video."""
    device = torch.device(options.device)
    dit = load_dit(nano_state("stage2"), dtype=torch.float32, stage=2)
    vae = load_vae(nano_state("vae"), dtype=torch.float32)
    networks = Networks(dit, vae, torch.zeros(1, TEXT_TOKENS, dit.config.text_dim), device)
    settings = RefineSettings(TargetSize("keep"), strength=NANO_STRENGTH, steps=1, cfg=1.0)
    held: dict[tuple[str, int], list[int]] = defaultdict(list)
    lines = itertools.count(1)

    def note(phase: str, done: float, total: int) -> None:
        minute = min(int(options.minutes * (done - 1e-6) / max(total, 1)), options.minutes - 1)
        held[phase, max(minute, 0)].append(resident())
        if phase != READ and next(lines) % 20 == 0:
            sys.stderr.write(f"{phase} {done:.0f}/{total}: {resident() / MIB:.0f} MiB\n")

    refine_video(networks, source, target, settings, on_progress=note)
    return held


def resident() -> int:
    """Bytes of this process that are in memory."""
    fields = (line.split() for line in STATUS.read_text().splitlines())
    return next(int(field[1]) * 1024 for field in fields if field[0] == "VmRSS:")


if __name__ == "__main__":
    if not STATUS.exists():
        raise SystemExit("this benchmark reads memory from /proc: run it on Linux")
    if not (ROOT / "models" / "nano").is_dir():
        raise SystemExit("this benchmark needs FlashVideo-Nano's weights in models/nano")
    main()
