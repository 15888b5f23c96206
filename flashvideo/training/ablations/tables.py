"""The paper's tables: which ways each compares, and what ordering is asked of them.

The orderings were written down before anything was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ...degradation import DEGRADATION_STEP
from .acceptance import BICUBIC, DETAIL, QUALITY
from .clips import Suite
from .drafts import table4
from .evaluation import ENLARGERS, TRUTH, Method
from .lab import LARGER, Lab
from .results import Claim, Row, TableResult

TRUTH_ROW = "truth"
LEAST, MOST = 600, 900  # strengths of table 10
USUAL_STRENGTH = 700
EVALUATIONS = range(1, 9)  # of table 8
SATURATED = {"psnr_high": 0.3, "ssim": 0.01}  # what 8 evaluations may gain over 4, to be called little
AS_GOOD = 0.5  # dB: two kinds of positions are called equal at the training resolution
NOISE_ALONE, NEXT_TO_NOTHING = (999, 999), (0, 0)  # latent steps


def beats(better: str, worse: str, *metrics: str) -> list[Claim]:
    """Claims that one row is better than another in each of some metrics."""
    return [Claim(metric, better, worse) for metric in metrics]


def table3(lab: Lab) -> TableResult:
    """The refiner against plain enlargement, and against a cascade that generates from noise."""
    suite = lab.small_suite()
    degradation = lab.settings.variants.degradation
    refiner = lab.variant("refiner", degradation)
    cascade = lab.variant("cascade", dataclasses.replace(degradation, latent_steps=NOISE_ALONE), "cascade")
    trained = f"refiner, {lab.settings.refiner.steps} evaluations"
    cascades = {f"cascade, {steps} evaluations": steps for steps in lab.settings.variants.cascade_steps}
    ways = [(TRUTH_ROW, Method(TRUTH)), *((kind, Method(kind)) for kind in ENLARGERS)]
    ways += [(label, lab.refiner(cascade, "cascade", steps=steps)) for label, steps in cascades.items()]
    ways += [(trained, lab.refiner(refiner)), ("shipped refiner", lab.refiner())]
    claims = [claim for kind in ENLARGERS for claim in beats(trained, kind, *DETAIL)]
    claims += [claim for label in cascades for claim in beats(trained, label, *DETAIL, "ssim", "flicker")]
    claims += [claim for kind in ENLARGERS for claim in beats("shipped refiner", kind, *DETAIL)]
    about = (
        "The refiner starts from the degraded draft. A cascade of the same size starts from noise, and sees the "
        "draft's latent in additional input channels. Both are trained equally long from nothing, on the same clips "
        "in the same order; the shipped refiner was trained longer. The paper: the refiner needs fewer evaluations "
        "than a cascade for better details."
    )
    title = "Table 3: refiner, enlargement, cascade"
    return _table(lab, "table3", title, about, ways, claims, suite, lab.budget_facts())


def table5(lab: Lab) -> TableResult:
    """Rotary and absolute positions at the training resolution and beyond."""
    degradation = lab.settings.variants.degradation
    weights = {
        "rotary": lab.variant("refiner", degradation),
        "absolute": lab.variant("absolute", degradation, "absolute"),
    }
    strengths = sorted({lab.settings.refiner.strength, DEGRADATION_STEP})
    rows, claims = [], []
    for scale in (1.0, LARGER):
        rows += lab.rows([(f"bilinear, {scale:g}x", Method("bilinear"))], lab.small_suite(scale))
        for strength in strengths:
            names = {kind: f"{kind}, {scale:g}x, strength {strength}" for kind in weights}
            ways = [(names[kind], lab.refiner(path, kind, strength=strength)) for kind, path in weights.items()]
            rows += lab.rows(ways, lab.small_suite(scale))
            if scale == 1.0:
                claims.append(Claim("psnr_high", names["rotary"], names["absolute"], AS_GOOD))
            else:
                claims += beats(names["rotary"], names["absolute"], "psnr_high", "ssim", "flicker")
    about = (
        f"3D rotary positions against absolute sinusoidal ones (figure 8), trained equally long at one resolution, "
        f"measured there and at {LARGER:g} times that; with the miniature's strength, and with the official one, "
        f"{DEGRADATION_STEP}, whose noise hides much of the draft. The paper: rotary positions carry over to a larger "
        "picture, absolute ones leave artefacts there."
    )
    suite = lab.small_suite()
    facts = {**lab.budget_facts(), "larger size": lab.small_suite(LARGER).size}
    return _result(lab, "table5", "Table 5: positions, 1x and 1.5x", about, rows, claims, suite, facts)


def table6(lab: Lab) -> TableResult:
    """Stage II trained with and without degradations."""
    both = lab.settings.variants.degradation
    pixel = dataclasses.replace(both, latent_steps=NEXT_TO_NOTHING)
    nothing = dataclasses.replace(pixel, pixel=False)
    settings = {"no degradation": nothing, "pixel": pixel, "pixel and latent": both}
    ways = [(TRUTH_ROW, Method(TRUTH)), ("bilinear", Method("bilinear"))]
    for label, degradation in settings.items():
        name = "refiner" if degradation == both else label.replace(" ", "-")
        low, high = degradation.latent_steps
        strength = min(max(lab.settings.refiner.strength, low), high)
        ways.append((label, lab.refiner(lab.variant(name, degradation), strength=strength)))
    claims = [
        *beats("pixel", "no degradation", *DETAIL),
        *beats("pixel and latent", "no degradation", *DETAIL),
        *beats("pixel and latent", "pixel", "gradient_error"),
    ]
    about = (
        "What the refiner's training does to its reference: nothing (the reference is the clean clip), pixel "
        "degradation, or pixel and latent degradation; each is run with the strength that it was trained for. The "
        "paper: pixel degradation makes it add detail, latent degradation on top lets it replace what is wrong."
    )
    suite = lab.small_suite()
    return _table(lab, "table6", "Table 6: degradations in training", about, ways, claims, suite, lab.budget_facts())


def table7(lab: Lab) -> TableResult:
    """Before and after preference tuning."""
    choice = lab.settings.preference.choice
    after = f"after, best of {choice.candidates}"
    ways = [
        (TRUTH_ROW, Method(TRUTH)),
        ("before", lab.refiner()),
        ("after, own samples unchosen", lab.refiner(lab.preferred("unchosen", 1))),
        (after, lab.refiner(lab.preferred("preferred", choice.candidates))),
    ]
    claims = beats(after, "before", *QUALITY) + beats(after, "after, own samples unchosen", *QUALITY)
    tuning = lab.settings.preference
    facts = {"tuning": f"{tuning.loop.steps} steps of {tuning.batch} clips", "scorer": choice.scorer}
    about = (
        "The shipped refiner, tuned on its own samples of training clips: of each clip's samples the scorer's "
        "favourite, or, as a control that chooses nothing, the first. The paper: after tuning, videos look better."
    )
    suite = lab.small_suite()
    return _table(lab, "table7", "Table 7: preference tuning", about, ways, claims, suite, facts)


def table8(lab: Lab) -> TableResult:
    """From one evaluation of the network to eight."""
    labels = {steps: f"{steps} evaluation{'s' if steps > 1 else ''}" for steps in EVALUATIONS}
    ways = [(TRUTH_ROW, Method(TRUTH)), (BICUBIC, Method("bicubic"))]
    ways += [(label, lab.refiner(steps=steps)) for steps, label in labels.items()]
    claims = beats(labels[4], labels[1], "gradient_error")
    claims += [Claim(metric, labels[4], labels[8], within) for metric, within in SATURATED.items()]
    about = (
        "The shipped refiner, sampled with Euler steps on its shifted grid; with guidance, an evaluation is of two "
        "contexts. The paper: quality rises up to about 4 evaluations, and more gain little."
    )
    return _table(lab, "table8", "Table 8: evaluations", about, ways, claims, lab.suite())


def table10(lab: Lab) -> TableResult:
    """How far the draft's latent is degraded."""
    labels = {strength: f"strength {strength}" for strength in range(LEAST, MOST + 1, 50)}
    ways = [(TRUTH_ROW, Method(TRUTH)), (BICUBIC, Method("bicubic"))]
    ways += [(label, lab.refiner(strength=strength)) for strength, label in labels.items()]
    usual = labels[USUAL_STRENGTH]
    claims = [
        *beats(labels[LEAST], labels[MOST], "psnr", "ssim"),
        *beats(usual, labels[MOST], *DETAIL, "flicker"),
        *beats(usual, labels[LEAST], "gradient_error"),
    ]
    about = (
        "The shipped refiner. The paper: a weak degradation leaves the draft's flaws and adds little detail, a strong "
        "one loses the draft; 650 to 750 is useful."
    )
    return _table(lab, "table10", "Table 10: degradation strength", about, ways, claims, lab.suite())


def _table(
    lab: Lab,
    key: str,
    title: str,
    about: str,
    ways: list[tuple[str, Method]],
    claims: list[Claim],
    suite: Suite,
    facts: dict[str, str] | None = None,
) -> TableResult:
    return _result(lab, key, title, about, lab.rows(ways, suite), claims, suite, facts or {})


def _result(
    lab: Lab,
    key: str,
    title: str,
    about: str,
    rows: list[Row],
    claims: list[Claim],
    suite: Suite,
    facts: dict[str, str],
) -> TableResult:
    names = suite.names
    return TableResult(
        key=key,
        title=title,
        about=about,
        procedural=names[: suite.count],
        real=names[suite.count :],
        metrics=[*rows[0].clips[names[0]]],
        rows=rows,
        claims=claims,
        shown=[row.label for row in rows],
        facts=lab.facts(**lab.clip_facts(suite), **facts),
    )


TABLES: dict[str, Callable[[Lab], TableResult]] = {
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "table10": table10,
}
