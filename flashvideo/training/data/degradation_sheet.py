"""A picture of every degradation, for the documentation.

python -m flashvideo.training.data.degradation_sheet FILE.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...nano import nano_state
from ..loop.metrics import save_picture, sheet
from ..randomness import generator_for, normal_like
from ..scenes.stream import SceneStream
from .degradations import (
    RESAMPLERS,
    StrongDegradation,
    add_gaussian_noise,
    add_photon_noise,
    degrade_latents,
    filter_frames,
    gaussian_kernel,
    resize_frames,
    shrink_and_enlarge,
    sinc_kernel,
)
from .frozen_vae import FrozenVAE
from .latents import enlarged_draft
from .video_compression import compress_h264, compress_jpeg, compress_mpeg4

SIZE = (128, 208)  # height and width of a clip
FRAMES = 9
COLUMNS = 4
GAP = 6
COLOURS = 256  # of the palette; noise would make a large file otherwise
SCENES, SCENE = 7, 2  # seed and index of the scene shown
STRONG = 4  # how many draws of the whole strong degradation


@torch.no_grad()
def degraded_clips(video: Tensor) -> list[tuple[str, Tensor]]:
    """Each degradation of a clip [3, T, H, W] in [-1, 1] at a setting that can be seen, with its name."""
    generator = generator_for(SCENES, "degradations")
    height, width = video.shape[-2:]
    steps = torch.tensor([600])
    vae = FrozenVAE(nano_state("vae"), torch.device("cpu"))
    clips = [
        ("clean", video),
        ("weak, factor 4", shrink_and_enlarge(video, 4)),
        ("weak, factor 8", shrink_and_enlarge(video, 8)),
        ("blur, sigma 2", filter_frames(video, gaussian_kernel(2, 2))),
        ("oblong blur, 3 and 0.5", filter_frames(video, gaussian_kernel(3, 0.5, 0.6))),
        ("sinc, cutoff pi/3", filter_frames(video, sinc_kernel(math.pi / 3))),
    ]
    for resampler in RESAMPLERS:
        small = resize_frames(video, height // 3, width // 3, resampler)
        clips.append((f"to 1/3 by {resampler}", resize_frames(small, height, width, "bicubic")))
    clips += [
        ("Gaussian noise, 12", add_gaussian_noise(video, 12, generator)),
        ("the same, grey", add_gaussian_noise(video, 12, generator, grey=True)),
        ("Poisson, 150 photons", add_photon_noise(video, 150, generator)),
        ("JPEG, quality 40", compress_jpeg(video, 40)),
        ("H.264, crf 36", compress_h264(video, 36)),
        ("MPEG-4, quantiser 12", compress_mpeg4(video, 12)),
        ("step 600's noise, on pixels", degrade_latents(video[None], normal_like(video[None], generator), steps)[0]),
        ("draft through Nano's VAE", enlarged_draft(vae, video, 4, SCENES, "draft")),
    ]
    strong = StrongDegradation()
    return clips + [(f"strong, draw {draw + 1}", strong(video, generator)) for draw in range(STRONG)]


def degradation_sheet(video: Tensor) -> Image.Image:
    """Lay out the middle frames of `degraded_clips`, labelled."""
    middle = video.shape[1] // 2
    cells = [sheet([(name, clip[:, middle : middle + 1])]) for name, clip in degraded_clips(video)]
    width, height = cells[0].width + GAP, cells[0].height + GAP
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width - GAP, rows * height - GAP), "white")
    for index, cell in enumerate(cells):
        page.paste(cell, (index % COLUMNS * width, index // COLUMNS * height))
    return page


def main() -> None:
    """Write the picture of a procedural scene."""
    parser = argparse.ArgumentParser(description="Draw every degradation of a procedural scene.")
    parser.add_argument("file", type=Path, help="PNG to write")
    video, _ = SceneStream("validation", *SIZE, FRAMES, SCENES).sample(SCENE)
    save_picture(parser.parse_args().file, degradation_sheet(video).quantize(COLOURS))


if __name__ == "__main__":
    main()
