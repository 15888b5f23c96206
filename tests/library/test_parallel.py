"""Evaluations of the networks, and the VAE in tiles, on 2, 3 and 4 processes equal those on one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from on_ranks import on_ranks

from flashvideo.parallel import sequence_edges

TOLERANCE = 1e-6  # float32, of numbers below 1, and relative above: products of other sizes round differently
SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    from rank_checks import both

    return both(None)


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"), "rank_checks:both")


@pytest.mark.slow
def test_every_result_equals_one_process_on_every_rank(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for name, expected in alone.items():
        for rank, found in enumerate(together):
            off = float(((found[name] - expected).abs() / (1 + expected.abs())).max())
            assert off <= TOLERANCE, (name, rank, off)
            assert found[name].equal(together[0][name]), (name, rank)


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
