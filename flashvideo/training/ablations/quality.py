"""What people see first: the shipped models on real clips that no training saw, against what is aimed at.

`python -m flashvideo ablate quality --real DIR` measures every clip of a folder, or those of a clip library that
are held out: the VAE alone, and the whole chain of the refiner from a draft of a quarter of the sides, beside bicubic.
Nothing here may be tuned to a result: aims and measures were written down on 28 November 2026, before the networks
that they are for were trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.clip_library import FRAMES, INDEX, ClipLibrary
from ..data.decoding import ENDINGS, PICTURE_ENDINGS, UndecodableError, picture_count
from ..data.held_out import TEST, VALIDATION, split_of
from ..data.latents import ClipSettings
from ..errors import TrainingError
from ..loop.checkpointing import write_whole
from .acceptance import BICUBIC, CODED_TRUTH, REFINED, Check
from .clips import RealClip, Suite, usable
from .evaluation import CODED, TRUTH, Method
from .lab import Lab
from .measures import METRICS
from .no_reference import missing_packages
from .pages import save_sheets
from .results import TableResult

KEY = "quality"
ONCE = "refined, 1 evaluation"
PER_CLIP = ("psnr", "gradient_error", "flicker", "lines", "colour_error", "brisque", "piqe")
VAE_MEAN, VAE_WORST = 27.0, 23.0  # dB
BETTER_ON = 0.9  # of the clips, by BRISQUE and PIQE
LESS_GRADIENT_ERROR = 35.0  # percent below bicubic's
PSNR_LOSS, PSNR_LOSS_ONCE = 1.0, 0.3  # dB below bicubic, with the usual evaluations and with one
FLICKER = 1.05  # times bicubic's
LOW_BAND = 1.0  # Delta E to the truth that refining may add to broad areas
LOW_BAND_SLACK = 0.05  # Delta E that rounding to 8 bits may cost
LINES = 2.0  # levels above bicubic's worst row or column


def quality(lab: Lab) -> TableResult:
    """Measure all real clips that the lab was given. Raises TrainingError if there are none."""
    if not lab.real_clips:
        raise TrainingError("The table `quality` is of real clips: name their folder with --real.")
    settings = lab.settings.quality
    source = ClipSettings(settings.height, settings.width, settings.frames, clips=1)
    clips = usable(lab.real_clips, source)
    if not clips:
        raise TrainingError(f"None of the {len(lab.real_clips)} clips can be measured: the lines above say why.")
    suite = Suite(source, 0, settings.draft, clips)
    refined = lab.refiner(steps=settings.steps, strength=settings.strength, cfg=settings.cfg)
    ways = {
        "truth": Method(TRUTH),
        CODED_TRUTH: Method(CODED),
        BICUBIC: Method("bicubic"),
        REFINED: refined,
        ONCE: dataclasses.replace(refined, steps=1),
    }
    rows = lab.rows([*ways.items()], suite)
    about = (
        "Real clips, scaled to one size and shrunk to a quarter of its sides; the whole chain of the refiner graph "
        "against bicubic enlargement. BRISQUE and PIQE need no truth and take a mosaic for detail: "
        "they count only together with the rows beside them."
    )
    strength = refined.strength_at(settings.height, settings.width)
    facts = {"strength": str(strength), "evaluations": str(settings.steps), "guidance": f"{settings.cfg:g}"}
    return TableResult(
        key=KEY,
        title="Real clips",
        about=about,
        procedural=[],
        real=suite.names,
        metrics=[*rows[0].clips[suite.names[0]]],
        rows=rows,
        claims=[],
        shown=[*ways],
        facts=lab.facts(**lab.clip_facts(suite), **facts),
    )


def quality_report(lab: Lab) -> list[Check]:
    """Measure, keep the table and a sheet of pictures for each clip, and print each clip's numbers and the aims."""
    table = quality(lab)
    out = lab.settings.out
    table.save(out / "tables")
    save_sheets(table, out / "sheets" / KEY)
    results = aims(table)
    sys.stdout.write(clip_table(table) + "".join(f"  {check}\n" for check in results))
    sys.stdout.write(f"  Look at every sheet: {out / 'sheets' / KEY}\n")
    text = json.dumps([dataclasses.asdict(check) for check in results], indent=1, ensure_ascii=False)
    write_whole(out / f"{KEY}.json", lambda file: file.write(text.encode()))
    return results


def gathered(folder: Path) -> tuple[RealClip, ...]:
    """The clips of a library that no training takes, or all videos and animations of a folder, frame by frame.

    A caption is read from the text file beside a video. Raises TrainingError if there are none.
    """
    if (folder / INDEX).is_file():
        library = ClipLibrary.open(folder)
        kept = [clip for clip in library.clips.values() if clip.frames > 1 and clip.split in (VALIDATION, TEST)]
        clips = [
            RealClip(folder / FRAMES / clip.file, caption=clip.caption, rate=None, label=Path(clip.name).stem)
            for clip in sorted(kept, key=lambda each: each.name)
        ]
    elif folder.is_dir():
        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and _moves(path)]
        clips = [RealClip(path, caption=_caption(path), rate=None) for path in files]
        if known := sum(split_of(path.name) not in (VALIDATION, TEST) for path in files):
            sys.stdout.write(f"  {known} of these {len(files)} files may have been trained on, if they were fetched.\n")
    else:
        raise TrainingError(f"{folder}: there is no such folder of clips.")
    if not clips:
        raise TrainingError(f"{folder} holds no clips that can be judged on.")
    return _named(clips)


def _moves(path: Path) -> bool:
    """Whether a file may be a video or an animation, not a still."""
    if path.suffix.lower() not in PICTURE_ENDINGS:
        return path.is_file()
    try:
        return picture_count(path) > 1
    except UndecodableError:
        return False


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""


def _named(clips: Sequence[RealClip]) -> tuple[RealClip, ...]:
    """The clips, each with a different name."""
    seen: dict[str, int] = {}
    named = []
    for clip in clips:
        seen[clip.name] = number = seen.get(clip.name, 0) + 1
        named.append(dataclasses.replace(clip, label=f"{clip.name} ({number})") if number > 1 else clip)
    return tuple(named)


def clip_table(table: TableResult) -> str:
    """One line a clip: the VAE's PSNR, then bicubic and refined side by side."""
    head = ["clip", "VAE PSNR", *(METRICS[name].label.split(",")[0] for name in PER_CLIP)]
    lines = ["  " + " | ".join(head) + "   (bicubic / refined)"]
    vae, bicubic, refined = (table.row(label).clips for label in (CODED_TRUTH, BICUBIC, REFINED))
    for name in table.real:
        pairs = [f"{bicubic[name][metric]:.2f} / {refined[name][metric]:.2f}" for metric in PER_CLIP]
        lines.append("  " + " | ".join([name, f"{vae[name]['psnr']:.2f}", *pairs]))
    return "\n".join(lines) + "\n"


def aims(table: TableResult) -> list[Check]:
    """The aims, and their results."""
    clips = table.real
    vae = [table.row(CODED_TRUTH).clips[name]["psnr"] for name in clips]
    bicubic, refined, once = (table.row(label).mean(clips) for label in (BICUBIC, REFINED, ONCE))
    less = 100 * (1 - refined["gradient_error"] / max(bicubic["gradient_error"], 1e-9))
    losses = [bicubic["psnr"] - each["psnr"] for each in (refined, once)]
    cast = refined["colour_error"] - bicubic["colour_error"]
    worst = [max(table.row(label).clips[name]["lines"] for name in clips) for label in (BICUBIC, REFINED)]
    above = max(_difference(table, name, "lines") for name in clips)
    mean = sum(vae) / len(vae)
    return [
        Check(
            f"VAE's PSNR at least {VAE_MEAN:g} dB on the mean, {VAE_WORST:g} dB on the worst clip",
            f"{mean:.2f} and {min(vae):.2f} dB on {len(clips)} clips",
            mean >= VAE_MEAN and min(vae) >= VAE_WORST,
        ),
        *(_judged(table, metric) for metric in ("brisque", "piqe")),
        Check(
            f"gradient-energy error at least {LESS_GRADIENT_ERROR:g} % below bicubic's",
            f"{refined['gradient_error']:.1f} against {bicubic['gradient_error']:.1f} %, {less:.1f} % less",
            less >= LESS_GRADIENT_ERROR,
        ),
        Check(
            f"PSNR at most {PSNR_LOSS:g} dB below bicubic's, {PSNR_LOSS_ONCE:g} dB with one evaluation",
            f"{refined['psnr']:.2f} and {once['psnr']:.2f} against {bicubic['psnr']:.2f} dB",
            losses[0] <= PSNR_LOSS and losses[1] <= PSNR_LOSS_ONCE,
        ),
        Check(
            f"flicker at most {FLICKER:g} times bicubic's",
            f"{refined['flicker']:.2f} against {bicubic['flicker']:.2f} levels",
            refined["flicker"] <= FLICKER * bicubic["flicker"],
        ),
        Check(
            f"broad areas' colour: at most ΔE {LOW_BAND:g} from the draft's, and as near to the truth's as bicubic's",
            f"ΔE {refined['colour_shift']:.2f}; {cast:+.3f}",
            refined["colour_shift"] <= LOW_BAND and cast <= LOW_BAND_SLACK,
        ),
        Check(
            f"lines: on every clip at most {LINES:g} levels above bicubic's",
            f"worst clip {above:+.1f} levels; largest of all clips {worst[1]:.1f} against {worst[0]:.1f}",
            above <= LINES,
        ),
    ]


def _difference(table: TableResult, clip: str, metric: str) -> float:
    """By how much refining raises a metric of a clip above bicubic's."""
    return table.row(REFINED).clips[clip][metric] - table.row(BICUBIC).clips[clip][metric]


def _judged(table: TableResult, metric: str) -> Check:
    """On how many clips a judge without a truth finds the refined clip better than bicubic's; lower is better."""
    wanted = f"{METRICS[metric].label} better than bicubic's on at least {100 * BETTER_ON:.0f} % of the clips"
    differences = [_difference(table, name, metric) for name in table.real]
    if any(math.isnan(each) for each in differences):
        why = "its package isn't installed" if metric in missing_packages() else "a clip has no picture to judge"
        return Check(wanted, f"not measured: {why}", False)
    wins = sum(each < 0 for each in differences)
    found = f"{wins} of {len(differences)}, {sum(differences) / len(differences):+.1f} on the mean"
    return Check(wanted, found, wins >= BETTER_ON * len(differences))
