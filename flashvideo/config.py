"""Architecture numbers of the networks: stage I, stage II, the video VAE and the miniature.

Sources: FlashVideo (arXiv 2502.05179) section 3 and the published checkpoints' shapes; the VAE is
CogVideoX's (arXiv 2408.06072).
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_TOKENS = 226  # T5 tokens of a prompt, padding included
TEMPORAL_FACTOR = 4  # video frames to one latent frame, after the first
SPATIAL_FACTOR = 8  # pixels to one latent pixel
PIXEL_MULTIPLE = 16  # SPATIAL_FACTOR times the DiT's patch size
STAGE1_LATENT_SCALE = 0.7  # CogVideoX-5B
STAGE2_LATENT_SCALE = 1.15258426  # CogVideoX-2B


@dataclass(frozen=True)
class DiTConfig:
    """Numbers of one diffusion transformer. All come from the weights' shapes but `head_dim`'s split."""

    num_layers: int
    hidden_size: int
    num_heads: int
    time_embed_dim: int
    text_dim: int
    ff_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    degradation_embedding: bool = False  # stage II: knows how far its input was degraded
    frame_count_embedding: bool = False  # stage II: knows how many latent frames there are

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def stage(self) -> int:
        """1 for the draft model, 2 for the refiner."""
        return 2 if self.degradation_embedding else 1


@dataclass(frozen=True)
class VAEConfig:
    """Numbers of the causal 3D VAE. `encoder_blocks` and `decoder_blocks` count residual blocks a level."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    latent_channels: int = 16
    image_channels: int = 3
    norm_groups: int = 32


STAGE1 = DiTConfig(num_layers=42, hidden_size=3072, num_heads=48, time_embed_dim=512, text_dim=4096, ff_dim=12288)
STAGE2 = DiTConfig(
    num_layers=30,
    hidden_size=1920,
    num_heads=30,
    time_embed_dim=512,
    text_dim=4096,
    ff_dim=7680,
    degradation_embedding=True,
    frame_count_embedding=True,
)
VAE = VAEConfig(base_channels=128, channel_multipliers=(1, 2, 2, 4), encoder_blocks=3, decoder_blocks=4)
