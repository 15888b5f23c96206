"""The VAE in a training: it only encodes and decodes, in the memory that the trained networks leave free."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...atomic_files import sha256
from ...checkpoints import load_vae
from ...config import latent_shape, video_shape
from ...devices import free_memory, main_memory
from ...vae import Posterior
from ...vae.memory import STORE_SHARE, VAE_SHARE, TilePlan, decode_bytes, encode_bytes, plan_within
from ...vae.tiles import decode_in_tiles, encode_in_tiles
from ..randomness import generator_for, normal_like


class FrozenVAE:
    """A trained VAE that doesn't learn. It works in tiles where whole pictures don't fit, with the same result.

    On CUDA in bfloat16, as the official code encodes, elsewhere in float32. `room` is how many bytes it may hold on its
    device besides its weights; by default a share of the free memory at each call, if the device reports it (as CUDA).
    """

    def __init__(self, source: Path | Mapping[str, Tensor], device: torch.device, room: float | None = None) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.network = load_vae(source, device=device, dtype=dtype).requires_grad_(False)
        self.source, self.device, self.dtype, self._room = source, device, dtype, room

    @cached_property
    def digest(self) -> str:
        """The file's SHA-256, for results that depend on both encoder and decoder."""
        return sha256(Path(self.source), lambda *_: None)

    @torch.no_grad()
    def encode(self, video: Tensor, seed: int, *names: str | int) -> Tensor:
        """Encode one clip [3, T, H, W] in [-1, 1] to a posterior sample [16, T', h, w], as the official code does."""
        posterior = self.posterior(video[None])
        return posterior.sample(normal_like(posterior.mean, generator_for(seed, *names)))[0]

    @torch.no_grad()
    def posterior(self, video: Tensor) -> Posterior:
        """The posterior of clips [B, 3, T, H, W] in [-1, 1], in float32 on the device."""
        plan = self._plan("encoder", latent_shape(video.shape[2:]), encode_bytes(self.network, video.shape, self.dtype))
        if plan is None:
            found = self.network.encode(video.to(self.device, self.dtype))
        else:
            found = encode_in_tiles(self.network, video.to("cpu", self.dtype), plan, self.device)
        return Posterior(*(part.to(self.device, torch.float32) for part in (found.mean, found.logvar)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, T', h, w] in raw scale to clips [B, 3, T, H, W], one by one, in float32 in main memory."""
        return torch.cat([self._decoded(latent) for latent in latents.to(self.device, self.dtype).split(1)])

    def _decoded(self, latent: Tensor) -> Tensor:
        size = tuple(latent.shape[2:])
        plan = self._plan("decoder", size, decode_bytes(self.network, latent.shape, self.dtype))
        if plan is None:
            return self.network.decode(latent).to("cpu", torch.float32)
        video = torch.empty(1, 3, *video_shape(size), dtype=self.dtype)
        return decode_in_tiles(self.network, latent.cpu(), plan, video, self.device).float()

    def _plan(self, half: str, size: tuple[int, int, int], whole: float) -> TilePlan | None:
        """The tiles for a latent size; None if the whole picture, which takes `whole` bytes, fits."""
        room = self._room
        if room is None:
            free = free_memory(self.device)
            room = None if free is None else VAE_SHARE * free
        on_card = self.device.type != "cpu"
        store = STORE_SHARE * main_memory() if on_card else None
        return plan_within(getattr(self.network, half), size, self.dtype, room, store, needed=whole, on_card=on_card)
