"""One video on several cards that work on it together, as torchrun starts them: time, and bytes between the cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import SPATIAL_FACTOR, DiTConfig, latent_shape
from ..memory import vae_outline
from ..vae.memory import plan_within
from ..vae.ranks import side_for_ranks
from ..vae.tiles import Tile
from .farm import card_counts
from .flops import Flops, decode_flops, dit_flops, encode_flops, tiling_factor
from .plan import STAGE_1, STAGE_2, VAE_DECODE, VAE_ENCODE, Phase, Plan, Setting
from .ranks import RankWork, evaluation_on_ranks, guided_on_ranks
from .speed import Rates

SPREAD = (STAGE_1, STAGE_2, VAE_ENCODE, VAE_DECODE)  # the other phases run on one card, or on each the same
PCIE = 16e9  # bytes a second that reach a card from the others, where nobody says: half of what PCIe 4.0 has


@dataclass(frozen=True)
class Together:
    """A video on so many cards. `received`: bytes that the busiest card gets from the others.

    `seconds`: its work, and then the transfers, as if nothing hid them. `alone`: seconds on one card.
    """

    cards: int
    seconds: float
    received: float
    alone: float

    @property
    def efficiency(self) -> float:
        """The time on one card, divided by that of all cards together."""
        return self.alone / (self.seconds * self.cards)


def together(plan: Plan, rates: Rates, link: float, most: int) -> Iterator[Together]:
    """The plan's video on 1, 2, 4, ... cards up to `most`; `link`: bytes a second that reach a card from the others.

    Between the VAE's tiles little travels, which isn't counted. Raises ValueError for tiles of stage II.
    """
    if plan.setting.tile:
        raise ValueError("several cards share whole frames: leave the tiles of stage II out.")
    alone = rates.seconds(plan.flops)
    for cards in card_counts(most):
        works = [_work(phase, plan.setting, cards) for phase in plan.phases]
        received = sum(work.received for work in works)
        yield Together(cards, sum(rates.seconds(work.flops) for work in works) + received / link, received, alone)


def _work(phase: Phase, setting: Setting, cards: int) -> RankWork:
    """What the busiest card does in a phase, and receives."""
    if cards == 1 or phase.name not in SPREAD:
        return RankWork(phase.flops)
    if not phase.tokens:
        return RankWork(_vae_flops(phase, setting, cards))
    networks = setting.networks
    if phase.name == STAGE_1:
        return _transformer(phase, networks.stage1, setting.draft, cards, setting, is_guided=True)
    frames, *sides = setting.padded
    window = (min(frames, setting.window), *sides)
    return _transformer(phase, networks.stage2, window, cards, setting, is_guided=setting.cfg != 1)


def _transformer(
    phase: Phase, config: DiTConfig, video: tuple[int, int, int], cards: int, setting: Setting, *, is_guided: bool
) -> RankWork:
    shape, itemsize = latent_shape(video), setting.numerics.compute.itemsize
    one = (guided_on_ranks if is_guided else evaluation_on_ranks)(config, shape, cards, itemsize)
    times = phase.flops.total / (dit_flops(config, shape).total * (2 if is_guided else 1))
    return RankWork(one.flops * times, one.keys_values * times, one.patches * times, one.guidance * times)


def _vae_flops(phase: Phase, setting: Setting, cards: int) -> Flops:
    """The VAE's work that falls to the busiest card: whole tiles, which overlap."""
    config, latent = setting.networks.vae, latent_shape(setting.padded)
    encodes, outline = phase.name == VAE_ENCODE, vae_outline(config)
    whole = (encode_flops if encodes else decode_flops)(config, *setting.padded)
    longest = max(latent[1:]) if phase.tile is None else phase.tile // SPATIAL_FACTOR
    side = side_for_ranks(latent[1:], longest, cards)
    network, on_card = outline.encoder if encodes else outline.decoder, setting.device != "cpu"
    dtype, store = setting.numerics.compute, setting.store
    cut = plan_within(network, latent, dtype, None, store, needed=0.0, on_card=on_card, side=side)
    if cut is None:  # a picture as small as a tile
        return phase.flops
    tiles = len(Tile(0, latent[1], 0, latent[2]).split(cut.side))
    return whole * (tiling_factor(cut, *latent) * -(-tiles // cards) / tiles)
