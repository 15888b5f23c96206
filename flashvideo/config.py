"""Architecture numbers of the networks, and what a user can choose, with its defaults. Needs no PyTorch.

Sources: FlashVideo (arXiv 2502.05179) section 3 and the published checkpoints' shapes; the VAE is
CogVideoX's (arXiv 2408.06072).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

TEXT_TOKENS = 226  # T5 tokens of a prompt, padding included
TEMPORAL_FACTOR = 4  # video frames to one latent frame, after the first
SPATIAL_FACTOR = 8  # pixels to one latent pixel
PIXEL_MULTIPLE = 16  # SPATIAL_FACTOR times the DiT's patch size
TRAIN_STEPS = 1000  # of noise: what both stages' timesteps and strengths count
MAX_SEED = 2**64 - 1  # of torch's generators and of ComfyUI's samplers
STAGE1_LATENT_SCALE = 0.7  # CogVideoX-5B
STAGE2_LATENT_SCALE = 1.15258426  # CogVideoX-2B

# What a user can choose.
AUTO = "auto"
SIZE_MODES = ("short side", "scale", "exact", "keep")
RESAMPLERS = ("bilinear", "bicubic", "area", "nearest-exact")
COLOR_MATCHES = ("none", "wavelet", "adain")
DETAIL_SIZE = 70  # pixels: half of a pattern this long is low band, half is detail
MIN_DETAIL_SIZE, MAX_DETAIL_SIZE = 5, 1000
NANO_DETAIL_SIZE = 9  # the miniature is trained on drafts a quarter as large, whose shortest pattern is 8 pixels long
NANO_RESAMPLER = "bicubic"  # for real footage: what the networks add to is sharper than with bilinear
NANO_DETAIL_GAIN = 3.5  # the miniature for real footage makes detail too weak: docs/nano_footage.md
NO_MOTION = "none"
MOTIONS = (NO_MOTION, "very low", "low", "medium", "high", "very high")
SOLVERS = ("euler", "heun")
DEGRADATION_STEP = 675  # 650 to 750 is useful at the official size
STAGE1_SCALE = 8.0  # guidance; 6 to 8 is useful
STAGE2_SCALE = 13.0  # guidance; 10 to 13 is useful
STAGE2_SHIFT = 2.5  # FlashVideo's inference setting; 2 to 3.5 is useful
WINDOW = 49  # frames: what the refiner was trained on
OVERLAP_FRAMES = 16  # frames
TILE = 768  # pixels: about a quarter of 1080p
DTYPES = ("float32", "bfloat16", "float16")  # of networks, as PyTorch calls them
FILE_DTYPES = (  # of converted files
    *("keep", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_scaled", "int8", "mxfp8", "nvfp4"),
    *("gguf_q4_0", "gguf_q4_1", "gguf_q5_0", "gguf_q5_1", "gguf_q8_0"),
)


def latent_frames(frames: int) -> int:
    """Latent frames of a video of 4n + 1 frames, or of any chunk of a longer one."""
    return (frames - 1) // TEMPORAL_FACTOR + 1


def video_frames(latents: int, *, first: bool = True) -> int:
    """Frames that latent frames stand for; the very first of a video stands for a single one."""
    return TEMPORAL_FACTOR * latents - (TEMPORAL_FACTOR - 1 if first else 0)


def is_video_length(frames: int) -> bool:
    """Whether a video can have so many frames: 4n + 1, which are 1, 5, 9, ..."""
    return frames >= 1 and frames % TEMPORAL_FACTOR == 1


def next_video_length(frames: int) -> int:
    """The smallest length of 4n + 1 frames that isn't shorter."""
    return video_frames(latent_frames(max(1, frames) + TEMPORAL_FACTOR - 1))


def latent_shape(video: Sequence[int]) -> tuple[int, int, int]:
    """(T, H, W) of a latent from its video's, in frames and pixels."""
    frames, height, width = video
    return latent_frames(frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def video_shape(latent: Sequence[int]) -> tuple[int, int, int]:
    """(T, H, W) of a video, in frames and pixels, from its latent's."""
    frames, rows, columns = latent
    return video_frames(frames), SPATIAL_FACTOR * rows, SPATIAL_FACTOR * columns


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


@dataclass(frozen=True)
class T5Config:
    """Numbers of a T5 v1.1 encoder (arXiv 1910.10683): gated GELU, no biases, relative positions in the first layer.

    The names are those of the Hugging Face configuration file.
    """

    num_layers: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    vocab_size: int = 32128


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
T5_POSITION_BUCKETS = 32

# A token of 2 x 2 latent pixels is 16 x 16 pixels: a fourth of a draft's height, too coarse for a shape; and in
# refined videos each such block is painted almost by itself.
NANO_STAGE1 = DiTConfig(
    num_layers=9, hidden_size=128, num_heads=2, time_embed_dim=64, text_dim=48, ff_dim=512, patch_size=1
)
NANO_STAGE2 = replace(NANO_STAGE1, num_layers=4, degradation_embedding=True, frame_count_embedding=True)
NANO_VAE = VAEConfig(16, (1, 2, 2, 4), encoder_blocks=1, decoder_blocks=2, norm_groups=16)
# For real footage, beside those for drawn scenes: what moves in it needs a wider VAE and a deeper stage II.
NANO_FOOTAGE_STAGE2 = replace(NANO_STAGE2, num_layers=12)
NANO_FOOTAGE_VAE = VAEConfig(16, (1, 2, 6, 8), encoder_blocks=1, decoder_blocks=2, norm_groups=4)
NANO_REFINERS = (NANO_STAGE2, NANO_FOOTAGE_STAGE2)
NANO_TEXT_ENCODER = T5Config(num_layers=3, d_model=48, d_ff=128, d_kv=16, num_heads=4)
NANO_STRENGTH = 60  # of the refiner: the official 675 hides shapes that are few latent pixels large
