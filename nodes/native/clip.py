"""T5 as a native ComfyUI CLIP, as FlashVideo was trained with it: 226 tokens, padding included and attended to."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import folder_paths
from comfy import sd1_clip
from comfy.text_encoders.sd3_clip import T5XXLModel, T5XXLTokenizer, t5_xxl_detect
from torch import Tensor

from ...flashvideo.checkpoints import CheckpointError
from ...flashvideo.checkpoints.text_encoder import ADVICE, open_text_encoder, t5_config
from ...flashvideo.checkpoints.weights import QUANTISATION, some
from ...flashvideo.config import TEXT_TOKENS, T5Config
from ...flashvideo.nano import nano_state
from ...flashvideo.t5 import t5_shapes
from .host import ModelPatcher, has_dynamic, remember_loader
from .packed import PackedOperations, keep_packed, leave_packed

try:
    from comfy.utils import convert_old_quants
except ImportError:  # ComfyUI 0.3.75 reads scaled fp8 files as they are

    def convert_old_quants(
        state_dict: dict[str, Tensor], model_prefix: str = "", metadata: dict[str, str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str] | None]:
        """Leave the state dict as it is."""
        return state_dict, metadata


TOKENIZER_NAME = "t5xxl"  # ComfyUI's name for any T5 that uses T5-XXL's tokenizer
END_TOKEN = 1
_EMBEDS = re.compile(r"shared\.|encoder\.embed_tokens\.|.*\.relative_attention_bias\.")  # looked up, not multiplied
# What t5_xxl_detect calls the quantisation of a file, and the model option by which T5XXLModel takes it; the first is
# ComfyUI 0.3.75's, the second that of later versions.
_QUANTISATION = {"t5xxl_scaled_fp8": "t5xxl_scaled_fp8", "t5_quantization_metadata": "t5xxl_quantization_metadata"}
_KEPT = re.compile(r"shared\.|encoder\.|scaled_fp8$|spiece_model$")  # a whole T5 also has a decoder, unused here


class Tokenizer226(T5XXLTokenizer):
    """T5's tokenizer, always 226 tokens: padded with 0, and cut where a prompt is longer (its end token stays)."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, min_length=TEXT_TOKENS
        )
        self.tokenizer.model_max_length = sys.maxsize  # no warning of "indexing errors": `shorten` limits the length

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list[list[tuple]]:
        """Tokens of a prompt with their weights, in one section."""
        return [shorten(section) for section in super().tokenize_with_weights(text, return_word_ids, **kwargs)]


class FlashVideoTokenizer(sd1_clip.SD1Tokenizer):
    """What ComfyUI's CLIP object holds as its tokenizer."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            clip_name=TOKENIZER_NAME,
            tokenizer=Tokenizer226,
        )


class FlashVideoTextModel(sd1_clip.SD1ClipModel):
    """What ComfyUI's CLIP object holds as its model: T5 without an attention mask."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(
            device=device, dtype=dtype, name=TOKENIZER_NAME, clip_model=T5XXLModel, model_options=model_options or {}
        )


def shorten(tokens: list[tuple]) -> list[tuple]:
    """Cut a section of tokens to 226 as the official code does, keeping T5's end token; logs if it cut."""
    dropped = len(tokens) - TEXT_TOKENS
    if dropped <= 0:
        return tokens
    end = next((token for token in reversed(tokens) if isinstance(token[0], int) and token[0] == END_TOKEN), tokens[-1])
    logging.info(
        "The prompt is %d tokens long; FlashVideo reads %d, so its last %d were left out.",
        len(tokens),
        TEXT_TOKENS,
        dropped,
    )
    return [*tokens[: TEXT_TOKENS - 1], end]


def load_clip_native(path: Path | None, *, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A CLIP from a T5 v1.1 encoder file of any size; FlashVideo-Nano's for None. Raises CheckpointError.

    `disable_dynamic` loads it without newer ComfyUIs' dynamic VRAM.
    """
    weights = open_text_encoder(nano_state("text_encoder") if path is None else path)
    config = t5_config(weights)
    packings = {name: each for name, each in weights.packings.items() if _KEPT.match(name) and not _EMBEDS.match(name)}
    state = {name: weights.read(name) for name in weights.shapes if _KEPT.match(name) and name not in packings}
    state |= {name: weights.read_packed(name) for name in packings}
    if "shared.weight" not in state:
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    _check_complete(weights.label, config, state)
    keep_packed(state, packings)
    state, _ = convert_old_quants(state, model_prefix="", metadata=weights.metadata)

    def loaded(**options: Any) -> FlashVideoTextModel:
        # Here, because ComfyUI may move the model before it returns the CLIP, and a quantised layer is empty until
        # its weights are loaded.
        model = FlashVideoTextModel(**options)
        model.load_sd(state)
        return model

    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(FlashVideoTokenizer, loaded),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(state),
        model_options={
            **_model_options(weights.label, config, state),
            **({"custom_operations": PackedOperations} if packings else {}),
        },
        **({"disable_dynamic": True} if disable_dynamic or (packings and has_dynamic()) else {}),
    )
    if packings:
        leave_packed(clip.patcher)
    remember_loader(clip.patcher, _load_patcher, path)  # Set CLIP Hooks loads it once more, too
    return clip


def _load_patcher(path: Path | None, disable_dynamic: bool = False) -> ModelPatcher:
    return load_clip_native(path, disable_dynamic=disable_dynamic).patcher


def _check_complete(label: str, config: T5Config, state: dict[str, Tensor]) -> None:
    missing = [name for name in t5_shapes(config) if name not in state]
    if missing:
        raise CheckpointError(f"{label} is incomplete: {len(missing)} weights are missing ({some(missing)}). {ADVICE}")


def _is_scale(name: str) -> bool:
    """Whether a tensor's presence says that another one is quantised; input scales alone don't."""
    return QUANTISATION.search(name) is not None and not name.endswith(("scaled_fp8", "scale_input", "input_scale"))


def _model_options(label: str, config: T5Config, state: dict[str, Tensor]) -> dict[str, Any]:
    detected = t5_xxl_detect(state)
    quantisation = {option: detected[name] for name, option in _QUANTISATION.items() if name in detected}
    if not quantisation and (scales := [name for name in state if _is_scale(name)]):
        raise CheckpointError(
            f"{label} is quantised, in a format that this version of ComfyUI can't read ({some(scales)}). Update "
            "ComfyUI, or use t5xxl_fp16.safetensors"
        )
    device = comfy.model_management.text_encoder_device()
    dtype = comfy.model_management.text_encoder_dtype(device)
    return {
        f"{TOKENIZER_NAME}_model_config": asdict(config),
        "dtype": comfy.model_management.pick_weight_dtype(detected.get("dtype_t5"), dtype, device),
        **quantisation,
    }
