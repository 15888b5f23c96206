"""What the processes of `forked` need, imported once for all of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import rank_checks  # noqa: F401
import torch._dynamo  # noqa: F401 (counting operations needs it)

import flashvideo.commands.run_generate
import flashvideo.commands.run_refine
import flashvideo.training.tasks.stage2
import flashvideo.training.tasks.vae  # noqa: F401
