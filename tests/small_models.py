"""Untrained models small enough for tests that train and sample: files that the training commands read."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

from flashvideo.config import DiTConfig, VAEConfig
from flashvideo.dit import FlashVideoDiT
from flashvideo.nano import build_part
from flashvideo.refiner import Networks
from flashvideo.training.tasks.text import fresh_encoder
from flashvideo.training.tasks.vae import initialise
from flashvideo.vae import VideoVAE

# Sizes at which many runs take little time.
TINY_REFINER = DiTConfig(1, 32, 2, 16, 8, 64, degradation_embedding=True, frame_count_embedding=True)
TINY_VAE = VAEConfig(4, (1, 1, 1, 1), encoder_blocks=1, decoder_blocks=1, norm_groups=2)
WORDS = ("a", "an", "red", "blue", "circle", "moves", "left", "right", "over", "green", "hill")


def write_models(folder: Path) -> None:
    """Write stage1, stage2, vae and text_encoder.safetensors, and tokenizer.json."""
    folder.mkdir(parents=True)
    vae = VideoVAE(VAEConfig(8, (1, 1, 1, 1), 1, 1, norm_groups=8))
    initialise(vae, seed=1)
    save_file(vae.state_dict(), folder / "vae.safetensors")
    save_file(fresh_encoder(1).weights(), folder / "text_encoder.safetensors")
    for stage in ("stage1", "stage2"):
        save_file(build_part(stage, 1), folder / f"{stage}.safetensors")
    write_tokenizer(folder / "tokenizer.json")


def tiny_networks() -> Networks:
    """The refiner's networks with random weights, the same in every process."""
    torch.manual_seed(0)
    return Networks(FlashVideoDiT(TINY_REFINER).eval(), VideoVAE(TINY_VAE).eval(), torch.randn(1, 6, 8))


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer in T5's format that knows a few words of the procedural captions."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(path))
