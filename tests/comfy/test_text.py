"""The text encoder and the prompt node in the real ComfyUI, against a plain T5."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

BUILT_IN = "FlashVideo-Nano (built-in)"
TOKENS = 226
END, PADDING = 1, 0
PROMPT = "A red fox trots along a stone wall at dusk, (camera follows:1.0)"
LONG_PROMPT = "fox " * 300
LARGEST = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
NETWORK_TOLERANCE = 1e-4
FP8_TOLERANCE = 0.15  # on average, of the outputs' mean size: e4m3 keeps 3 bits behind the point; 0.1 measured


@pytest.fixture()
def state(submodule: Callable) -> dict[str, Tensor]:
    """Weights of the built-in text encoder."""
    return submodule("flashvideo.nano").nano_state("text_encoder")


@pytest.fixture()
def load(submodule: Callable) -> Callable[..., Any]:
    """Load a text encoder file; the built-in one without."""
    return lambda path=None: submodule("nodes.native.clip").load_clip_native(path)


@pytest.fixture()
def folder(model_folder: Callable[[str], Path]) -> Path:
    """ComfyUI's models/text_encoders."""
    return model_folder("text_encoders")


@pytest.fixture()
def encode(run_prompt: Callable, captured: dict) -> Callable[..., tuple[list, list]]:
    """Positive and negative conditioning of a prompt, loader and prompt node in the executor."""

    def run(text: str, motion: str = "none", text_encoder: str = BUILT_IN) -> tuple[list, list]:
        graph = {
            "clip": {"class_type": "FlashVideoTextEncoderLoader", "inputs": {"text_encoder_name": text_encoder}},
            "prompt": {
                "class_type": "FlashVideoTextEncode",
                "inputs": {"clip": ["clip", 0], "text": text, "motion": motion},
            },
        }
        for slot, name in enumerate(("positive", "negative")):
            graph[name] = {"class_type": "TestCapture", "inputs": {"value": ["prompt", slot], "name": name}}
        run_prompt(graph)
        return captured["positive"], captured["negative"]

    return run


def ids_of(clip: Any, text: str) -> list[int]:
    (section,) = clip.tokenize(text)["t5xxl"]
    return [token for token, _weight in section]


# Against a plain T5


@torch.inference_mode()
def test_conditioning_equals_a_plain_t5_without_a_mask(
    encode: Callable, load: Callable, state: dict, submodule: Callable
) -> None:
    from transformers import T5Config, T5EncoderModel

    config = asdict(submodule("flashvideo.config").NANO_TEXT_ENCODER)
    t5 = T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu")).eval()
    t5.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    for text in (PROMPT, "", LONG_PROMPT):
        positive, _ = encode(text)
        expected = t5(input_ids=torch.tensor([ids_of(load(), text)])).last_hidden_state
        assert (positive[0][0] - expected).abs().max() <= NETWORK_TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 9, TOKENS])
def test_the_librarys_network_is_a_plain_t5(state: dict, submodule: Callable, length: int) -> None:
    """With the same names of weights, in the same order: those of a training's optimiser."""
    from transformers import T5Config, T5EncoderModel

    config = asdict(submodule("flashvideo.config").NANO_TEXT_ENCODER)
    t5 = T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu")).eval()
    encoder = submodule("flashvideo.t5").load_encoder(state)
    assert [*encoder.network.state_dict()] == [*t5.state_dict()]
    assert [name for name, _ in encoder.network.named_parameters()] == [name for name, _ in t5.named_parameters()]
    t5.load_state_dict(encoder.network.state_dict())
    tokens = torch.randint(config["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
    assert (encoder(tokens) - t5(input_ids=tokens).last_hidden_state).abs().max() <= NETWORK_TOLERANCE
    large = {**state, LARGEST: 1e5 * state[LARGEST].float()}  # gives sums that are beyond float16
    assert submodule("flashvideo.t5").load_encoder(large, dtype=torch.float16)(tokens).isfinite().all()


def test_tokens_are_the_tokenizers_own_padded_to_226(load: Callable) -> None:
    import comfy.text_encoders.sd3_clip
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(
        str(Path(comfy.text_encoders.sd3_clip.__file__).parent / "t5_tokenizer")
    )
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    for text in ("a quiet harbour, fog rolling in", "", LONG_PROMPT):
        assert ids_of(load(), text) == tokenizer(text, **options)["input_ids"]


def test_a_long_prompt_is_cut_and_the_log_says_by_how_much(load: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ids = ids_of(load(), LONG_PROMPT)
    assert (len(ids), ids[-1]) == (TOKENS, END)
    (line,) = [record.message for record in caplog.records if "tokens long" in record.message]
    length = int(line.split(" tokens long")[0].split()[-1])
    assert line.endswith(f"FlashVideo reads {TOKENS}, so its last {length - TOKENS} were left out.")


# The prompt node


def test_negative_is_exactly_zero_and_of_the_same_shape(encode: Callable) -> None:
    positive, negative = encode(PROMPT)
    assert positive[0][0].shape == negative[0][0].shape == (1, TOKENS, 48)
    assert positive[0][0].std() > 0.5
    assert torch.equal(negative[0][0], torch.zeros(1, TOKENS, 48))
    assert positive[0][1] == negative[0][1] == {}


def test_motion_is_put_before_the_prompt_without_a_space(encode: Callable) -> None:
    plain, _ = encode("medium motion,a fox")
    medium, _ = encode("a fox", "medium")
    none, _ = encode("a fox")
    assert torch.equal(medium[0][0], plain[0][0])
    assert not torch.equal(medium[0][0], none[0][0])


def test_every_motion_of_the_schema_runs(encode: Callable, comfy_nodes: dict) -> None:
    motion = comfy_nodes["FlashVideoTextEncode"].GET_SCHEMA().inputs[2]
    assert motion.options == ["none", "very low", "low", "medium", "high", "very high"]
    results = [encode("a fox", choice)[0][0][0] for choice in motion.options]
    assert len({float(result.sum()) for result in results}) == len(results)


def test_weighted_words_count_as_everywhere_submoduleui(encode: Callable) -> None:
    plain, _ = encode("a red fox")
    weighted, _ = encode("a (red:1.5) fox")
    assert not torch.equal(plain[0][0], weighted[0][0])


def test_stock_text_encode_gives_the_same(comfy_nodes: dict, encode: Callable, load: Callable) -> None:
    positive, _ = encode(PROMPT)
    (stock,) = comfy_nodes["CLIPTextEncode"]().encode(load(), PROMPT)
    assert torch.equal(stock[0][0], positive[0][0])


@pytest.mark.parametrize(
    "family", ["genmo.MochiT5Tokenizer genmo.mochi_te", "pixart_t5.PixArtTokenizer pixart_t5.pixart_te"]
)
@pytest.mark.parametrize("text", [PROMPT, LONG_PROMPT])
def test_a_stock_clip_of_another_t5_model_works(
    comfy_nodes: dict, state: dict, submodule: Callable, encode: Callable, family: str, text: str
) -> None:
    """What Load CLIP makes of a T5 file, with its own lengths and (Mochi) its own mask."""
    import comfy.sd
    import comfy.supported_models_base

    parts = [name.rsplit(".", 1) for name in family.split()]
    tokenizer, make = (
        getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name) for module, name in parts
    )
    config = asdict(submodule("flashvideo.config").NANO_TEXT_ENCODER)
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tokenizer, make()), model_options={"t5xxl_model_config": config}
    )
    clip.load_sd(state)
    positive, negative = comfy_nodes["FlashVideoTextEncode"].execute(clip, text, "none").result
    assert positive[0][0].shape == negative[0][0].shape == (1, TOKENS, 48)
    if "pixart" in family:  # without a mask, as FlashVideo's own
        torch.testing.assert_close(positive[0][0], encode(text)[0][0][0], rtol=0, atol=NETWORK_TOLERANCE)
    else:
        assert positive[0][0].isfinite().all()
        assert (positive[0][0] - negative[0][0]).abs().mean() > 0.1 * negative[0][0].abs().mean()


def test_a_missing_clip_is_named(comfy_nodes: dict) -> None:
    with pytest.raises(ValueError, match=r"^FlashVideo Prompt: clip is empty"):
        comfy_nodes["FlashVideoTextEncode"].execute(None, "a fox", "none")


@pytest.fixture()
def wan() -> Any:
    """Wan's tokenizer as ComfyUI has it, with a vocabulary of a few words in place of the one in Wan's file."""
    import sentencepiece
    from comfy.text_encoders.wan import WanT5Tokenizer

    vocabulary = io.BytesIO()
    words = iter(["a fox trots along a wall", "the camera follows", "dusk"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=vocabulary, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    return WanT5Tokenizer(tokenizer_data={"spiece_model": torch.tensor(list(vocabulary.getvalue()), dtype=torch.uint8)})


@pytest.fixture()
def hunyuan() -> Any:
    """HunyuanVideo's tokenizer."""
    from comfy.text_encoders import hunyuan_video

    folder = Path(hunyuan_video.__file__).parent / "llama_tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("this copy of ComfyUI lacks its llama tokenizer")
    return hunyuan_video.HunyuanVideoTokenizer()


@pytest.mark.parametrize(("family", "names"), [("wan", "umt5xxl"), ("hunyuan", "l, llama")])
def test_another_models_text_encoder_is_refused_whatever_its_width(
    comfy_nodes: dict, request: pytest.FixtureRequest, family: str, names: str
) -> None:
    import comfy.sd

    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = request.getfixturevalue(family), {}
    message = rf"^FlashVideo Prompt: clip is no T5-XXL but another text encoder \({names}\).*Load FlashVideo Text"
    with pytest.raises(ValueError, match=message):
        comfy_nodes["FlashVideoTextEncode"].execute(clip, "a fox", "none")


# Files


def test_a_file_loads_by_its_shapes_and_gives_the_same(encode: Callable, state: dict, folder: Path) -> None:
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(64, 48), "lm_head.weight": torch.zeros(1)}
    save_file({**state, **decoder}, folder / "mine.safetensors")
    embedded = {("encoder.embed_tokens.weight" if name == "shared.weight" else name): t for name, t in state.items()}
    save_file(embedded, folder / "other.safetensors")
    expected, _ = encode(PROMPT)
    for name in ("mine.safetensors", "other.safetensors"):
        assert torch.equal(encode(PROMPT, text_encoder=name)[0][0][0], expected[0][0])


def test_bfloat16_and_fp8_files_keep_their_type(load: Callable, state: dict, folder: Path, comfy_nodes: dict) -> None:
    (exact,) = comfy_nodes["CLIPTextEncode"]().encode(load(), PROMPT)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        path = folder / f"{dtype}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in state.items()}, path)
        clip = load(path)
        assert {tensor.dtype for name, tensor in clip.get_sd().items() if "encoder.block" in name} == {dtype}
        (cond,) = comfy_nodes["CLIPTextEncode"]().encode(clip, PROMPT)
        assert (cond[0][0] - exact[0][0]).abs().mean() < FP8_TOLERANCE * exact[0][0].abs().mean()


def test_a_scaled_fp8_file_is_read_with_its_scales(
    load: Callable, state: dict, folder: Path, comfy_nodes: dict
) -> None:
    (exact,) = comfy_nodes["CLIPTextEncode"]().encode(load(), PROMPT)
    scaled: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if ".SelfAttention.relative" in name or "encoder.block" not in name or tensor.ndim == 1:
            scaled[name] = tensor
            continue
        scale = tensor.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        scaled[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(scaled, folder / "scaled.safetensors")
    (cond,) = comfy_nodes["CLIPTextEncode"]().encode(load(folder / "scaled.safetensors"), PROMPT)
    assert (cond[0][0] - exact[0][0]).abs().mean() < FP8_TOLERANCE * exact[0][0].abs().mean()


def test_an_unknown_quantisation_is_refused_and_not_misread(load: Callable, state: dict, folder: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({**state, f"{name}_scale": torch.ones(1)}, folder / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"x\.safetensors is quantised, in a format that this version of ComfyUI can't read"
    ):
        load(folder / "x.safetensors")


T5_KEYS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 48),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (8, 48),
}
WRONG_FILES = {
    "umt5": ({"shared.weight": (256384, 1), **T5_KEYS}, r"seems to be UMT5-XXL \(Wan's text encoder\)"),
    "byt5": ({"shared.weight": (1510, 48), **T5_KEYS}, "seems to be ByT5"),
    "old t5": (
        {"shared.weight": (32128, 1), **T5_KEYS, "encoder.block.0.layer.1.DenseReluDense.wi.weight": (8, 48)},
        "seems to be the first T5",
    ),
    "half a t5": ({"shared.weight": (32128, 48), **T5_KEYS}, "is incomplete: .* weights are missing"),
    "clip-l": ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)}, "seems to be a CLIP text encoder"),
    "vision": ({"vision_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "seems to be a CLIP vision model"),
    "gemma": ({"model.layers.0.self_attn.q_proj.weight": (4, 4)}, "seems to be a language model"),
    "stage": ({"blocks.0.norm1.linear.weight": (4, 4)}, "seems to be a FlashVideo or CogVideoX diffusion model"),
    "vae": ({"decoder.mid_block.resnets.0.norm1.norm_layer.weight": (4,)}, "seems to be FlashVideo's VAE"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_named(encode: Callable, run_prompt: Any, folder: Path, kind: str) -> None:
    shapes, message = WRONG_FILES[kind]
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, folder / "x.safetensors"
    )
    with pytest.raises(run_prompt.Failed, match=message) as failed:
        encode(PROMPT, text_encoder="x.safetensors")
    assert failed.value.message.startswith("Load FlashVideo Text Encoder: x.safetensors")
    assert "t5xxl_fp16.safetensors" in failed.value.message


def test_a_truncated_file_is_named(encode: Callable, run_prompt: Any, state: dict, folder: Path) -> None:
    save_file(state, folder / "x.safetensors")
    (folder / "x.safetensors").write_bytes((folder / "x.safetensors").read_bytes()[:-1000])
    with pytest.raises(
        run_prompt.Failed, match=r"Load FlashVideo Text Encoder: x\.safetensors is damaged or incomplete"
    ):
        encode(PROMPT, text_encoder="x.safetensors")


# The loader


def test_two_loaders_give_one_clip(run_prompt: Callable, captured: dict, folder: Path, state: dict) -> None:
    save_file(state, folder / "mine.safetensors")
    graph: dict[str, Any] = {}
    for node, name in (("a", BUILT_IN), ("b", BUILT_IN), ("c", "mine.safetensors"), ("d", "mine.safetensors")):
        graph[node] = {"class_type": "FlashVideoTextEncoderLoader", "inputs": {"text_encoder_name": name}}
        graph[f"{node} out"] = {"class_type": "TestCapture", "inputs": {"value": [node, 0], "name": node}}
    outputs, _ = run_prompt(graph)
    assert captured["a"] is captured["b"]
    assert captured["c"] is captured["d"]
    assert captured["a"] is not captured["c"]
    assert "a" not in outputs  # nothing to say: the built-in encoder is trained
    assert "c" not in outputs


def test_the_built_in_encoder_is_the_default_and_files_follow(comfy_nodes: dict, folder: Path) -> None:
    (folder / "t5xxl_fp16.safetensors").write_bytes(b"x")
    choices, more = comfy_nodes["FlashVideoTextEncoderLoader"].INPUT_TYPES()["required"]["text_encoder_name"]
    assert (more.get("options") or choices) == [BUILT_IN, "t5xxl_fp16.safetensors"]
    assert more["default"] == BUILT_IN


@pytest.mark.parametrize("node", ["FlashVideoTextEncoderLoader", "FlashVideoTextEncode"])
def test_every_input_and_output_is_explained(comfy_nodes: dict, node: str) -> None:
    schema = comfy_nodes[node].GET_SCHEMA()
    assert schema.category == "FlashVideo"
    assert schema.description
    for port in [*schema.inputs, *schema.outputs]:
        assert str(port.tooltip).endswith("."), port.id
        assert "Default: " in port.tooltip or getattr(port, "default", None) is None


def test_the_packs_tokenizer_is_comfyuis(submodule: Callable[[str], ModuleType]) -> None:
    """The command line needs no ComfyUI for it."""
    file = Path(importlib.import_module("comfy.text_encoders.sd3_clip").__file__).parent / "t5_tokenizer/tokenizer.json"
    if not file.is_file():
        pytest.skip("this copy of ComfyUI lacks the file")
    t5 = submodule("flashvideo.t5")
    texts = [PROMPT, LONG_PROMPT, "", "Ein Fuchs läuft über die Mauer.", "1080p, 24 fps (f/2.8)"]
    assert torch.equal(t5.T5Tokens("")(texts), t5.T5Tokens(str(file))(texts))
