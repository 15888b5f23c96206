"""`python -m flashvideo ablate [TABLE ...]`: measures tables, and writes the page about them."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...arguments import duration, positive, whole

if TYPE_CHECKING:
    import torch

    from .lab import Lab
    from .settings import AblationSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "ablations"
NAMES = (
    "quality", "acceptance", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "guidance",
    "table10", "time", "figure1",
)  # fmt: skip
MINUTE = 60.0


def add_ablate(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "ablate",
        description="Finished pieces are skipped, interrupted ones resume: run it again until it says that it is done.",
    )  # fmt: skip
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="TOML file with all settings (default: configs/ablations/full.toml with an accelerator, else small.toml)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of what is kept (default: the config's `out`)")
    parser.add_argument("--docs", type=Path, metavar="DIR", default=Path("docs"), help="where the page is written")
    parser.add_argument("--clip", type=Path, metavar="FILE", help="a real video to measure beside the scenes")
    parser.add_argument(
        "--real", type=Path, metavar="DIR",
        help="folder of real videos, or a clip library of `train fetch`: the clips of the table `quality`",
    )  # fmt: skip
    parser.add_argument("--strength", type=whole, help="of the table `quality` (default: the config's)")
    parser.add_argument("--steps", type=positive, help="evaluations of the table `quality` (default: the config's)")
    parser.add_argument("--minutes", type=duration, metavar="M", help="stop after M minutes; run it again to resume")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--tokenizer", metavar="FILE", help="T5's tokenizer.json (default: the pack's)")
    parser.set_defaults(run=_ablate)


def _ablate(options: argparse.Namespace) -> int:
    # Imported here, so that the other commands start at once.
    from ...devices import open_device
    from ...errors import exit_code
    from ..errors import TrainingError
    from .lab import Lab
    from .measures import library
    from .quality import KEY as QUALITY
    from .quality import gathered
    from .variants import Deadline, Paused

    if unknown := [name for name in options.tables if name not in NAMES]:
        raise TrainingError(f"There is no table {unknown[0]!r}; there are {', '.join(NAMES)}.")
    library("metrics")  # says at once if scikit-image is missing
    device = open_device(options.device)
    settings = _settings(options, device)
    real = gathered(options.real) if options.real else ()
    tables = options.tables or [name for name in NAMES if real or name != QUALITY]
    lab = Lab(settings, device, options.clip, Deadline.after(options.minutes), real)
    code = 0
    try:
        _measure(lab, tables)
    except Paused as pause:
        code = exit_code(pause.signal_number)
        sys.stdout.write("Stopped. Run the same command again to resume.\n")
    except KeyboardInterrupt:
        code = exit_code(signal.SIGINT)
        sys.stdout.write("\nStopped. Run the same command again to resume.\n")
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
    wanted = {name: getattr(options, name) for name in ("strength", "steps") if getattr(options, name) is not None}
    return dataclasses.replace(settings, quality=dataclasses.replace(settings.quality, **wanted))


def _measure(lab: Lab, names: tuple[str, ...] | list[str]) -> None:
    """Measure tables one after the other, each kept as soon as it is whole."""
    from .acceptance import held_out_report
    from .document import sentence
    from .quality import quality_report
    from .tables import TABLES

    reports = {"acceptance": held_out_report, "quality": quality_report, "figure1": _print_figure}

    for name in names:
        started = time.monotonic()
        sys.stdout.write(f"{name}\n")
        if name in reports:
            reports[name](lab)
        else:
            table = TABLES[name](lab)
            table.save(lab.settings.out / "tables")
            for finding in table.findings(table.procedural):
                sys.stdout.write(f"  {'holds' if finding.holds else 'DOES NOT HOLD'}: {sentence(finding)}\n")
        sys.stdout.write(f"{name}: done in {(time.monotonic() - started) / MINUTE:.1f} minutes\n")


def _print_figure(_lab: Lab) -> None:
    from .figure1 import text

    sys.stdout.write(text())


def _write(settings: AblationSettings, docs: Path) -> None:
    from . import figure1
    from .document import Section, write_document
    from .lab import shipped_weights
    from .results import TableResult

    paths = [settings.out / "tables" / f"{name}.json" for name in NAMES if name != "figure1"]
    tables = [TableResult.load(path) for path in paths if path.is_file()]
    if tables:
        figure = Section(figure1.TITLE, *figure1.agreement(), figure1.text())
        page = write_document(docs, tables, settings.notes, shipped_weights(settings.shipped), [figure])
        missing = [path.stem for path in paths if not path.is_file()]
        rest = f"; not measured here, left as they stand: {', '.join(missing)}" if missing else ""
        sys.stdout.write(f"{page}: {len(tables)} tables{rest}\n")
