"""The causal 3D VAE: the network, whole, in spatial tiles, and as a stream of chunks."""

from .network import (
    DECODE_CHUNK,
    ENCODE_CHUNK,
    Decoder,
    Encoder,
    OnChunk,
    Posterior,
    VideoVAE,
    decode_chunks,
    decode_in_halves,
    encode_chunks,
)

__all__ = [
    "DECODE_CHUNK",
    "ENCODE_CHUNK",
    "Decoder",
    "Encoder",
    "OnChunk",
    "Posterior",
    "VideoVAE",
    "decode_chunks",
    "decode_in_halves",
    "encode_chunks",
]
