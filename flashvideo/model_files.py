"""The model files that FlashVideo runs with, and where they are published."""

from __future__ import annotations

from dataclasses import dataclass

OFFICIAL = "FoundationVision/FlashVideo"
TEXT_ENCODERS = "comfyanonymous/flux_text_encoders"


@dataclass(frozen=True)
class ModelFile:
    """A file to download. `name` is the command line's word for it, `gigabytes` a rough size to plan with."""

    name: str
    file: str
    repository: str
    gigabytes: float
    note: str = ""


@dataclass(frozen=True)
class Role:
    """A network that FlashVideo needs, the kind of folder it goes to, and the files (any one will do) that hold it."""

    name: str
    purpose: str
    folder: str
    files: tuple[ModelFile, ...]


ROLES = (
    Role(
        "stage I",
        "makes the draft; not needed to refine clips",
        "diffusion_models",
        (ModelFile("stage1", "stage1.pt", OFFICIAL, 11.8),),
    ),
    Role("stage II", "refines", "diffusion_models", (ModelFile("stage2", "stage2.pt", OFFICIAL, 3.4),)),
    Role("the VAE", "turns frames into a latent and back", "vae", (ModelFile("vae", "3d-vae.pt", OFFICIAL, 0.9),)),
    Role(
        "the text encoder",
        "reads prompts; T5-XXL, which Flux and Stable Diffusion 3 use too",
        "text_encoders",
        (
            ModelFile("t5-fp16", "t5xxl_fp16.safetensors", TEXT_ENCODERS, 9.8, "full quality"),
            ModelFile("t5-fp8", "t5xxl_fp8_e4m3fn_scaled.safetensors", TEXT_ENCODERS, 5.2, "half the memory"),
        ),
    ),
)
DOWNLOADS = {file.name: (role, file) for role in ROLES for file in role.files}


def what_goes_into(kind: str) -> str:
    """The official files for a kind of folder, and where they are, as part of a sentence."""
    files = [file for role in ROLES if role.folder == kind for file in role.files]
    if not files:  # "loras"
        return "a LoRA for CogVideoX-5B, or one of your own training,"
    return f"{' or '.join(file.file for file in files)} (from huggingface.co/{files[0].repository})"
