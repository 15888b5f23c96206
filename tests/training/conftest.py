"""Training, without ComfyUI: networks learn for a few steps, in this process and in others."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share
from alone import *  # noqa: F403
