"""Networks and VAE on 2, 3 and 4 processes give what one process gives, and cost what the formula says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks

from flashvideo.config import STAGE2, TEXT_TOKENS
from flashvideo.dit import dit_tokens
from flashvideo.parallel import sequence_edges
from flashvideo.parallel.counting import GUIDANCE, KEYS_VALUES, PATCHES
from flashvideo.planner.flops import dit_flops
from flashvideo.planner.ranks import RankWork, evaluation_on_ranks, guided_on_ranks

TOLERANCE = 1e-6  # float32, of the largest number and one: matrix products of other sizes round differently
FLOPS_TOLERANCE = 0.01  # as in test_planner_costs.py; one token more or less is 0.03
SIZES = (2, 3, 4)
FULL_HD = (13, 134, 240)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"

Checked = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def alone() -> Checked:
    from rank_checks import both

    return both(None)


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Checked]:
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"), "rank_checks:both")


@pytest.mark.slow
def test_every_result_equals_one_process_on_every_rank(alone: Checked, together: list[Checked]) -> None:
    for name, expected in alone[0].items():
        for rank, (found, _) in enumerate(together):
            off = float((found[name] - expected).abs().max() / (1 + expected.abs().max()))
            assert off <= TOLERANCE, (name, rank, off)
            assert found[name].equal(together[0][0][name]), (name, rank)


@pytest.mark.slow
def test_a_run_counts_the_operations_and_bytes_of_the_formula(alone: Checked, together: list[Checked]) -> None:
    from rank_checks import GRID, REFINER

    shape = GRID[0], 2 * GRID[1], 2 * GRID[2]
    for name, formula in (("once", evaluation_on_ranks), ("guided", guided_on_ranks)):
        expected = formula(REFINER, shape, len(together), torch.float32.itemsize, 6)
        counts = [counted[name] for _, counted in together]
        assert max(count["flops"] for count in counts) == pytest.approx(expected.flops.total, rel=FLOPS_TOLERANCE)
        assert expected.flops.total < alone[1][name]["flops"]
        for count in counts:
            received = (count.get(kind, 0) for kind in (KEYS_VALUES, PATCHES, GUIDANCE))
            assert tuple(received) == (expected.keys_values, expected.patches, expected.guidance), name


def test_one_process_costs_what_the_whole_costs() -> None:
    assert evaluation_on_ranks(STAGE2, FULL_HD, 1, 2) == RankWork(dit_flops(STAGE2, FULL_HD))


def row(ranks: int) -> str:
    """A line of the table in the document: stage II at 1920x1072, 49 frames, bfloat16, one guided evaluation."""
    work, whole = guided_on_ranks(STAGE2, FULL_HD, ranks, 2), dit_flops(STAGE2, FULL_HD) * 2
    pieces = ranks if ranks % 2 else ranks // 2
    edges = sequence_edges(TEXT_TOKENS, dit_tokens(STAGE2, FULL_HD), pieces)
    share = whole.total / (ranks * work.flops.total)
    return (
        f"| {ranks} | {edges[1]:,} | {work.flops.total / 1e12:,.0f} | {share:.2%} | {work.keys_values / 1e9:.1f} | "
        f"{(work.patches + work.guidance) / 1e6:.1f} | {work.flops.total / max(work.received, 1) / 1e3:,.0f} |"
    ).replace("%", " %")


def test_the_documented_costs_follow_from_the_formula() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [row(ranks) for ranks in range(2, 17) if row(ranks) not in text]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("text", [0, 1, 6, 100, 226])
@pytest.mark.parametrize("video", [1, 5, 64, 105, 104520])
def test_pieces_cover_the_sequence_and_the_text_is_in_the_first(ranks: int, text: int, video: int) -> None:
    edges = sequence_edges(text, video, ranks)
    if edges is None:
        assert video < ranks * (ranks - 1)
        return
    assert edges[0] == 0 and edges[-1] == text + video and len(edges) == ranks + 1
    sizes = [after - before for before, after in pairwise(edges)]
    assert min(sizes) >= 1 and sizes[0] > text
    assert max(sizes[1:], default=0) <= sizes[0]
    assert len(set(sizes[1:-1])) <= 1
