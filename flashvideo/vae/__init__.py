"""The causal 3D VAE: the network, and the same in tiles and as a stream."""

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
    video_shape,
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
    "video_shape",
]
