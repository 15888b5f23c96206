"""Nodes of the prompt: the loader of the text encoder, and the prompt itself."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io

from ..flashvideo.config import MOTIONS, NO_MOTION, TEXT_TOKENS
from ..flashvideo.t5 import with_motion
from .common import CATEGORY, found_as, named, own_id
from .inputs import checked
from .native.clip import TOKENIZER_NAME, load_clip_native, shorten
from .native.files import BUILT_IN, check_file, file_fingerprint, notice, options, resolve, shared
from .native.schedule_guard import NOT_FINITE

FOLDER = "text_encoders"


class FlashVideoTextEncoderLoader(io.ComfyNode):
    """Loads the T5 text encoder."""

    NAME = "Load FlashVideo Text Encoder"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoTextEncoderLoader",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("flashvideo clip", "load clip", "t5xxl", "t5 loader"),
            description="Loads T5-XXL, the text encoder that both stages of FlashVideo read prompts with.",
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=options(FOLDER),
                    default=BUILT_IN,
                    tooltip="The text encoder file, from models/text_encoders: put t5xxl_fp16.safetensors there, or "
                    "t5xxl_fp8_e4m3fn_scaled.safetensors for half the memory (both from huggingface.co/"
                    "comfyanonymous/flux_text_encoders; Flux and Stable Diffusion 3 use the same files). "
                    f"FlashVideo-Nano's only goes with FlashVideo-Nano. Default: {BUILT_IN}.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The text encoder, for FlashVideo Prompt.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_name: str | None) -> bool | str:
        """Say what to put where if the file isn't there; in place of ComfyUI's own check of this input."""
        return check_file(FOLDER, text_encoder_name)

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name: str | None, **_: Any) -> str:
        """A file of the same name that was replaced counts as another one."""
        return file_fingerprint(FOLDER, text_encoder_name)

    @classmethod
    @checked
    def execute(cls, text_encoder_name: str) -> io.NodeOutput:
        """Load the text encoder, or find it loaded."""
        with named(cls.NAME):
            path = resolve(FOLDER, text_encoder_name)
            clip = shared(path, lambda: load_clip_native(path))
        return io.NodeOutput(clip, ui=notice(path, own_id(cls)))


class FlashVideoTextEncode(io.ComfyNode):
    """Encodes a prompt, and the empty conditioning that FlashVideo is guided away from."""

    NAME = "FlashVideo Prompt"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoTextEncode",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("text to video", "prompt", "clip text encode", "motion"),
            description="Encodes a prompt for either stage. FlashVideo takes no negative prompt: its models were "
            "trained to be guided away from no text at all, and that is the negative output.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="A T5-XXL text encoder, from Load FlashVideo Text Encoder or ComfyUI's Load CLIP.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the video shows, in English. Long, detailed descriptions work best: subject, action, "
                    f"setting, light, camera. {TEXT_TOKENS} tokens (about 170 words) are read, the rest is cut off. "
                    "(word:1.2) weighs a word, as everywhere in ComfyUI. Default: empty.",
                ),
                io.Combo.Input(
                    "motion",
                    options=list(MOTIONS),
                    default=NO_MOTION,
                    tooltip='How much moves: puts words such as "medium motion," before the prompt, as the models saw '
                    "in training. The official scripts use none in stage I and medium in stage II. Default: none.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt, for either stage."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The empty conditioning of the same size, for either stage."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, clip: comfy.sd.CLIP, text: str, motion: str) -> io.NodeOutput:
        """Encode the prompt."""
        if clip is None:
            raise ValueError(f"{cls.NAME}: clip is empty; the file it was loaded from holds no text encoder")
        tokens = clip.tokenize(
            with_motion(text, motion), tokenizer_options={f"{TOKENIZER_NAME}_min_length": TEXT_TOKENS}
        )
        if TOKENIZER_NAME not in tokens:
            raise ValueError(
                f"{cls.NAME}: clip is no T5-XXL but another text encoder ({', '.join(tokens)}), whose words FlashVideo "
                f"doesn't understand. Use {FlashVideoTextEncoderLoader.NAME} with t5xxl_fp16.safetensors"
            )
        tokens[TOKENIZER_NAME] = [shorten(section) for section in tokens[TOKENIZER_NAME]]
        bar = comfy.utils.ProgressBar(1)
        encoded = clip.encode_from_tokens_scheduled(tokens)
        bar.update(1)
        if not all(torch.isfinite(cond).all() for cond, _ in encoded):
            raise ValueError(f"{cls.NAME}: the encoded prompt {NOT_FINITE}")
        positive = [[cond, _without_pooled(extras)] for cond, extras in encoded]
        negative = [[torch.zeros_like(cond), _without_pooled(extras)] for cond, extras in encoded]
        return io.NodeOutput(positive, negative)


def _without_pooled(extras: dict[str, Any]) -> dict[str, Any]:
    # A summary of the prompt that other models read; FlashVideo has none.
    return {name: value for name, value in extras.items() if name != "pooled_output"}


NODES = [FlashVideoTextEncoderLoader, FlashVideoTextEncode]
