"""The tables of trained variants (3, 5, 6, 7): which ways each compares. `orderings` has what is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ...config import DEGRADATION_STEP
from .assemble import TRUTH_ROW, table_of, table_of_rows
from .constancy import constancy
from .drafts import table4
from .evaluation import AUTO, ENLARGERS, TRUTH, Method
from .generated import table2
from .lab import LARGER, Lab
from .results import Row, TableResult
from .sampling import guidance_table, table8, table10

NOISE_ALONE, NEXT_TO_NOTHING = (999, 999), (0, 0)  # latent steps


def table3(lab: Lab) -> TableResult:
    """The refiner against plain enlargement, and against a cascade that generates from noise."""
    degradation = lab.settings.variants.degradation
    refiner = lab.variant("refiner", degradation)
    cascade = lab.variant("cascade", dataclasses.replace(degradation, latent_steps=NOISE_ALONE), "cascade")
    trained = f"refiner, {lab.settings.refiner.steps} evaluations"
    cascades = {f"cascade, {steps} evaluations": steps for steps in lab.settings.variants.cascade_steps}
    ways = [(TRUTH_ROW, Method(TRUTH)), *((kind, Method(kind)) for kind in ENLARGERS)]
    ways += [(label, lab.refiner(cascade, "cascade", steps=steps)) for label, steps in cascades.items()]
    ways += [(trained, lab.refiner(refiner)), ("shipped refiner", lab.refiner())]
    about = (
        "The refiner starts from the degraded draft. A cascade of the same size starts from noise, and sees the "
        "draft's latent in additional input channels. Both are trained equally long from nothing, on the same clips "
        "in the same order; the shipped refiner was trained longer. The paper: the refiner needs fewer evaluations "
        "than a cascade for better details."
    )
    title = "Table 3: refiner, enlargement, cascade"
    return table_of(lab, "table3", title, about, ways, lab.small_suite(), lab.budget_facts())


def table5(lab: Lab) -> TableResult:
    """Rotary and absolute positions at the training resolution and beyond; the shipped model, too."""
    degradation = lab.settings.variants.degradation
    weights = {
        "rotary": lab.variant("refiner", degradation),
        "absolute": lab.variant("absolute", degradation, "absolute"),
    }
    rows: list[Row] = []
    for scale in (1.0, LARGER):
        suite, size = lab.small_suite(scale), f"{scale:g}x"
        ways = [(f"bilinear, {size}", Method("bilinear")), (f"shipped refiner, {size}", lab.refiner())]
        for strength in (AUTO, DEGRADATION_STEP):
            said = "auto" if strength == AUTO else strength
            ways += [
                (f"{kind}, {size}, strength {said}", lab.refiner(path, kind, strength=strength))
                for kind, path in weights.items()
            ]
        rows += lab.rows(ways, suite)
    about = (
        f"3D rotary positions against absolute sinusoidal ones (figure 8), trained equally long at one resolution, "
        f"measured there and at {LARGER:g} times that; with the strength that suits the size, and with the official "
        f"one, {DEGRADATION_STEP}, whose noise hides much of a small draft. The paper: rotary positions carry over to "
        "a larger picture, absolute ones leave artefacts there. The shipped refiner, trained longer and at other "
        "sizes too, is measured at both sizes."
    )
    larger = lab.small_suite(LARGER)
    facts = {**lab.budget_facts(), "larger size": larger.size, "its strength auto": str(lab.strength(larger))}
    return table_of_rows(lab, "table5", "Table 5: positions, 1x and 1.5x", about, rows, lab.small_suite(), facts)


def table6(lab: Lab) -> TableResult:
    """Stage II trained with and without degradations."""
    both = lab.settings.variants.degradation
    pixel = dataclasses.replace(both, latent_steps=NEXT_TO_NOTHING)
    nothing = dataclasses.replace(pixel, pixel=False)
    settings = {"no degradation": nothing, "pixel": pixel, "pixel and latent": both}
    suite = lab.small_suite()
    usual = lab.strength(suite)
    ways = [(TRUTH_ROW, Method(TRUTH)), ("bilinear", Method("bilinear"))]
    for label, degradation in settings.items():
        name = "refiner" if degradation == both else label.replace(" ", "-")
        low, high = degradation.latent_steps
        strength = min(max(usual, low), high)
        ways.append((label, lab.refiner(lab.variant(name, degradation), strength=strength)))
    about = (
        "What the refiner's training does to its reference: nothing (the reference is the clean clip), pixel "
        "degradation, or pixel and latent degradation; each is run with the strength that it was trained for. The "
        "paper: pixel degradation makes it add detail, latent degradation on top lets it replace what is wrong."
    )
    return table_of(lab, "table6", "Table 6: degradations in training", about, ways, suite, lab.budget_facts())


def table7(lab: Lab) -> TableResult:
    """Before and after preference tuning, at a strength where a clip's samples differ."""
    tuning = lab.settings.preference
    choice, strength = tuning.choice, tuning.strength
    ways = [
        (TRUTH_ROW, Method(TRUTH)),
        ("before", lab.refiner(strength=strength)),
        ("after, own samples unchosen", lab.refiner(lab.preferred("unchosen", 1), strength=strength)),
        (
            f"after, best of {choice.candidates}",
            lab.refiner(lab.preferred("preferred", choice.candidates), strength=strength),
        ),
    ]
    facts = {"tuning": f"{tuning.loop.steps} steps of {tuning.batch} clips", "scorer": choice.scorer}
    about = (
        "The shipped refiner, tuned on its own samples of training clips: of each clip's samples the scorer's "
        "favourite, or, as a control that chooses nothing, the first. The paper: after tuning, videos look better."
    )
    facts["strength"] = str(strength)
    return table_of(lab, "table7", "Table 7: preference tuning", about, ways, lab.small_suite(), facts)


TABLES: dict[str, Callable[[Lab], TableResult]] = {
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "guidance": guidance_table,
    "table10": table10,
    "time": constancy,
}
