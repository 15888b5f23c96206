"""What the processes of `on_ranks` need, imported once for all of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import rank_checks  # noqa: F401
