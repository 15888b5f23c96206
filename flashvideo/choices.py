"""What a user can choose, and its defaults: names, sizes, strengths. Help shows them at once, without PyTorch."""

from __future__ import annotations

AUTO = "auto"
SIZE_MODES = ("short side", "scale", "exact", "keep")
RESAMPLERS = ("bilinear", "bicubic", "area", "nearest-exact")
COLOR_MATCHES = ("none", "wavelet", "adain")
DETAIL_SIZE = 70  # pixels: half of a pattern this long is low band, half is detail
MIN_DETAIL_SIZE, MAX_DETAIL_SIZE = 5, 1000
NANO_DETAIL_SIZE = 9  # the miniature is trained on drafts a quarter as large, whose shortest pattern is 8 pixels long
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
    *("keep", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_scaled", "int8"),
    *("gguf_q4_0", "gguf_q4_1", "gguf_q5_0", "gguf_q5_1", "gguf_q8_0"),
)
