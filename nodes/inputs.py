"""What arrives at a node's inputs, checked against the node's own schema before anything runs.

ComfyUI checks what stands in widgets, but no choice of a list (0.3.75) and nothing that comes through a wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from numbers import Real
from typing import Any

import comfy.model_patcher
from comfy_api.latest import io
from torch import Tensor

_LOADED = "_name"  # ends the inputs that name a file: the loaders check those themselves, and say what to put where
_NODES_WORD = {"CLIP", "VAE"}  # the nodes say more about these than that they are empty
Execute = Callable[..., io.NodeOutput]


def checked(execute: Execute) -> Execute:
    """Decorate a node's `execute`: it then gets numbers, choices and kinds of objects as its schema says.

    Whole numbers that arrive as floats are converted. Raises ValueError, with the node's name in front.
    """
    parameters = signature(execute)
    (rest,) = [name for name, each in parameters.parameters.items() if each.kind is Parameter.VAR_KEYWORD] or [None]

    @wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = parameters.bind(cls, *args, **kwargs)
        schema = cls.define_schema()
        for port in schema.inputs:
            values = given.arguments if port.id in given.arguments else given.arguments.get(rest, {})
            if port.id in values:
                try:
                    values[port.id] = _checked_value(port, values[port.id])
                except ValueError as error:
                    raise ValueError(f"{schema.display_name}: {error}") from None
        return execute(*given.args, **given.kwargs)

    return run


def _checked_value(port: Any, value: Any) -> Any:
    kind = port.io_type
    if value is None and port.optional:
        return getattr(port, "default", None)
    if value is None and kind in _NODES_WORD:
        return value
    if value is None:
        raise ValueError(f"{port.id} is empty: the node that it is connected to gave nothing")
    if kind in ("INT", "FLOAT"):
        return _number(port, value, whole=kind == "INT")
    if kind == "COMBO" and port.id.endswith(_LOADED):
        kind = "STRING"
    elif kind == "COMBO" and value not in port.options:
        raise ValueError(f"{port.id} must be one of {', '.join(map(str, port.options))}; got {value!r}")
    expected, check = _KINDS.get(kind, ("", lambda _: True))
    if not check(value):
        raise ValueError(f"{port.id} must be {expected}; got {type(value).__name__}")
    return value


def _number(port: Any, value: Any, *, whole: bool) -> float | int:
    """A number within the port's range. The limits are part of the message."""
    kind = "a whole number" if whole else "a number"
    limits = f"{port.id} must be {kind} from {port.min} to {port.max}"
    if not isinstance(value, Real) or not math.isfinite(value) or (whole and value != int(value)):
        raise ValueError(f"{limits}; got {value!r}")
    if not port.min <= value <= port.max:
        raise ValueError(f"{limits}; got {value}")
    return int(value) if whole else float(value)


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list | tuple) and len(each) == 2 and isinstance(each[0], Tensor) for each in value
    )


# By ComfyUI's name of a type: what it is in words, and how it is recognised.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "IMAGE": ("frames (an IMAGE)", lambda value: isinstance(value, Tensor)),
    "MASK": ("a MASK", lambda value: isinstance(value, Tensor)),
    "LATENT": ("a LATENT", lambda value: isinstance(value, dict) and "samples" in value),
    "MODEL": ("a MODEL", lambda value: isinstance(value, comfy.model_patcher.ModelPatcher)),
    "CONDITIONING": ("a CONDITIONING, from FlashVideo Prompt", _is_conditioning),
    "CLIP": ("a CLIP", lambda value: hasattr(value, "tokenize")),
    "STRING": ("a text", lambda value: isinstance(value, str)),
    "BOOLEAN": ("on or off", lambda value: isinstance(value, bool | int)),
}
