"""Names of weights: from the layouts found in the wild to the one the library uses.

Converted names are those of ComfyUI core's CogVideoX, plus FlashVideo's two extra embeddings. In files a prefix tells
them from CogVideoX's. A layout is recognised
by its key names alone; nothing here reads a tensor. The official files follow SwissArmyTransformer's naming with
LoRA matrices beside the weights they belong to; the VAE's converted names are those of diffusers' CogVideoX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Part:
    """A converted tensor: the rows `chunks`, in this order, of a source split into `of` equal chunks."""

    name: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this part of a tensor of shape `source`."""
        if self.of == 1 or not source or source[0] % self.of:
            return source  # rows that don't divide keep their shape, which then fits nowhere
        return (source[0] // self.of * len(self.chunks), *source[1:])


@dataclass(frozen=True)
class Source:
    """A tensor of a file, the LoRA matrices to be merged into it, and the converted tensors that it becomes."""

    key: str
    parts: tuple[Part, ...]
    lora_a: tuple[str, ...] = ()  # [rank, in] each
    lora_b: tuple[str, ...] = ()  # [out / n, rank] each


@dataclass(frozen=True)
class Layout:
    """How a file names its weights. `kind` is "dit" or "vae"; `naming` "official", "diffusers" or "converted"."""

    kind: str
    naming: str
    prefix: str = ""


@dataclass(frozen=True)
class Plan:
    """What happens to every key of a file: each is in exactly one of the four."""

    sources: tuple[Source, ...]
    unused: tuple[str, ...]  # belong to the model but play no part in it
    foreign: tuple[str, ...]  # another model's, in the same file
    unexpected: tuple[str, ...]


# adaLN of a layer: shift1, scale1, gate1, shift2, scale2, gate2 for the video tokens, then the same for the text's.
_FIRST_NORM, _SECOND_NORM = (0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)

_DIT_OFFICIAL: dict[str, tuple[Part, ...]] = {
    "mixins.patch_embed.proj": (Part("patch_embed.proj"),),
    "mixins.patch_embed.text_proj": (Part("patch_embed.text_proj"),),
    "time_embed.0": (Part("time_embedding_linear_1"),),
    "time_embed.2": (Part("time_embedding_linear_2"),),
    "ref_step_time_embedding.0": (Part("degradation_embedding.linear_1"),),
    "ref_step_time_embedding.2": (Part("degradation_embedding.linear_2"),),
    "time_size_embedding.0": (Part("frame_count_embedding.linear_1"),),
    "time_size_embedding.2": (Part("frame_count_embedding.linear_2"),),
    "mixins.adaln_layer.adaLN_modulations.{i}.1": (
        Part("blocks.{i}.norm1.linear", _FIRST_NORM, 12),
        Part("blocks.{i}.norm2.linear", _SECOND_NORM, 12),
    ),
    "mixins.adaln_layer.query_layernorm_list.{i}": (Part("blocks.{i}.norm_q"),),
    "mixins.adaln_layer.key_layernorm_list.{i}": (Part("blocks.{i}.norm_k"),),
    "transformer.layers.{i}.input_layernorm": (Part("blocks.{i}.norm1.norm"),),
    "transformer.layers.{i}.post_attention_layernorm": (Part("blocks.{i}.norm2.norm"),),
    "transformer.layers.{i}.attention.query_key_value": (
        Part("blocks.{i}.q", (0,), 3),
        Part("blocks.{i}.k", (1,), 3),
        Part("blocks.{i}.v", (2,), 3),
    ),
    "transformer.layers.{i}.attention.dense": (Part("blocks.{i}.attn_out"),),
    "transformer.layers.{i}.mlp.dense_h_to_4h": (Part("blocks.{i}.ff_proj"),),
    "transformer.layers.{i}.mlp.dense_4h_to_h": (Part("blocks.{i}.ff_out"),),
    "transformer.final_layernorm": (Part("norm_final"),),
    "mixins.final_layer.norm_final": (Part("norm_out.norm"),),
    "mixins.final_layer.adaLN_modulation.1": (Part("norm_out.linear"),),
    "mixins.final_layer.linear": (Part("proj_out"),),
}

# Stems that diffusers names otherwise; all others are the same. `{r}` counts the decoder's levels from the other end.
DIT_DIFFUSERS = {
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "transformer_blocks.{i}.norm1.linear": "blocks.{i}.norm1.linear",
    "transformer_blocks.{i}.norm1.norm": "blocks.{i}.norm1.norm",
    "transformer_blocks.{i}.norm2.linear": "blocks.{i}.norm2.linear",
    "transformer_blocks.{i}.norm2.norm": "blocks.{i}.norm2.norm",
    "transformer_blocks.{i}.attn1.to_q": "blocks.{i}.q",
    "transformer_blocks.{i}.attn1.to_k": "blocks.{i}.k",
    "transformer_blocks.{i}.attn1.to_v": "blocks.{i}.v",
    "transformer_blocks.{i}.attn1.norm_q": "blocks.{i}.norm_q",
    "transformer_blocks.{i}.attn1.norm_k": "blocks.{i}.norm_k",
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn_out",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.ff_proj",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.ff_out",
}
_VAE_OFFICIAL = {
    "encoder.down.{i}.block.{j}.{rest}": "encoder.down_blocks.{i}.resnets.{j}.{rest}",
    "encoder.down.{i}.downsample.{rest}": "encoder.down_blocks.{i}.downsamplers.0.{rest}",
    "encoder.mid.block_1.{rest}": "encoder.mid_block.resnets.0.{rest}",
    "encoder.mid.block_2.{rest}": "encoder.mid_block.resnets.1.{rest}",
    "decoder.mid.block_1.{rest}": "decoder.mid_block.resnets.0.{rest}",
    "decoder.mid.block_2.{rest}": "decoder.mid_block.resnets.1.{rest}",
    "decoder.up.{r}.block.{j}.{rest}": "decoder.up_blocks.{r}.resnets.{j}.{rest}",
    "decoder.up.{r}.upsample.{rest}": "decoder.up_blocks.{r}.upsamplers.0.{rest}",
}

_VAE_PREFIX = r"(?P<prefix>first_stage_model\.|vae\.|)"
# In front of the names in converted files. ComfyUI's own loader takes a file without it for CogVideoX, and would sample
# with that model's positions and without the strength of the degradation.
OWN_PREFIX = "flashvideo."
# Of a VAE, whose weights don't show it: a file's metadata say it, or an empty tensor of so many rows.
NORM_GROUPS_METADATA = "flashvideo.norm_groups"
_UNET_PREFIX = r"(?P<prefix>(?:model\.)?diffusion_model\.(?:flashvideo\.)?|flashvideo\.|transformer\.|)"
_LAYOUT_MARKS = (
    ("dit", "official", _UNET_PREFIX + r"(?:mixins\.(?:patch_embed|adaln_layer|final_layer)|transformer\.layers)\."),
    ("dit", "diffusers", _UNET_PREFIX + r"transformer_blocks\.\d+\.norm[12]\.norm\."),
    ("dit", "converted", _UNET_PREFIX + r"blocks\.\d+\.norm[12]\.(?:linear|norm)\."),
    ("vae", "official", _VAE_PREFIX + r"(?:encoder\.down|decoder\.up)\.\d+\.block\.\d+\.conv[12]\.conv\."),
    ("vae", "diffusers", _VAE_PREFIX + r"decoder\.(?:up_blocks\.\d+|mid_block)\.resnets\.\d+\.norm[12]\.norm_layer\."),
)
_UNUSED = {
    # A table that the transformer library always makes; rotary tables; positions that CogVideoX's other models add.
    "dit": re.compile(r"transformer\.position_embeddings\.|mixins\.pos_embed\.|patch_embed\.pos_embedding$"),
    "vae": re.compile(rf"loss|{re.escape(NORM_GROUPS_METADATA)}$"),
}
# Empty tensors that ComfyUI saves with a model to mark how it samples.
_SAMPLING_MARK = re.compile(r"v_pred|ztsnr|edm_vpred\.sigma_(?:min|max)")
# Other models of the official training engine and of all-in-one checkpoints, ComfyUI's Save Checkpoint's among them.
_FOREIGN = re.compile(
    r"(?:first_stage_model|conditioner|cond_stage_model|denoiser|loss_fn|model_ema|model\.diffusion_model|vae"
    r"|text_encoders)\."
)
_LORA_PART = re.compile(r"(?P<stem>.+)\.(?P<part>original\.weight|original\.bias|matrix_A\.\d+|matrix_B\.\d+)")


def find_layout(names: Iterable[str], preferred: str | None = None) -> Layout | None:
    """Layout of a file with these key names, or None if no FlashVideo or CogVideoX file is named like this.

    A file may hold several networks, as those of ComfyUI's Save Checkpoint do: a `preferred` kind is looked for first.
    """
    names = list(names)
    for kind, naming, mark in sorted(_LAYOUT_MARKS, key=lambda each: each[0] != preferred):
        pattern = re.compile(mark)
        for name in names:
            if match := pattern.match(name):
                return Layout(kind, naming, match["prefix"])
    return None


def make_plan(names: Iterable[str], layout: Layout) -> Plan:
    """Say for every key of a file in `layout` what becomes of it."""
    known: list[str] = []
    unused: list[str] = []
    foreign: list[str] = []
    unexpected: list[str] = []
    for key in names:
        if _FOREIGN.match(key) and not (layout.prefix and key.startswith(layout.prefix)):
            foreign.append(key)
        elif _SAMPLING_MARK.fullmatch(key):
            unused.append(key)
        elif not key.startswith(layout.prefix):
            unexpected.append(key)
        elif _UNUSED[layout.kind].match(key.removeprefix(layout.prefix)):
            unused.append(key)
        else:
            known.append(key)
    sources, unmatched = _SOURCES[layout.kind, layout.naming](known, layout.prefix)
    return Plan(tuple(sources), tuple(unused), tuple(foreign), tuple(unexpected + unmatched))


def original_name(converted: str, layout: Layout, levels: int = 0) -> str:
    """The key that holds `converted` in a file of this layout. `levels`: the VAE's number of resolutions."""
    if layout.kind == "vae":
        if layout.naming == "official":
            converted = converted.replace(".conv_shortcut.", ".nin_shortcut.")
            return rename(converted, {new: old for old, new in _VAE_OFFICIAL.items()}, levels)
        return converted
    stem, _, leaf = converted.rpartition(".")
    if layout.naming == "diffusers":
        stem = rename(stem, {new: old for old, new in DIT_DIFFUSERS.items()})
    elif layout.naming == "official":
        stem = rename(stem, {part.name: old for old, parts in _DIT_OFFICIAL.items() for part in parts})
    return f"{layout.prefix}{stem}.{leaf}"


def _official_dit_sources(keys: list[str], prefix: str) -> tuple[list[Source], list[str]]:
    loras: dict[str, dict[str, list[str]]] = {}  # stem → "matrix_A" and "matrix_B" → keys
    weights: list[tuple[str, str, str]] = []  # key, stem, leaf
    for key in keys:
        stem, _, leaf = key.removeprefix(prefix).rpartition(".")
        if match := _LORA_PART.fullmatch(key.removeprefix(prefix)):
            stem, leaf = match["stem"], match["part"].removeprefix("original.")
        if leaf.startswith("matrix_"):
            loras.setdefault(stem, {}).setdefault(leaf.partition(".")[0], []).append(key)
        else:
            weights.append((key, stem, leaf))
    sources: list[Source] = []
    unmatched: list[str] = []
    for key, stem, leaf in weights:
        parts = _parts(stem)
        if not parts or leaf not in ("weight", "bias"):
            unmatched.append(key)
            continue
        lora = loras.pop(stem, {}) if leaf == "weight" else {}
        targets = tuple(Part(f"{part.name}.{leaf}", part.chunks, part.of) for part in parts)
        sources.append(Source(key, targets, _in_order(lora, "matrix_A"), _in_order(lora, "matrix_B")))
    left_over = [key for lora in loras.values() for matrices in lora.values() for key in matrices]
    return sources, unmatched + left_over


def _in_order(lora: dict[str, list[str]], side: str) -> tuple[str, ...]:
    return tuple(sorted(lora.get(side, []), key=lambda key: int(key.rpartition(".")[2])))


def _parts(stem: str) -> tuple[Part, ...]:
    """Converted parts of an official DiT stem; empty for a stem that isn't known."""
    for template, parts in _DIT_OFFICIAL.items():
        if match := _pattern(template).fullmatch(stem):
            return tuple(Part(part.name.format(**match.groupdict()), part.chunks, part.of) for part in parts)
    return ()


def _diffusers_dit_sources(keys: list[str], prefix: str) -> tuple[list[Source], list[str]]:
    sources = []
    for key in keys:
        stem, dot, leaf = key.removeprefix(prefix).rpartition(".")
        sources.append(Source(key, (Part(rename(stem, DIT_DIFFUSERS) + dot + leaf),)))
    return sources, []


def _official_vae_sources(keys: list[str], prefix: str) -> tuple[list[Source], list[str]]:
    levels = 1 + max((int(match[1]) for key in keys if (match := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    sources = []
    for key in keys:
        name = rename(key.removeprefix(prefix), _VAE_OFFICIAL, levels).replace(".nin_shortcut.", ".conv_shortcut.")
        sources.append(Source(key, (Part(name),)))
    return sources, []


def _unchanged_sources(keys: list[str], prefix: str) -> tuple[list[Source], list[str]]:
    return [Source(key, (Part(key.removeprefix(prefix)),)) for key in keys], []


_SOURCES = {
    ("dit", "official"): _official_dit_sources,
    ("dit", "diffusers"): _diffusers_dit_sources,
    ("dit", "converted"): _unchanged_sources,
    ("vae", "official"): _official_vae_sources,
    ("vae", "diffusers"): _unchanged_sources,
}


def rename(name: str, table: dict[str, str], levels: int = 0) -> str:
    """The entry of `table` that `name` fits, filled in; `name` itself if it fits none."""
    for template, replacement in table.items():
        if match := _pattern(template).fullmatch(name):
            fields = match.groupdict()
            if "r" in fields:
                fields["r"] = str(levels - 1 - int(fields["r"]))
            return replacement.format(**fields)
    return name


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template such as "blocks.{i}.q" as a regular expression with a named group for each field."""
    escaped = re.sub(r"\\\{(\w+)\\\}", lambda field: rf"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(template))
    return re.compile(escaped)


_FIELDS = {"i": r"\d+", "j": r"\d+", "r": r"\d+", "rest": r".+"}
