"""A graph on FlashVideo-Nano in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

NANO = "FlashVideo-Nano (built-in)"
NANO_STAGE1, NANO_STAGE2 = "FlashVideo-Nano Stage I (built-in)", "FlashVideo-Nano Stage II (built-in)"


def text_to_video(**changes: Any) -> dict[str, Any]:
    """The two-stage graph on FlashVideo-Nano, 5 frames of 64x32, refined to 128x64; `changes` are "node.input"."""
    prompt = {
        "model1": ("FlashVideoModelLoader", {"model_name": NANO_STAGE1, "weight_dtype": "default"}),
        "model2": ("FlashVideoModelLoader", {"model_name": NANO_STAGE2, "weight_dtype": "default"}),
        "clip": ("FlashVideoTextEncoderLoader", {"text_encoder_name": NANO}),
        "vae": ("FlashVideoVAELoader", {"vae_name": NANO}),
        "text": ("FlashVideoTextEncode", {"clip": ["clip", 0], "text": "a red kite", "motion": "none"}),
        "empty": ("EmptyFlashVideoLatent", {"width": 64, "height": 32, "length": 5, "batch_size": 1}),
        "stage1": (
            "FlashVideoStage1Sampler",
            {
                "model": ["model1", 0],
                "positive": ["text", 0],
                "negative": ["text", 1],
                "latent": ["empty", 0],
                "seed": 1,
                "steps": 4,
                "cfg": 8.0,
                "dynamic_cfg": True,
            },
        ),
        "decode1": ("VAEDecode", {"samples": ["stage1", 0], "vae": ["vae", 0]}),
        "prepare": (
            "FlashVideoPrepareFrames",
            {
                "images": ["decode1", 0],
                "size": "scale",
                "short_side": 1080,
                "scale": 2.0,
                "width": 64,
                "height": 64,
                "resample": "bilinear",
            },
        ),
        "encode": ("VAEEncode", {"pixels": ["prepare", 0], "vae": ["vae", 0]}),
        "degrade": ("FlashVideoLatentDegradation", {"latent": ["encode", 0], "strength": 675, "seed": 1}),
        "stage2": (
            "FlashVideoStage2Refiner",
            {
                "model": ["model2", 0],
                "positive": ["text", 0],
                "negative": ["text", 1],
                "latent": ["degrade", 0],
                "steps": 2,
                "cfg": 13.0,
                "shift": 2.5,
                "solver": "euler",
            },
        ),
        "decode2": ("VAEDecode", {"samples": ["stage2", 0], "vae": ["vae", 0]}),
        "finish": (
            "FlashVideoFinishFrames",
            {"images": ["decode2", 0], "reference": ["prepare", 1], "color_match": "none"},
        ),
        "draft": ("TestCapture", {"value": ["stage1", 0], "name": "draft"}),
        "refined": ("TestCapture", {"value": ["finish", 0], "name": "refined"}),
    }
    graph = {node: {"class_type": kind, "inputs": dict(inputs)} for node, (kind, inputs) in prompt.items()}
    for place, value in changes.items():
        node, _, name = place.partition("__")
        graph[node]["inputs"][name] = value
    return graph
