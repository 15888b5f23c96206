"""Graphics cards by name: their memory, and their speed as estimated from data sheets, for plans without the card.

Peaks are those of dense 16-bit matrix products with 32-bit sums, in TFLOP a second, as the makers publish them. The
shares of the peak that this code reaches are guesses from published measurements of similar work, not measured here:
a plan may be wrong by a factor of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..devices import GIB
from .plan import Setting
from .speed import Rates

MATMUL_SHARE, ATTENTION_SHARE, CONVOLUTION_SHARE = 0.6, 0.4, 0.3  # of the peak
FP32_SHARE = 0.25  # of the 16-bit rates
LINK_SHARE = 0.5  # of what a link has; a guess, too


@dataclass(frozen=True)
class Card:
    """A card's memory in GiB, its peak in TFLOP a second, and GB a second that can reach it from other cards.

    The last are of NVLink (A100, H100, H200) or PCIe, in one direction.
    """

    name: str
    memory: int
    peak: float
    link: int


CARDS = {
    card.name.lower().replace(" ", ""): card
    for card in (
        Card("RTX 3060", 12, 25, 32),
        Card("RTX 3090", 24, 71, 32),
        Card("RTX 4060 Ti", 16, 44, 16),
        Card("RTX 4070", 12, 58, 32),
        Card("RTX 4080", 16, 97, 32),
        Card("RTX 4090", 24, 165, 32),
        Card("RTX 5080", 16, 112, 64),
        Card("RTX 5090", 32, 209, 64),
        Card("A100", 80, 312, 300),
        Card("H100", 80, 989, 450),
        Card("H200", 141, 989, 450),
    )
}


def find_card(name: str) -> Card:
    """The card of this name, however it is spaced or spelled in capitals. Raises ValueError with all names."""
    key = name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia").removeprefix("geforce")
    card = CARDS.get(key) or CARDS.get(f"rtx{key}")
    if card is None:
        known = ", ".join(card.name for card in CARDS.values())
        raise ValueError(f"no card is known as {name!r}. Known: {known}. For others give --memory in GiB.")
    return card


def memory_of(card: Card) -> float:
    """The card's memory in bytes."""
    return float(card.memory * GIB)


def link_of(card: Card) -> float:
    """Bytes a second that reach the card from others."""
    return card.link * 1e9 * LINK_SHARE


def rates_of(card: Card) -> Callable[[Setting], Rates]:
    """What CalibratedRates measures of a device, estimated."""

    def rates(setting: Setting) -> Rates:
        peak = card.peak * 1e12 * (FP32_SHARE if setting.precision == "fp32" else 1)
        return Rates(card.name, peak * MATMUL_SHARE, peak * ATTENTION_SHARE, peak * CONVOLUTION_SHARE, measured=False)

    return rates
