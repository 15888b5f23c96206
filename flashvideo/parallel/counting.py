"""What ranks send each other, counted where it is sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Kinds of messages.
KEYS_VALUES, PATCHES, GUIDANCE = "keys and values", "patches", "guidance"
STATISTICS, PICTURES, STATE, GRADIENTS = "statistics", "pictures", "state", "gradients"


@dataclass
class Traffic:
    """Bytes that this rank has received, and messages, by kind."""

    received: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, size: int) -> None:
        """Count a message of `size` bytes from other ranks."""
        self.received[kind] += size
        self.messages[kind] += 1
