"""Whether the refiner does its job: it adds detail that plain enlargement lacks, and changes nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass

from ..loop.checkpointing import write_whole
from .evaluation import CODED, TRUTH, Method
from .lab import Lab
from .results import TableResult

BICUBIC, REFINED, UNMATCHED = "bicubic", "refined", "refined, colours not matched"
CODED_TRUTH = "truth through the VAE"
DETAIL = ("psnr_high", "gradient_error")
QUALITY = ("psnr", "ssim", "psnr_high", "gradient_error")
HIGH_BAND_GAIN = 1.5  # dB over bicubic
GRADIENT_GAIN = 30.0  # percent of bicubic's error that must go; one of the two is enough
LOW_BAND_LOSS = 0.05  # dB that rounding to 8 bits may cost
LOW_BAND_EXACT = 20 * math.log10(255)  # dB: above it, the low band is off by less than one step of 8 bits
COLOUR_SHIFT = 1.0  # mean Delta E of broad areas, to the draft's; about 2 is just noticeable


@dataclass(frozen=True)
class Check:
    """One requirement, and its result."""

    wanted: str
    found: str
    passed: bool

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'NOT PASSED'}: {self.wanted}: {self.found}"


def held_out_report(lab: Lab) -> list[Check]:
    """Measure the refiner on held-out clips, print the requirements and their results, and write both.

    The numbers go to tables/acceptance.json in the lab's folder, the checks to acceptance.json beside it.
    """
    table = acceptance(lab)
    out = lab.settings.out
    table.save(out / "tables")
    results = checks(table, table.procedural)
    sys.stdout.write("".join(f"  {check}\n" for check in results))
    text = json.dumps([dataclasses.asdict(check) for check in results], indent=1, ensure_ascii=False)
    write_whole(out / "acceptance.json", lambda file: file.write(text.encode()))
    return results


def acceptance(lab: Lab) -> TableResult:
    """The whole chain (Prepare, encode, degrade, stage II, decode, Finish with wavelet match) against bicubic."""
    settings = lab.settings.held_out
    ways = {
        BICUBIC: Method("bicubic"),
        REFINED: lab.refiner(),
        UNMATCHED: lab.refiner(color_match="none"),
    }
    suite = lab.suite()
    rows = lab.rows([("truth", Method(TRUTH)), (CODED_TRUTH, Method(CODED)), *ways.items()], suite)
    for draft in settings.other_drafts:
        others = [(f"{draft}: {label}", method) for label, method in ways.items() if label != UNMATCHED]
        rows += lab.rows(others, lab.suite(draft))
    about = (
        "The whole chain of the refiner graph, from a draft a quarter as high and wide to the finished frames, against "
        "bicubic enlargement of the same draft. The truth through the VAE shows what the VAE alone costs."
    )
    return TableResult(
        key="acceptance",
        title="The refiner on held-out clips",
        about=about,
        procedural=suite.names[: suite.count],
        real=suite.names[suite.count :],
        metrics=[*rows[0].clips[suite.names[0]]],
        rows=rows,
        claims=[],
        shown=["truth", CODED_TRUTH, *ways],
        facts=lab.facts(
            **lab.clip_facts(suite),
            strength=lab.said_strength(suite),
            **{"other drafts": ", ".join(settings.other_drafts) or "none"},
        ),
    )


def checks(table: TableResult, clips: list[str], draft: str = "") -> list[Check]:
    """What is asked of the mean over these clips of the `acceptance` table; `draft` names one of its other drafts."""
    prefix = f"{draft}: " if draft else ""
    bicubic, refined = (table.row(prefix + label).mean(clips) for label in (BICUBIC, REFINED))
    gain = refined["psnr_high"] - bicubic["psnr_high"]
    less = 100 * (1 - refined["gradient_error"] / max(bicubic["gradient_error"], 1e-9))
    low = refined["psnr_low"] - bicubic["psnr_low"]
    return [
        Check(
            f"high-band PSNR at least {HIGH_BAND_GAIN} dB above bicubic's, or gradient-energy error at least "
            f"{GRADIENT_GAIN:.0f} % below it",
            f"{gain:+.2f} dB; {less:+.1f} % less error",
            gain >= HIGH_BAND_GAIN or less >= GRADIENT_GAIN,
        ),
        Check(
            f"no loss of low-band PSNR, or still above {LOW_BAND_EXACT:.1f} dB, less than one step of 8 bits",
            f"{refined['psnr_low']:.2f} dB, {low:+.2f} dB",
            low >= -LOW_BAND_LOSS or refined["psnr_low"] >= LOW_BAND_EXACT,
        ),
        Check(
            f"colour shift from the draft at most ΔE {COLOUR_SHIFT:g}",
            f"ΔE {refined['colour_shift']:.3f}; to the truth {refined['colour_error']:.3f}, bicubic's "
            f"{bicubic['colour_error']:.3f}",
            refined["colour_shift"] <= COLOUR_SHIFT,
        ),
        Check(
            "no more flicker than bicubic",
            f"{refined['flicker']:.3f} against {bicubic['flicker']:.3f}",
            refined["flicker"] <= bicubic["flicker"],
        ),
    ]


def other_drafts(table: TableResult) -> list[str]:
    """Names of the acceptance's other kinds of drafts."""
    return [row.label.split(":")[0] for row in table.rows if row.label.endswith(f": {REFINED}")]
