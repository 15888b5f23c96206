"""One half of the VAE as a stream: chunks go in one by one, and it can be put aside between any two of them.

The same chunks through `VideoVAE.encode` or `decode` give the same numbers; here nobody has to hold the whole video.
What one chunk leaves for the next can be saved and restored, so that an interrupted run goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .vae import Decoder, Encoder, Posterior
from .vae_layers import ChunkContext


class VAEStream:
    """The encoder or the decoder over chunks of the given sizes: those of `encode_chunks` or `decode_chunks`.

    The encoder takes videos [1, 3, t, H, W] in [-1, 1] and gives moments (see `latent_of`), the decoder takes latents
    [1, 16, t, h, w] in raw scale and gives videos in about [-1, 1].
    """

    def __init__(self, network: Encoder | Decoder, sizes: Sequence[int]) -> None:
        self.network, self.sizes = network, sizes
        self.done = 0  # chunks
        self._context = ChunkContext()

    def __call__(self, chunk: Tensor) -> Tensor:
        """The network's output for the next chunk [1, C, t, H, W]. Raises ValueError for one of another length."""
        if self.done == len(self.sizes) or chunk.shape[2] != self.sizes[self.done]:
            wanted = self.sizes[self.done : self.done + 1] or "none"
            raise ValueError(f"chunk {self.done} of {len(self.sizes)} must have {wanted} frames; got {chunk.shape[2]}")
        self._context.last = self.done == len(self.sizes) - 1
        result = self._evaluate(chunk)
        self._context.first = False
        self.done += 1
        return result

    def _evaluate(self, chunk: Tensor) -> Tensor:
        return self.network(chunk, self._context)

    def state(self) -> dict[str, Tensor]:
        """What the chunks so far leave for the next, by the names of the layers; the tensors are not copied."""
        names = {module: name for name, module in self.network.named_modules()}
        return {names[module]: tensor for module, tensor in self._context.past.items()}

    def restore(self, done: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Go on after `done` chunks with what `state` gave then."""
        self.done = done
        self._context.first = done == 0
        self._context.past = {self.network.get_submodule(name): tensor.to(device) for name, tensor in tensors.items()}


def latent_of(moments: Tensor) -> Tensor:
    """The likeliest latent [B, 16, t, h, w], raw scale, of an encoder's output [B, 32, t, h, w]."""
    return Posterior(*moments.chunk(2, dim=1)).mode()
