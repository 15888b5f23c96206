"""What a file of another model seems to be, from its key names and shapes, in the user's words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .weights import some

# The name of a kind, and patterns that all occur among its key names. The first match counts, so a narrower kind comes
# before a wider one.
_KINDS: tuple[tuple[str, ...], ...] = (
    ("a LoRA: load it with a LoRA loader, on top of a model", r"lora_(?:A|B|up|down|a|b)\b|\.lora\.|\.(?:hada|lokr)_"),
    ("the optimizer state of a training run", r"(?:^|\.)(?:exp_avg|optimizer|optimizer_states?|param_groups)(?:\.|$)"),
    ("a Wan video model", r"blocks\.0\.cross_attn\.q\."),
    ("a Wan video model", r"blocks\.0\.attn2\.to_q\.", r"\bcondition_embedder\."),
    ("a HunyuanVideo model", r"txt_in\.individual_token_refiner\.|context_embedder\.token_refiner\."),
    ("an LTX-Video model", r"\bpatchify_proj\."),
    ("an LTX-Video model", r"adaln_single\.", r"transformer_blocks\.0\.scale_shift_table"),
    ("a Mochi model", r"blocks\.0\.attn\.qkv_x\."),
    ("a Stable Diffusion 3 model", r"joint_blocks\.0\."),
    ("a Stable Diffusion 3 model", r"pos_embed\.proj\.", r"transformer_blocks\.0\.attn\.add_q_proj\."),
    ("a Flux model", r"double_blocks\.0\.img_attn\.|single_transformer_blocks\.0\."),
    ("an SDXL checkpoint", r"label_emb\.0\.0\.|add_embedding\.linear_1\.|conditioner\.embedders\.1\.model\."),
    ("a Stable Diffusion checkpoint", r"input_blocks\.0\.0\.|down_blocks\.0\.attentions\.0\.transformer_blocks\."),
    ("a T5 text encoder: it belongs in Load FlashVideo Text Encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention\."),
    ("a CLIP text encoder", r"text_model\.encoder\.layers\.0\."),
    ("Wan's VAE", r"encoder\.downsamples\.0\.|decoder\.upsamples\.0\."),
)
_OTHER_VAE = re.compile(r"encoder\.(?:down\.0\.block|down_blocks\.0\.resnets|conv_in)\b")


def describe_foreign(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A clause that says what these keys seem to belong to."""
    names = "\n".join(sorted(shapes))
    for what, *patterns in _KINDS:
        if all(re.search(pattern, names, re.MULTILINE) for pattern in patterns):
            return f"it seems to be {what}"
    for name, shape in shapes.items():
        if _OTHER_VAE.search(name) and len(shape) >= 4:
            return f"it seems to be the VAE of {'an image model' if len(shape) == 4 else 'another video model'}"
    return f"what it is instead is unknown; its first keys are {some(list(shapes))}"


def is_lora(names: Mapping[str, object]) -> bool:
    """Whether these keys are a LoRA's, whichever model it belongs to."""
    return re.search(_KINDS[0][1], "\n".join(names)) is not None
