"""Compiles kernels.cpp, once for each version of PyTorch, and makes its operators known to autograd.

Activations are bfloat16 [B, T, H, W, C] or [N, H, W, C], with a multiple of 16 channels.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ....atomic_files import whole_file

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "layout.h", "lanes.h"))
COMPILERS = ("c++", "g++", "clang++")
# Not -march=native: a home folder, and with it the compiled file, may be shared by machines.
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")
OPTIONS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-w", *(f"-m{name}" for name in INSTRUCTIONS))
LANES = 16  # channels that the kernels work on at a time

_log = logging.getLogger(__name__)


@cache
def kernels_problem() -> str | None:
    """Load the kernels, compiled if need be. Returns None, or why they can't be used, in words without a full stop."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not flags.get("avx512_bf16"):
        return "the processor has no avx512_bf16 instructions that PyTorch knows of"
    compiler = _compiler()
    if not compiler:
        return f"there is no C++ compiler (CXX, {', '.join(COMPILERS)})"
    try:
        torch.ops.load_library(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        return f"{compiler[0]} can't compile their kernels ({reason})"
    except OSError as error:
        return f"their kernels can't be loaded ({error})"
    return None


def _compiler() -> list[str]:
    """The command of the C++ compiler; empty if there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    return chosen or next(([name] for name in COMPILERS if shutil.which(name)), [])


def _compiled(compiler: list[str]) -> Path:
    """The compiled kernels, in the user's cache folder. Raises CalledProcessError and OSError."""
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    headers = [f"-I{root / 'include' / folder}" for folder in ("", "torch/csrc/api/include")]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    digest = hashlib.sha256("\0".join((torch.__version__, abi, *compiler, *OPTIONS)).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashvideo"
    target = folder / f"vae_kernels_{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _log.info("Compiling the VAE's kernels, once: %s", target)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            command = [*compiler, *OPTIONS, abi, *headers, str(SOURCES[0]), "-o", str(part), *libraries]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return target


class Modulation(NamedTuple):
    """What a norm's result is multiplied by, and what is added: float32 [B, t, h, w, C], each for a box of positions.

    `frames`: for each frame of the activations, the one here.
    """

    scale: Tensor
    shift: Tensor
    frames: list[int]


def norm_silu_stack(x: Tensor, norm: nn.GroupNorm, modulation: Modulation, before: Tensor | None) -> tuple[Tensor, ...]:
    """Normalise x [B, T, H, W, C], modulate, apply SiLU, and lay frames out for a convolution of three.

    `before` [B, 2, H, W, C]: such frames before these; None: copies of the first. Returns [B * T, H, W, 3 * C], the
    two frames before each and itself side by side, and the last two frames of all, to be the next `before`.
    """
    return _NormSiluStack.apply(x.contiguous(), norm.weight, norm.bias, norm.num_groups, norm.eps, *modulation, before)


def doubled(x: Tensor) -> Tensor:
    """Repeat each pixel in two rows and two columns, [N, H, W, C] -> [N, 2H, 2W, C]."""
    return _Doubled.apply(x.contiguous())


class _NormSiluStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *given: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, groups, _epsilon, scale, shift, frames, before = given
        moments, kept, statistics = torch.ops.flashvideo_vae.norm_silu_stack(*given)
        ctx.save_for_backward(x, statistics, weight, bias, scale, shift)
        ctx.numbers = groups, frames, before is not None
        ctx.set_materialize_grads(False)
        return moments, kept

    @staticmethod
    def backward(ctx: FunctionCtx, moments: Tensor, kept: Tensor | None) -> tuple[Tensor | None, ...]:
        groups, frames, has_before = ctx.numbers
        x, statistics, weight, bias, scale, shift = ctx.saved_tensors
        kept = None if kept is None else kept.contiguous()
        x, weight, bias, scale, shift, before = torch.ops.flashvideo_vae.norm_silu_stack_backward(
            moments.contiguous(), kept, x, statistics, weight, bias, groups, scale, shift, frames, has_before
        )
        return x, weight, bias, None, None, scale, shift, None, before if has_before else None


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        del ctx
        return torch.ops.flashvideo_vae.doubled(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        del ctx
        return torch.ops.flashvideo_vae.doubled_backward(gradient.contiguous())
