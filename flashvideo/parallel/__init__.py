"""One evaluation on several processes, the ranks: torch.distributed, which torchrun starts. Imported only there."""

from .counting import Traffic
from .ranks import Halves, Ranks
from .sequence import SequencePiece, sequence_edges, sequence_piece

__all__ = ["Halves", "Ranks", "SequencePiece", "Traffic", "sequence_edges", "sequence_piece"]
