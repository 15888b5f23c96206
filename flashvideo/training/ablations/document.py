"""Writes docs/ablations.md from measured tables: every number, verdict and picture in it follows from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..loop.checkpointing import write_whole
from .acceptance import Check, checks, other_drafts
from .measures import METRICS
from .pages import save_page
from .quality import KEY as QUALITY
from .quality import aims
from .results import Claim, Finding, TableResult
from .settings import Note

DOCUMENT, PICTURES = "ablations.md", "ablations"
ACCEPTANCE = "acceptance"
OUTDATED = "Measured with another"
FACTS = 2  # paragraphs of a section, its facts the last of them, before such a word
PLACES = {"Real clips": -1.0, "Guidance and evaluations": 8.5, "Constant quality in time": 99.0}  # else first
TABLE_NUMBER = re.compile(r"Table (\d+)")
SUMMARY_LINE = re.compile(r"^\| \[(.+?)\]\(#\S*\) \| (\d+) \| (\d+) \|$", re.MULTILINE)
INTRODUCTION = """# Ablations on FlashVideo-Nano

The paper's tables (FlashVideo, arXiv 2502.05179), repeated with the miniature: not its numbers, which belong to models
a thousand times larger, but the order of what is compared. `python -m flashvideo ablate` writes this page from what it
measured; `make ablations` does all of it. Orderings are written down before they are measured, in
[orderings.toml](../flashvideo/training/configs/ablations/orderings.toml) with the date; an ordering that does not come
out stays here as it is.

**Clips.** Procedural scenes of the "test" split, whose combinations of colour, shape and direction no training saw, and
a real clip. The table of real clips has those of the training packages that a rule keeps from every training. A draft
is a quarter as high and wide: "shrunk" and "area" are that and no more, "coded" went through the VAE as the drafts of
stage I do, "strong" was blurred, resized, compressed and made noisy first. Means are over the procedural clips.

**Measures without a truth.** The paper judges by measures of this kind. BRISQUE and PIQE rate real
clips. NIQE rates drawn scenes: it is fitted to 16 other scenes, because ready-made statistics are those of photographs
and rate drawn truth worst. All three take a mosaic for detail, so they are read beside the measures below.

**Measures against the truth.** PSNR and SSIM; the paper does not claim orderings by these. PSNR of the high and of the
low band, which part at patterns of 70 pixels, as the colour match does. Gradient-energy error: how far the amount of
detail is from the truth's, in either direction. Sharpness: variance of the Laplacian, to be read beside the truth's.
Flicker: mean error of the change from frame to frame, in levels of 255. Warp error: mean change along the truth's
optical flow, in levels of 255, to be read beside the truth's. Lines: how far the mean error of the worst row or column
stands out from the rows around it, in levels of 255. Swing: how far quality rises and falls in time with the period of
the VAE's chunks, or of stage II's windows. Loss by varying: how far the PSNR of the whole clip is below the mean of its
frames'. Colour shift: ΔE of broad areas (the low bands) to the enlarged draft's, which is what refining changed. Colour
error: the same to the truth's. Pixels' ΔE: that of the pixels to the truth's. Seconds: the whole chain for one clip. A
table has the measures that there were at its date.
"""


class Section(NamedTuple):
    """One table's part of the page."""

    title: str
    came_out: int
    asked: int
    text: str


def write_document(
    folder: Path,
    tables: Sequence[TableResult],
    notes: Sequence[Note],
    weights: Mapping[str, str] | None = None,
    calculated: Sequence[Section] = (),
) -> Path:
    """Write the page and its pictures into a folder; returns the page's path.

    `calculated` are sections that nothing was measured for. Sections of other tables that the page has stay in it.
    `weights` are the facts about the weights that are shipped now: a table that says otherwise of its own gets a word
    about it.
    """
    path, weights = folder / DOCUMENT, weights or {}
    sections = {each.title: each for each in (*kept_sections(path, weights), *calculated)}
    for table in tables:
        own = [note.text for note in notes if note.table == table.key]
        text = section(table, own, weights)
        picture = folder / PICTURES / f"{table.key}.jpg"
        if save_page(table, picture, whole=table.key == ACCEPTANCE):
            text += f"\n![{table.title}]({PICTURES}/{picture.name})\n"
        sections[table.title] = Section(table.title, *_outcome(table), text)
    ordered = sorted(sections.values(), key=lambda each: _place(each.title))
    text = "\n".join([INTRODUCTION, _summary(ordered), *(each.text for each in ordered)])
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def _place(title: str) -> float:
    """Where a section stands on the page: tables by their numbers, and the others around them."""
    number = TABLE_NUMBER.match(title)
    return float(number[1]) if number else PLACES.get(title, 0.0)


def kept_sections(path: Path, weights: Mapping[str, str]) -> list[Section]:
    """The sections of a page as it stands, if there is one, which say whether they are of other weights than these."""
    if not path.is_file():
        return []
    head, *bodies = path.read_text(encoding="utf-8").split("\n## ")
    outcomes = {title: (int(came_out), int(of)) for title, came_out, of in SUMMARY_LINE.findall(head)}
    sections = []
    for body in bodies:
        title, *paragraphs = (part for part in body.strip().split("\n\n") if not part.startswith(OUTDATED))
        found = {name: re.search(rf"(?:^|; ){re.escape(name)}: (\w+)", body, re.MULTILINE) for name in weights}
        known = {name: match[1] for name, match in found.items() if match}
        paragraphs[FACTS:FACTS] = outdated(known, weights)
        text = "\n\n".join([f"## {title}", *paragraphs])
        sections.append(Section(title, *outcomes.get(title, (0, 0)), text + "\n"))
    return sections


def _outcome(table: TableResult) -> tuple[int, int]:
    """How many of the checks or orderings came out, and of how many."""
    if table.key == QUALITY:
        outcome = [check.passed for check in aims(table)]
    elif table.key == ACCEPTANCE:
        outcome = [check.passed for check in checks(table, table.procedural)]
    else:
        outcome = [finding.holds for finding in table.findings(table.procedural)]
    return sum(outcome), len(outcome)


def _summary(sections: Sequence[Section]) -> str:
    lines = ["| | came out | of |", "|---|---|---|"]
    lines += [f"| [{each.title}](#{_anchor(each.title)}) | {each.came_out} | {each.asked} |" for each in sections]
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """The link to a heading as GitHub makes it."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def outdated(facts: Mapping[str, str], weights: Mapping[str, str]) -> list[str]:
    """What must be said of a table that was measured with other weights than these, if it was."""
    return [
        f"{OUTDATED} {name} ({facts[name]}) than the one that is shipped now ({now})."
        for name, now in weights.items()
        if facts.get(name, now) != now
    ]


def section(table: TableResult, notes: Sequence[str] = (), weights: Mapping[str, str] | None = None) -> str:
    """One table in Markdown: what it compares, its numbers, and what became of its orderings."""
    parts = [f"## {table.title}\n", f"{table.about}\n"]
    parts.append("; ".join(f"{name}: {fact}" for name, fact in table.facts.items()) + ".\n")
    parts += [f"{word}\n" for word in outdated(table.facts, weights or {})]
    if table.procedural:
        parts.append(number_table(table, table.procedural))
    if table.real:
        parts += [f"{_real(table)}:\n", number_table(table, table.real)]
    parts.append(_verdict(table))
    parts += [f"{note.strip()}\n" for note in notes]
    return "\n".join(parts)


def _real(table: TableResult) -> str:
    return f"The real clip, {table.real[0]}" if len(table.real) == 1 else f"Means over {len(table.real)} real clips"


def _verdict(table: TableResult) -> str:
    """What became of what was asked."""
    if table.key == QUALITY:
        return "\n".join(_check_lines(aims(table))) + "\n"
    return _checks(table) if table.key == ACCEPTANCE else _findings(table)


def number_table(table: TableResult, clips: Sequence[str]) -> str:
    """Means over some clips, without columns that nothing was measured of.

    The best of each column is in bold, the truth, which is no competitor, aside.
    """
    means = {row.label: row.mean(list(clips)) for row in table.rows}
    metrics = [name for name in table.metrics if not all(math.isnan(mean[name]) for mean in means.values())]
    lines = ["| | " + " | ".join(METRICS[name].label for name in metrics) + " |"]
    lines.append("|---|" + "---:|" * len(metrics))
    rivals = [mean for label, mean in means.items() if not label.startswith("truth")]
    best = {name: _best(name, [mean[name] for mean in rivals]) for name in metrics}
    for label, mean in means.items():
        cells = []
        for name in metrics:
            text = number(name, mean[name])
            cells.append(f"**{text}**" if not label.startswith("truth") and text == best[name] else text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _best(name: str, values: Sequence[float]) -> str | None:
    better = METRICS[name].better
    known = [value for value in values if not math.isnan(value)]
    if better is None or not known:
        return None
    return number(name, max(known) if better == "higher" else min(known))


def number(name: str, value: float) -> str:
    """A metric's value as it is printed."""
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{METRICS[name].digits}f}"


def _findings(table: TableResult) -> str:
    """What became of the orderings, as a table: on the mean, on how many clips, and on the real one."""
    real = {finding.claim: finding for finding in table.findings(table.real)}
    lines = ["| Asked | Numbers | Came out | On clips |" + (" Real clip |" if real else "")]
    lines.append("|---|---|---|---:|" + ("---|" if real else ""))
    for finding in table.findings(table.procedural):
        cells = [asked(finding.claim), _numbers(finding), _yes(finding.holds), f"{finding.wins} of {finding.clips}"]
        if finding.claim in real:
            cells.append(f"{_yes(real[finding.claim].holds)}, {_numbers(real[finding.claim])}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _numbers(finding: Finding) -> str:
    better, worse = (number(finding.claim.metric, value) for value in (finding.better, finding.worse))
    return f"{better} against {worse}"


def sentence(finding: Finding) -> str:
    """What was asked, the numbers, and on how many clips it holds."""
    return f"{asked(finding.claim)}: {_numbers(finding)}; on {finding.wins} of {finding.clips} clips."


def asked(claim: Claim) -> str:
    """A claim in words."""
    metric = METRICS[claim.metric]
    name = metric.label.split(",")[0]
    if claim.within is None:
        return f"*{claim.better}* has a {metric.better} {name} than *{claim.worse}*"
    less = "no worse" if claim.within == 0 else f"at most {claim.within:g} worse"
    return f"*{claim.better}* is {less} in {name} than *{claim.worse}*"


def _checks(table: TableResult) -> str:
    blocks = [("Held-out scenes", checks(table, table.procedural))]
    if table.real:
        blocks.append((_real(table), checks(table, table.real)))
    for draft in other_drafts(table):
        blocks.append((f'Held-out scenes, drafts "{draft}"', checks(table, table.procedural, draft)))
    return "\n".join(f"{title}:\n\n" + "\n".join(_check_lines(results)) + "\n" for title, results in blocks)


def _check_lines(results: Sequence[Check]) -> list[str]:
    return [f"- **{'Passed' if check.passed else 'Not passed'}**: {check.wanted}: {check.found}." for check in results]
