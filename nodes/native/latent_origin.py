"""Whose latents they are: a model and a VAE that don't belong together are noticed, though no node sees both.

What a VAE encodes and what a sampler makes is remembered with its family (`flashvideo.nano.latent_family`), by its
numbers. The sampler and the VAE look up what they get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...flashvideo.nano import pair_notice
from .latent_keys import KEY_CHANNELS, KEY_DTYPES, keys_of, probes_of, stored_keys
from .notices import warn
from .schedule_guard import running_node

_REMEMBERED = 64  # latents: at most 32 MB
_MOST = 0.9  # share of a latent's positions that must be known: it may be put together from several


@dataclass(frozen=True)
class _Origin:
    """A latent's family, and the keys of its positions in each data type; one in `step` is stored."""

    family: str
    keys: dict[torch.dtype, Tensor]
    step: int


_remembered: list[_Origin] = []  # the newest last


def remember_origin(samples: Tensor, family: str | None) -> None:
    """Remember whose samples [B, C, ...] these are; nothing where that isn't known."""
    if family is not None and _is_latent(samples):
        _recall(_Origin(family, *stored_keys(samples)))


def origin_of(samples: Tensor) -> str | None:
    """The family of samples [B, C, ...]; None where it isn't known."""
    if not _remembered or not _is_latent(samples):
        return None
    for dtype in KEY_DTYPES:
        keys = keys_of(samples, dtype).flatten()
        for each in reversed(_remembered):
            probes = probes_of(keys, each.step)
            if len(probes) and float(torch.isin(probes, each.keys[dtype]).float().mean()) >= _MOST:
                _recall(each)
                return each.family
    return None


def _recall(origin: _Origin) -> None:
    """Make a latent the newest one; the oldest is forgotten. One that ComfyUI keeps is used for many runs."""
    _remembered[:] = [each for each in _remembered if each is not origin][1 - _REMEMBERED :] + [origin]


def check_origin(samples: Tensor, *, model: str | None = None, vae: str | None = None) -> bool:
    """Warn, on the node that runs, where the latent that a model or a VAE of this family gets is another's.

    Returns whether nothing was found. A family of None is not known.
    """
    family = origin_of(samples)
    notice = pair_notice(model, family) if vae is None else pair_notice(family, vae)
    if notice is not None:
        warn(f"FlashVideo: {notice}", running_node())
    return notice is None


def watch_sampler(
    executor: Callable[..., Tensor], noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """ComfyUI wrapper around a sampler run: warn of another family's latent, and remember the result."""
    family = executor.class_obj.model_patcher.model.latent_family
    fits = check_origin(latent_image, model=family)
    result = executor(noise, latent_image, *args, **kwargs)
    remember_origin(result, family if fits else None)  # one warning a graph: the VAE after it would say the same
    return result


def _is_latent(samples: Tensor) -> bool:
    return (
        isinstance(samples, Tensor) and samples.ndim == 5 and samples.shape[1] >= KEY_CHANNELS and bool(samples.any())
    )
