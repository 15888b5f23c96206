"""The loader of the VAE."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY, named
from .native.files import BUILT_IN, notice, options, resolve, shared
from .native.vae import load_vae_native

FOLDER = "vae"


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
            description="Loads FlashVideo's video VAE, which turns frames into a latent and back. It is CogVideoX's: "
            "one file for both stages. Use it with VAE Encode and VAE Decode, or their tiled versions.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=options(FOLDER),
                    default=BUILT_IN,
                    tooltip="The VAE file, from models/vae: put 3d-vae.pt (from huggingface.co/FoundationVision/"
                    "FlashVideo) there, a converted 3d-vae.safetensors, or the VAE of CogVideoX "
                    "(diffusion_pytorch_model.safetensors from its vae folder). FlashVideo-Nano's VAE only goes with "
                    f"FlashVideo-Nano. Default: {BUILT_IN}.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The VAE, for VAE Encode and VAE Decode. Clips have 4n+1 frames, and run in chunks of 16; "
                    "the tiled nodes save memory by cutting space, and their temporal settings do nothing.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        """Load the VAE, or find it loaded."""
        with named(cls.NAME):
            path = resolve(FOLDER, vae_name)
            vae = shared(path, lambda: load_vae_native(path))
        return io.NodeOutput(vae, ui=notice(path, cls.hidden.unique_id))


NODES = [FlashVideoVAELoader]
