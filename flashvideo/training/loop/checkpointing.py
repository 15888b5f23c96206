"""Checkpoints of a training run: written whole or not at all, and read without running code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import atomic_files
from ..errors import TrainingError

LARGE = 16_000  # numbers in a weight, from which on it may be stored in 8 bits
LAST = "last.pt"
BEST = "best.pt"
FORMAT = 1


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to be written, which takes its place at the end: see `atomic_files.whole_file`.

    Makes the folder. Raises TrainingError if there is no room or no permission; the old file is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.whole_file(path) as part:
            yield part
    except atomic_files.WriteError as error:
        raise TrainingError(str(error)) from error
    except Exception as error:
        reason = atomic_files.write_problem(error)
        if reason is None:
            raise
        kept = " The one written before is kept." if path.is_file() else ""
        raise TrainingError(f"{path} can't be written: {reason}.{kept}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through `whole_file`."""
    with whole_file(path) as part, part.open("wb") as file:
        write(file)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state: tensors, numbers, texts, and lists and dicts of them."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises TrainingError if it isn't there, is damaged, or is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: there is no checkpoint to resume from; start without --resume.") from error
    except PermissionError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}.") from error
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, OSError) as error:
        raise TrainingError(f"{path} is damaged, or no checkpoint of this program.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is no checkpoint of this version of the program.")
    return state


def as_stored(
    state: Mapping[str, Tensor], dtype: torch.dtype = torch.float16, *, eight_bits: bool = False
) -> dict[str, Tensor]:
    """Weights as a file holds them: in half precision, with `eight_bits` the large ones in float8 (e4m3).

    FlashVideo-Nano's networks lose 0.01 dB or less by it.
    """
    small = torch.float8_e4m3fn if eight_bits else dtype
    kinds = {name: small if tensor.numel() >= LARGE else dtype for name, tensor in state.items()}
    return {name: tensor.detach().cpu().to(kinds[name]).contiguous() for name, tensor in state.items()}


def export_weights(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype = torch.float16,
    *,
    eight_bits: bool = False,
) -> None:
    """Write weights as safetensors, whole or not at all; see `as_stored`.

    Raises TrainingError if a number doesn't fit the data type.
    """
    stored = as_stored(state, dtype, eight_bits=eight_bits)
    for name, tensor in stored.items():
        # Compared with what it was: float8 may make a number that is too large its largest.
        largest = state[name].detach().abs().amax().item() if tensor.numel() else 0.0
        if not largest <= torch.finfo(tensor.dtype).max:
            raise TrainingError(f"{path.name} was not written: {name} doesn't fit {str(tensor.dtype).split('.')[1]}.")
    with whole_file(path) as part:
        save_file(stored, part, metadata={"format": "pt", **metadata})
