"""One evaluation on several processes, the ranks: torch.distributed, which torchrun starts. Imported only there."""

from .counting import Traffic
from .ranks import Halves, RankEndedError, Ranks, RefusedError, agree
from .sequence import SequencePiece, sequence_edges, sequence_piece

__all__ = [
    "Halves",
    "RankEndedError",
    "Ranks",
    "RefusedError",
    "SequencePiece",
    "Traffic",
    "agree",
    "sequence_edges",
    "sequence_piece",
]
