"""Weights of 8 bits with scale factors, in the layout that ComfyUI's quantised layers read.

Of a layer's matrix [out, in] a file holds `weight` in 8 bits, `weight_scale` in float32, and `comfy_quant`: bytes of
JSON that name the format. The matrix is weight * weight_scale. Only the matrices of the transformer's layers are
quantised: they are 99 % of the numbers, and everything else keeps its precision.

- "fp8_scaled": float8 (4 bits of exponent, 3 of mantissa), one scale for the matrix, which maps its largest number to
  448.
- "int8": whole numbers of -127 to 127, one scale for each row (one output), which maps the row's largest number to 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import QUANTISATION, CheckpointError, Weights, short

SCALE, FORMAT = "weight_scale", "comfy_quant"  # beside a layer's `weight`
_MAX_JSON = 4096  # bytes of a layer's description


@dataclass(frozen=True)
class Format:
    """A way to store a matrix in 8 bits. `core_name` is ComfyUI's word for it."""

    core_name: str
    dtype: torch.dtype
    largest: float
    by_row: bool

    def quantise(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, weight_scale) of a matrix [out, in]; the scale is [out, 1] or a single number, float32."""
        matrix = matrix.float()
        extent = matrix.abs().amax(dim=1, keepdim=True) if self.by_row else matrix.abs().amax()
        scale = extent.clamp_min(torch.finfo(torch.float32).tiny * self.largest) / self.largest
        scaled = (matrix / scale).clamp(-self.largest, self.largest)
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype), scale

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of `weight_scale` for a matrix of so many rows."""
        return (rows, 1) if self.by_row else ()

    def description(self, **more: bool) -> Tensor:
        """A layer's `comfy_quant`, with more settings by ComfyUI's names."""
        return torch.tensor(list(json.dumps({"format": self.core_name, **more}).encode()), dtype=torch.uint8)


FORMATS = {
    "fp8_scaled": Format("float8_e4m3fn", torch.float8_e4m3fn, 448.0, by_row=False),
    "int8": Format("int8_tensorwise", torch.int8, 127.0, by_row=True),
}


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """The matrix [out, in] in float32."""
    return weight.float() * scale.float()


def relative_error(matrix: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Root mean square of what quantising changed, relative to the matrix's own; 0 for a matrix of zeros."""
    matrix = matrix.float()
    return float((dequantise(weight, scale) - matrix).norm() / matrix.norm().clamp_min(1e-30))


def quantised_layers(weights: Weights, sources: Mapping[str, str]) -> dict[str, Format] | None:
    """The formats of a file's quantised layers by name, empty if there are none; None for a format not known here.

    `sources` maps a network's names to the file's keys. Raises CheckpointError for scales that don't fit.
    """
    ours = {form.core_name: form for form in FORMATS.values()}
    layers: dict[str, Format] = {}
    for name in (name for name in sources if name.endswith(f".{FORMAT}")):
        layer = name.removesuffix(f".{FORMAT}")
        form = ours.get(_format(weights, sources[name]))
        if form is None:
            return None
        keys = [sources.get(f"{layer}.{what}") for what in ("weight", SCALE)]
        if None in keys:
            raise CheckpointError(f"{weights.label}: {layer} is quantised, and its weight or its scale is missing.")
        matrix, scale = (weights.shapes[key] for key in keys)
        if weights.dtypes[keys[0]] != form.dtype or scale not in ((), (1,), form.scale_shape(matrix[0])):
            raise CheckpointError(
                f"{weights.label}: {layer} should be of the format {form.core_name}, and its weight or scale isn't."
            )
        layers[layer] = form
    known = {f"{layer}.{what}" for layer in layers for what in (SCALE, FORMAT)}
    eight_bit = {name for name, key in sources.items() if name.endswith(".weight") and _is_packed(weights.dtypes[key])}
    lonely = eight_bit - {f"{layer}.weight" for layer in layers}
    scales = {name for name in sources if QUANTISATION.search(name)}
    return None if lonely or scales - known else layers


def _is_packed(dtype: torch.dtype | None) -> bool:
    return dtype is None or not dtype.is_floating_point


def _format(weights: Weights, key: str) -> str:
    shape = weights.shapes[key]
    if weights.dtypes[key] != torch.uint8 or len(shape) != 1 or shape[0] > _MAX_JSON:
        return ""
    try:
        said = json.loads(bytes(weights.read(key).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: {key} should say a format and is damaged ({short(error)}).") from error
    # Other settings, such as rotations, make other numbers of the same bytes.
    plain = isinstance(said, dict) and set(said) <= {"format", "full_precision_matrix_mult"}
    return str(said.get("format")) if plain else ""
