"""`python -m flashvideo ablate [TABLE ...]`: measures tables, and writes the page about them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .lab import Lab
    from .settings import AblationSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "ablations"
NAMES = ("acceptance", "table3", "table4", "table5", "table6", "table7", "table8", "table10")
SIGNAL_EXIT = 128  # plus the signal's number is the exit code of a program that a signal ended
CANCELLED = 130
MINUTE = 60.0


def add_ablate(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "ablate", help="repeat the paper's tables with FlashVideo-Nano, and write docs/ablations.md",
        description="What is finished is skipped, what was begun goes on: run it again until it says that it is done.",
    )  # fmt: skip
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="TOML file with all settings (default: configs/ablations/full.toml with an accelerator, else small.toml)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of what is kept (default: the config's `out`)")
    parser.add_argument("--docs", type=Path, metavar="DIR", default=Path("docs"), help="where the page is written")
    parser.add_argument("--clip", type=Path, metavar="FILE", help="a real video to measure on, besides the scenes")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; run it again to go on")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--tokenizer", metavar="FILE", help="T5's tokenizer.json (default: the one in ComfyUI)")
    parser.set_defaults(run=_ablate)


def _ablate(options: argparse.Namespace) -> int:
    # Imported here, so that the other commands start at once.
    from ...devices import open_device
    from ..errors import TrainingError
    from .lab import Lab
    from .measures import library
    from .variants import Deadline, Paused

    if unknown := [name for name in options.tables if name not in NAMES]:
        raise TrainingError(f"There is no table {unknown[0]!r}; there are {', '.join(NAMES)}.")
    library("metrics")  # says at once if scikit-image is missing
    device = open_device(options.device)
    settings = _settings(options, device)
    lab = Lab(settings, device, options.clip, Deadline.after(options.minutes))
    code = 0
    try:
        _measure(lab, options.tables or NAMES)
    except Paused as pause:
        code = 0 if pause.signal_number is None else SIGNAL_EXIT + pause.signal_number
        sys.stdout.write("Stopped; the same command goes on from here.\n")
    except KeyboardInterrupt:
        code = CANCELLED
        sys.stdout.write("\nStopped; the same command goes on from here.\n")
    finally:  # also where a table can't be measured: the others are whole
        _write(settings, options.docs)
    return code


def _settings(options: argparse.Namespace, device: torch.device) -> AblationSettings:
    from ..config import build, load_toml
    from .settings import AblationSettings

    config = options.config or CONFIGS / ("small.toml" if device.type == "cpu" else "full.toml")
    settings: Any = build(AblationSettings, load_toml(config), config.name)
    if options.out:
        settings = dataclasses.replace(settings, out=options.out)
    if options.tokenizer:
        shipped = dataclasses.replace(settings.shipped, tokenizer=options.tokenizer)
        settings = dataclasses.replace(settings, shipped=shipped)
    return settings


def _measure(lab: Lab, names: tuple[str, ...] | list[str]) -> None:
    """Measure tables one after the other, each kept as soon as it is whole."""
    from .acceptance import held_out_report
    from .document import sentence
    from .tables import TABLES

    for name in names:
        started = time.monotonic()
        sys.stdout.write(f"{name}\n")
        if name == "acceptance":
            held_out_report(lab)
        else:
            table = TABLES[name](lab)
            table.save(lab.settings.out / "tables")
            for finding in table.findings(table.procedural):
                sys.stdout.write(f"  {'holds' if finding.holds else 'DOES NOT HOLD'}: {sentence(finding)}\n")
        sys.stdout.write(f"{name}: done in {(time.monotonic() - started) / MINUTE:.1f} minutes\n")


def _write(settings: AblationSettings, docs: Path) -> None:
    from .document import write_document
    from .lab import shipped_weights
    from .results import TableResult

    paths = [settings.out / "tables" / f"{name}.json" for name in NAMES]
    tables = [TableResult.load(path) for path in paths if path.is_file()]
    if tables:
        page = write_document(docs, tables, settings.notes, shipped_weights(settings.shipped))
        missing = [path.stem for path in paths if not path.is_file()]
        rest = f"; not measured here, left as they stand: {', '.join(missing)}" if missing else ""
        sys.stdout.write(f"{page}: {len(tables)} tables{rest}\n")
