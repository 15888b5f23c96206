"""Weights of 8 and 4 bits with scale factors, in the layouts that ComfyUI's quantised layers read.

Of a layer's matrix [out, in] a file holds `weight`, scale factors, and `comfy_quant`: bytes of JSON that name the
format. Only the matrices of the transformer's layers are quantised: they are 99 % of the numbers, and everything else
keeps its precision.

- "fp8_scaled": float8 (4 bits of exponent, 3 of mantissa), one scale for the matrix, which maps its largest number to
  448. The matrix is weight * weight_scale.
- "int8": whole numbers of -127 to 127, one scale for each row (one output), which maps the row's largest number to 127.
- "mxfp8": float8, a power of two for each 32 numbers of a row (OCP Microscaling Formats 1.0).
- "nvfp4": numbers of 4 bits, two in a byte, a float8 scale for each 16 numbers of a row, and a float32 one
  (`weight_scale_2`) for the matrix.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .weights import QUANTISATION, CheckpointError, Weights, short, some

SCALE, SCALE_2, FORMAT = "weight_scale", "weight_scale_2", "comfy_quant"  # beside a layer's `weight`
_INPUT_SCALE = "input_scale"  # for products in 8 bits, which are not made here
_MAX_JSON = 4096  # bytes of a layer's description
_TINY = torch.finfo(torch.float32).tiny
_E8M0_BIAS = 127  # the byte of a power of two is its exponent plus this
# Positive numbers of 4 bits by their code; code + 8 is the negative one.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_LARGEST = 6.0


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a matrix. `core_name` is ComfyUI's word for it; `dtype` and `largest` are those of `weight`."""

    core_name: str
    dtype: torch.dtype
    largest: float
    settings: tuple[str, ...] = ()  # tensors that may be beside the layer, and change nothing here

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Data types and shapes of what is stored of a matrix of `shape` [out, in], by their names."""

    @abstractmethod
    def quantise(self, matrix: Tensor) -> dict[str, Tensor]:
        """What is stored of a matrix [out, in], by the names of `layout`."""

    @abstractmethod
    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] in float32; `parts` may hold more than is needed."""

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the scale factors."""
        return (SCALE,)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of `shape` [out, in] can be stored so."""
        return len(shape) == 2

    def scale_values(self, scale: Tensor) -> Tensor:
        """What `weight_scale` says as numbers of a floating-point type."""
        return scale

    def accepts(self, what: str, dtype: torch.dtype | None, shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
        """Whether the tensor `what` of a file can be that of a layer whose matrix has the shape `matrix`."""
        expected, stored = self.layout(matrix)[what]
        single = shape == (1,) and stored == ()
        return dtype == expected and (single or shape == stored)

    def description(self, **more: bool) -> Tensor:
        """A layer's `comfy_quant`, with more settings by ComfyUI's names."""
        return torch.tensor(list(json.dumps({"format": self.core_name, **more}).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class ScaledFormat(Format):
    """One scale for a matrix or for each of its rows, float32."""

    by_row: bool = False

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """As Format's."""
        scale = (shape[0], 1) if self.by_row else ()
        return {"weight": (self.dtype, shape), SCALE: (torch.float32, scale)}

    def quantise(self, matrix: Tensor) -> dict[str, Tensor]:
        """As Format's."""
        matrix = matrix.float()
        extent = matrix.abs().amax(dim=1, keepdim=True) if self.by_row else matrix.abs().amax()
        scale = extent.clamp_min(_TINY * self.largest) / self.largest
        scaled = (matrix / scale).clamp(-self.largest, self.largest)
        return {"weight": (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype), SCALE: scale}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As Format's."""
        return parts["weight"].float() * parts[SCALE].float()

    def accepts(self, what: str, dtype: torch.dtype | None, shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
        """As Format's. A scale may have any floating-point type, and may be one for the matrix."""
        if what == SCALE:
            return dtype is not None and dtype.is_floating_point and shape in ((), (1,), self.layout(matrix)[SCALE][1])
        return super().accepts(what, dtype, shape, matrix)


@dataclass(frozen=True)
class BlockFormat(Format):
    """A scale for each `block` numbers of a row, in the order in which tensor cores read them."""

    block: int = 32
    scale_types: tuple[str, ...] = ("uint8", "float8_e8m0fnu")  # that files may say; the first is written

    def fits(self, shape: tuple[int, ...]) -> bool:
        """As Format's. ComfyUI pads other matrices, which none of the known networks has."""
        return len(shape) == 2 and not any(side % self.block for side in shape)

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """As Format's."""
        scale = _swizzled_shape(shape[0], shape[1] // self.block)
        return {"weight": (self.dtype, shape), SCALE: (getattr(torch, self.scale_types[0]), scale)}

    def accepts(self, what: str, dtype: torch.dtype | None, shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
        """As Format's. Scales may be plain bytes."""
        if what == SCALE and str(dtype).removeprefix("torch.") in self.scale_types:
            dtype = self.layout(matrix)[SCALE][0]
        return self.fits(matrix) and super().accepts(what, dtype, shape, matrix)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] as [out, blocks, numbers of one]."""
        return matrix.reshape(matrix.shape[0], -1, self.block)

    def _scales(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Scales of the blocks [out, blocks, 1], float32."""
        scales = _unswizzled(parts[SCALE].view(torch.uint8), rows, columns // self.block)
        return self.scale_values(scales).float()[..., None]


@dataclass(frozen=True)
class MxFp8(BlockFormat):
    """float8 with a power of two for each block."""

    def quantise(self, matrix: Tensor) -> dict[str, Tensor]:
        """As Format's."""
        blocks = self._blocks(matrix.float())
        extent = blocks.abs().amax(dim=-1)
        mantissa, exponent = torch.frexp(extent / self.largest)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # the least power of two that is large enough
        exponent = exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS)
        codes = torch.where(extent == 0, 0, exponent + _E8M0_BIAS).to(torch.uint8)
        scaled = (blocks / self.scale_values(codes)[..., None]).clamp(-self.largest, self.largest)
        return {"weight": scaled.reshape(matrix.shape).to(self.dtype), SCALE: _swizzled(codes)}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As Format's."""
        weight = parts["weight"]
        return (self._blocks(weight.float()) * self._scales(parts, *weight.shape)).reshape(weight.shape)

    def scale_values(self, scale: Tensor) -> Tensor:
        """As Format's."""
        codes = scale.view(torch.uint8).int()
        # The bits of a float32, whose exponent has the same bias; the code of NaN becomes infinity.
        return torch.where(codes == 0, 1 << 22, codes << 23).view(torch.float32)


@dataclass(frozen=True)
class NvFp4(BlockFormat):
    """4 bits (2 of exponent, 1 of mantissa) with a float8 scale for each block, and one for the matrix."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """As Format's."""
        packed = (self.dtype, (shape[0], shape[1] // 2))
        return {**super().layout(shape), "weight": packed, SCALE_2: (torch.float32, ())}

    @property
    def scales(self) -> tuple[str, ...]:
        """As Format's."""
        return (SCALE, SCALE_2)

    def quantise(self, matrix: Tensor) -> dict[str, Tensor]:
        """As Format's."""
        matrix = matrix.float()
        blocks, largest_scale = self._blocks(matrix), torch.finfo(torch.float8_e4m3fn).max
        whole = matrix.abs().amax().clamp_min(_TINY * largest_scale * self.largest) / (largest_scale * self.largest)
        scales = (blocks.abs().amax(dim=-1) / self.largest / whole).clamp(max=largest_scale).to(torch.float8_e4m3fn)
        steps = (whole * scales.float())[..., None]
        scaled = torch.where(steps == 0, 0, blocks / steps)
        codes = _fp4_codes(scaled).reshape(matrix.shape)
        weight = codes[:, ::2] << 4 | codes[:, 1::2]
        return {"weight": weight, SCALE: _swizzled(scales.view(torch.uint8)).view(scales.dtype), SCALE_2: whole}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As Format's."""
        packed = parts["weight"]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        numbers = torch.cat((_FP4, -_FP4))[codes.int()]
        steps = parts[SCALE_2].float() * self._scales(parts, *codes.shape)
        return (self._blocks(numbers) * steps).reshape(codes.shape)

    def scale_values(self, scale: Tensor) -> Tensor:
        """As Format's."""
        return scale.view(torch.float8_e4m3fn)


def _fp4_codes(numbers: Tensor) -> Tensor:
    """The nearest numbers of 4 bits, uint8; of two that are equally near, the one with an even code."""
    between = (_FP4[1:] + _FP4[:-1]) / 2
    # A number on a boundary goes down; where that code is odd, it must go up.
    between[1::2] = torch.nextafter(between[1::2], torch.zeros(()))
    codes = torch.bucketize(numbers.abs(), between)
    return (codes + 8 * torch.signbit(numbers)).to(torch.uint8)


def _swizzled_shape(rows: int, blocks: int) -> tuple[int, int]:
    return 128 * math.ceil(rows / 128), 4 * math.ceil(blocks / 4)


def _swizzled(scales: Tensor) -> Tensor:
    """Bytes [rows, blocks of a row] in the order of cuBLAS's "1D block scaling factors layout", padded with zeros."""
    rows, blocks = scales.shape
    tall, wide = _swizzled_shape(rows, blocks)
    padded = torch.nn.functional.pad(scales, (0, wide - blocks, 0, tall - rows))
    return rearrange(padded, "(i four lane) (j k) -> (i j lane four k)", four=4, lane=32, k=4).reshape(tall, wide)


def _unswizzled(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of `_swizzled`."""
    tall, wide = _swizzled_shape(rows, blocks)
    order = {"i": tall // 128, "j": wide // 4, "lane": 32, "four": 4}
    return rearrange(scales.flatten(), "(i j lane four k) -> (i four lane) (j k)", **order)[:rows, :blocks]


FORMATS = {
    "fp8_scaled": ScaledFormat("float8_e4m3fn", torch.float8_e4m3fn, 448.0, (_INPUT_SCALE,)),
    "int8": ScaledFormat("int8_tensorwise", torch.int8, 127.0, by_row=True),
    "mxfp8": MxFp8("mxfp8", torch.float8_e4m3fn, 448.0, (_INPUT_SCALE,)),
    "nvfp4": NvFp4("nvfp4", torch.uint8, _FP4_LARGEST, (_INPUT_SCALE,), 16, ("float8_e4m3fn", "uint8")),
}
_READ_ONLY = (ScaledFormat("float8_e5m2", torch.float8_e5m2, 57344.0, (_INPUT_SCALE,)),)
_KNOWN = {form.core_name: form for form in (*FORMATS.values(), *_READ_ONLY)}


def relative_error(matrix: Tensor, form: Format, parts: Mapping[str, Tensor]) -> float:
    """Root mean square of what quantising changed, relative to the matrix's own; 0 for a matrix of zeros."""
    matrix = matrix.double()
    return float((form.dequantise(parts) - matrix).norm() / matrix.norm().clamp_min(1e-30))


def unreadable(label: str, formats: Iterable[str] = ()) -> CheckpointError:
    """The error for a file that is quantised in another way, with the names of the formats if they are known."""
    named = some(sorted({name for name in formats if name}))
    return CheckpointError(
        f"{label} is quantised in a way that FlashVideo's loaders don't read{f' ({named})' if named else ''}. Use the "
        "file that it was made from: `python -m flashvideo convert --to int8` makes one that they do read, and "
        "weight_dtype fp8_e4m3fn of Load FlashVideo Model is equally small."
    )


def quantised_layers(
    weights: Weights, sources: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Format]:
    """The formats of a file's quantised layers by name.

    `sources` maps a network's names to the file's keys, and `shapes` to the shapes of its own weights. Raises
    CheckpointError for formats not known here, and for weights and scales that don't fit.
    """
    marks = [name for name in sources if name.endswith(f".{FORMAT}")]
    named = {name.removesuffix(f".{FORMAT}"): _format(weights, sources[name]) for name in marks}
    layers = {layer: _KNOWN[name] for layer, name in named.items() if name in _KNOWN}
    known = set()
    for layer, form in layers.items():
        matrix = shapes.get(f"{layer}.weight", ())
        parts = {what: sources.get(f"{layer}.{what}") for what in (form.layout(matrix) if len(matrix) == 2 else ())}
        if not parts or None in parts.values():
            raise CheckpointError(f"{weights.label}: {layer} is quantised, and its weight or its scale is missing.")
        wrong = [
            what
            for what, key in parts.items()
            if not form.accepts(what, weights.dtypes[key], weights.shapes[key], matrix)
        ]
        if wrong:
            raise CheckpointError(
                f"{weights.label}: {layer} should be of the format {form.core_name}, and its {wrong[0]} has another "
                "data type or shape."
            )
        known |= {f"{layer}.{what}" for what in (*parts, *form.settings, FORMAT)}
    eight_bit = {name for name, key in sources.items() if name.endswith(".weight") and _is_packed(weights.dtypes[key])}
    if not layers or (eight_bit | {name for name in sources if QUANTISATION.search(name)}) - known:
        raise unreadable(weights.label, set(named.values()) - set(_KNOWN))
    return layers


def _is_packed(dtype: torch.dtype | None) -> bool:
    return dtype is None or not dtype.is_floating_point


def _format(weights: Weights, key: str) -> str:
    """ComfyUI's name of a layer's format, with the settings that make other numbers of the same bytes."""
    shape = weights.shapes[key]
    if weights.dtypes[key] != torch.uint8 or len(shape) != 1 or shape[0] > _MAX_JSON:
        return ""
    try:
        said = json.loads(bytes(weights.read(key).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: {key} should say a format and is damaged ({short(error)}).") from error
    if not isinstance(said, dict):
        return ""
    settings = sorted(set(said) - {"format", "full_precision_matrix_mult"})  # rotations, for example
    return " with ".join(map(str, (said.get("format"), *settings)))
