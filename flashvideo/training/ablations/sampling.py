"""How the shipped refiner is run: evaluations (table 8), guidance with them, and degradation strength (table 10)."""

from __future__ import annotations

from ...degradation import auto_strength
from .acceptance import BICUBIC
from .assemble import TRUTH_ROW, table_of
from .evaluation import TRUTH, Method
from .lab import Lab
from .results import TableResult

LEAST, MOST, BETWEEN = 600, 900, 50  # official strengths of table 10
EVALUATIONS = range(1, 9)  # of table 8
GUIDANCE, GUIDED_EVALUATIONS = (1, 4, 8, 13), (1, 2, 4, 8)


def evaluations(steps: int) -> str:
    """A number of evaluations in words."""
    return f"{steps} evaluation{'s' if steps > 1 else ''}"


def _beside(ways: dict[str, Method]) -> list[tuple[str, Method]]:
    return [(TRUTH_ROW, Method(TRUTH)), (BICUBIC, Method("bicubic")), *ways.items()]


def table8(lab: Lab) -> TableResult:
    """From one evaluation of the network to eight."""
    ways = {evaluations(steps): lab.refiner(steps=steps) for steps in EVALUATIONS}
    about = (
        "The shipped refiner, sampled with Euler steps on its shifted grid; with guidance, an evaluation is of two "
        "contexts. The paper: quality rises up to about 4 evaluations, and more gain little."
    )
    return table_of(lab, "table8", "Table 8: evaluations", about, _beside(ways), lab.suite())


def guidance_table(lab: Lab) -> TableResult:
    """Guidance by the prompt, with few and many evaluations."""
    ways = {
        f"guidance {scale}, {evaluations(steps)}": lab.refiner(steps=steps, cfg=float(scale))
        for scale in GUIDANCE
        for steps in GUIDED_EVALUATIONS
    }
    about = (
        "The shipped refiner with guidance from 1, which is none and half the work, to 13, with 1 to 8 evaluations. "
        "The paper recommends 10 to 13 and 4 evaluations."
    )
    return table_of(lab, "guidance", "Guidance and evaluations", about, _beside(ways), lab.small_suite())


def table10(lab: Lab) -> TableResult:
    """How far the draft's latent is degraded: the official strengths, mapped to the size that is measured."""
    suite = lab.suite()
    source = suite.source
    mapped = {
        strength: auto_strength(source.height, source.width, strength=strength)
        for strength in range(LEAST, MOST + 1, BETWEEN)
    }
    ways = {f"strength {strength}, mapped": lab.refiner(strength=step) for strength, step in mapped.items()}
    about = (
        "The shipped refiner. Strengths are the official ones of 1920x1072, each mapped to the size that is measured: "
        "an equal share of the picture gets an equal signal-to-noise ratio. The paper: a weak degradation leaves the "
        "draft's flaws and adds little detail, a strong one loses the draft; 650 to 750 is useful."
    )
    facts = {"strength": "; ".join(f"{strength} is {step}" for strength, step in mapped.items())}
    return table_of(lab, "table10", "Table 10: degradation strength", about, _beside(ways), suite, facts)
