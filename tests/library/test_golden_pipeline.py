"""The whole chain against the official one: prompt embedding to draft to refined video (float32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.config import STAGE1_LATENT_SCALE, STAGE2_LATENT_SCALE
from flashvideo.degradation import degrade_latent
from flashvideo.samplers import sample_stage1, sample_stage2
from flashvideo.vae import VideoVAE, decode_in_halves

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
VIDEO_TOLERANCE = 0.1  # of 255, over two networks, two samplers and three passes of the VAE; 8e-3 was reached


def golden_vae() -> VideoVAE:
    """The golden VAE; its weights are stored as float16 and run as float32."""
    parts = ("encoder", "decoder")
    state = {}
    for part in parts:
        state.update(load_file(GOLDEN / f"vae_stored_weights_{part}.safetensors"))
    return load_vae(state, dtype=torch.float32)


def to_bytes_scale(raw: torch.Tensor) -> torch.Tensor:
    """Decoded [1, 3, T, H, W] to the official [T, H, W, 3] of 0..255, not rounded."""
    return ((raw[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1) * 255


@torch.inference_mode()
def test_the_whole_chain_equals_the_official_one() -> None:
    golden = load_file(GOLDEN / "pipeline.safetensors")
    settings = json.loads((GOLDEN / "pipeline.json").read_text())
    vae = golden_vae()

    draws = [golden[f"stage1.draw.{i:02d}"].transpose(1, 2) for i in range(6)]
    context = golden["stage1.cond"]
    draft = sample_stage1(
        load_dit(load_file(GOLDEN / "dit_stage1_weights.safetensors")),
        draws[0],
        context,
        torch.zeros_like(context),
        steps=settings["s1"]["steps"],
        scale=settings["s1"]["cfg"],
        step_noise=lambda i: draws[2 * i + 1],  # the first step draws once, the others twice and use the second
    )
    video = to_bytes_scale(vae.decode(draft / STAGE1_LATENT_SCALE))
    assert (video - golden["stage1.video"]).abs().max() <= VIDEO_TOLERANCE

    pixels = torch.nn.functional.interpolate(
        (video / 255 - 0.5).permute(0, 3, 1, 2) / 0.5, (32, 32), mode="bilinear", antialias=True
    ).permute(1, 0, 2, 3)[None]
    assert (pixels[:, :, :5] - golden["stage2.pixels_first5"]).abs().max() <= VIDEO_TOLERANCE / 127.5
    noise = torch.cat([golden[f"stage2.draw.{i:02d}"] for i in range(3)], dim=2)
    reference = vae.encode(pixels).sample(noise) * STAGE2_LATENT_SCALE
    # An error of VIDEO_TOLERANCE in the pixels, spread by the encoder.
    assert (reference - golden["stage2.ref_latent_scaled"]).abs().max() <= 1e-3

    step, context = settings["s2"]["step"], golden["stage2.cond"]
    refined = sample_stage2(
        load_dit(load_file(GOLDEN / "dit_stage2_weights.safetensors")),
        degrade_latent(reference, golden["stage2.draw.03"].transpose(1, 2), step),
        context,
        torch.zeros_like(context),
        steps=settings["s2"]["steps"],
        cfg=settings["s2"]["cfg"],
        shift=settings["s2"]["shift"],
        degradation_step=step,
    )
    # The official refiner decodes in two halves, and a picture this narrow without an overlap.
    video = to_bytes_scale(decode_in_halves(vae, refined / STAGE2_LATENT_SCALE))
    assert (video - golden["stage2.video"]).abs().max() <= VIDEO_TOLERANCE
