"""The loader of the VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..flashvideo.checkpoints.tiny_vae import is_tiny
from ..flashvideo.checkpoints.weights import open_weights
from ..flashvideo.devices import GIB
from .common import CATEGORY, found_as, named, own_id
from .inputs import checked
from .native.files import BUILT_IN, check_file, file_fingerprint, notice, options, resolve, shared
from .native.loaded_from import LoadedFrom, remember_file
from .native.tiny_vae import load_tiny_vae
from .native.vae import FlashVideoVAE, load_vae_native

FOLDER = "vae"
# Saved workflows hold these names: they never change.
VAES = {BUILT_IN: "vae", "FlashVideo-Nano for real footage (built-in)": "footage_vae"}
BUDGETS = {"auto": None, **{f"{size} GB": size * GIB for size in (2, 4, 6, 8, 12, 16, 24, 32)}}


class FlashVideoVAELoader(io.ComfyNode):
    """Loads the VAE that both stages share."""

    NAME = "Load FlashVideo VAE"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoVAELoader",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("load vae", "video vae", "3d-vae.pt", "cogvideox vae"),
            description="Loads FlashVideo's video VAE, which turns frames into a latent and back. It is CogVideoX's: "
            "one file for both stages. Use it with VAE Encode and VAE Decode, or their tiled versions.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=options(FOLDER, tuple(VAES)),
                    default=BUILT_IN,
                    tooltip="The VAE file, from models/vae: put 3d-vae.pt (from huggingface.co/FoundationVision/"
                    "FlashVideo) there, a converted 3d-vae.safetensors, or the VAE of CogVideoX "
                    "(diffusion_pytorch_model.safetensors from its vae folder). taecvx.safetensors decodes "
                    "approximately and fast, for a first look, and doesn't encode. FlashVideo-Nano's VAEs only go "
                    "with FlashVideo-Nano: the one for real footage with the Stage II of that name, the other with "
                    f"the rest. Default: {BUILT_IN}.",
                ),
                io.Combo.Input(
                    "memory_budget",
                    options=list(BUDGETS),
                    default="auto",
                    optional=True,
                    tooltip="How much memory encoding and decoding may take beside the models. Where a picture needs "
                    "more, it runs in tiles without seams: the result is the same, less memory takes longer. auto: "
                    "what is free. Lower it when other programs need the card. Default: auto.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The VAE, for VAE Encode and VAE Decode. Clips have 4n+1 frames, and run in chunks of 16; "
                    "the tiled nodes work in tiles of the size you choose, without seams: their overlap and temporal "
                    "settings do nothing.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None) -> bool | str:
        """Say what to put where if the file isn't there; in place of ComfyUI's own check of this input."""
        return check_file(FOLDER, vae_name, tuple(VAES))

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None, **_: Any) -> str:
        """A file of the same name that was replaced counts as another one."""
        return file_fingerprint(FOLDER, vae_name, tuple(VAES))

    @classmethod
    @checked
    def execute(cls, vae_name: str, memory_budget: str = "auto") -> io.NodeOutput:
        """Load the VAE, or find it loaded."""
        with named(cls.NAME):
            path = resolve(FOLDER, vae_name, tuple(VAES))
            budget = BUDGETS[memory_budget]
            if path is not None and is_tiny(open_weights(path).shapes):
                vae = shared(path, lambda: load_tiny_vae(path))
            else:
                source = path or VAES[vae_name]
                vae = shared(path, lambda: _load(source, budget), vae_name if path is None else None, budget)
        return io.NodeOutput(vae, ui=notice(path, own_id(cls)))


def _load(source: Path | str, budget: float | None) -> FlashVideoVAE:
    vae = load_vae_native(source, budget)
    remember_file(vae.first_stage_model, LoadedFrom(source))
    return vae


NODES = [FlashVideoVAELoader]
