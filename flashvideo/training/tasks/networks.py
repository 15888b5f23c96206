"""What the training of both stages shares: the diffusion transformer that learns, its text, and its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...atomic_files import sha256
from ...checkpoints import STAGE_METADATA, load_dit
from ...config import NANO_STAGE1, NANO_STAGE2, TEXT_TOKENS
from ...dit import Attention, FlashVideoDiT, attention_sdpa
from ...nano import build_part
from ...t5 import T5Encoder, T5Tokens, contexts, load_encoder
from ..data.latents import LatentCache
from ..errors import TrainingError
from ..loop.checkpointing import as_stored, export_weights
from .lora import LORA_PREFIX, add_lora, lora_state, merged_state

SHORT_SEQUENCE = 1024  # tokens up to which attention's matrix may be kept for the backward pass

# watch(index, tokens) receives the output of layer `index`, [B, text + video tokens, hidden]; without autograd the next
# layer overwrites it.
Watch = Callable[[int, Tensor], Any]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class NetworkSettings:
    """Which diffusion transformer learns, and how."""

    weights: str = ""  # a file to start from, official or converted; empty for a fresh miniature
    blocks: int = 0  # more than the file has: it is deepened, see `deepened`; 0: as many as there are
    lora_rank: int = 0  # 0 trains all weights
    dtype: str = "fp32"  # of the weights in training; with LoRA, of the frozen ones
    checkpoint_blocks: bool = False  # trade a third more time for much less memory
    export_dtype: str = "fp16"
    eight_bits: bool = False  # the written file's large weights are stored in 8 bits, see `as_stored`

    def __post_init__(self) -> None:
        """Refuse unknown data types, and adapters in 8 bits."""
        for name in (self.dtype, self.export_dtype):
            if name not in DTYPES:
                raise TrainingError(f"[network] data types are {', '.join(DTYPES)}; got {name!r}.")
        if self.eight_bits and self.lora_rank:
            raise TrainingError("[network] eight_bits is for whole networks, not for adapters: drop it or lora_rank.")


@dataclass(frozen=True)
class ShortText:
    """In the first part of training only the beginning of contexts is seen: the rest of a short caption is padding."""

    tokens: int = TEXT_TOKENS
    until: int = 0  # the step from which on whole contexts are seen, as they are in use

    def __post_init__(self) -> None:
        """Refuse a length that no context has."""
        if not 1 <= self.tokens <= TEXT_TOKENS:
            raise TrainingError(f"[short_text] tokens must be 1 to {TEXT_TOKENS}; got {self.tokens}.")

    def cut(self, text: Tensor, step: int) -> Tensor:
        """The part of contexts [B, 226, width], or of tokens [B, 226], that is seen in this step."""
        return text[:, : self.tokens] if step < self.until else text


def make_network(settings: NetworkSettings, stage: int, seed: int, device: torch.device) -> FlashVideoDiT:
    """Load a stage's network, or make a fresh miniature; with adapters if the settings ask for them."""
    dtype = DTYPES[settings.dtype]
    if settings.weights:
        dit = load_dit(Path(settings.weights), device=device, dtype=dtype, stage=stage)
        if settings.blocks and settings.blocks != dit.config.num_layers:
            dit = deepened(dit, settings.blocks)
    else:
        dit = load_dit(build_part(f"stage{stage}", seed), device=device, dtype=dtype, stage=stage)
        if dit.config != (NANO_STAGE1, NANO_STAGE2)[stage - 1]:
            raise TrainingError("The fresh miniature has other sizes than it should.")
        nn.init.zeros_(dit.proj_out.weight)  # learning starts at the mean, not at noise
    if settings.lora_rank:
        add_lora(dit, settings.lora_rank, seed)
    return dit


def deepened(dit: FlashVideoDiT, blocks: int) -> FlashVideoDiT:
    """A network of `blocks` blocks that computes what `dit` does, until it learns.

    The new ones are spread evenly. Each begins as a copy of the block before it whose two branches end in zeros, so
    that it adds nothing (after Net2Net, arXiv 1511.05641). Raises TrainingError for fewer blocks than there are.
    """
    old = dit.config.num_layers
    if blocks < old:
        raise TrainingError(f"[network] blocks must be {old} or more, as many as the weights have; got {blocks}.")
    sources = [index * old // blocks for index in range(blocks)]
    state = dit.state_dict()
    deep = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for index, source in enumerate(sources):
        is_new = index > 0 and sources[index - 1] == source
        for name, tensor in state.items():
            block = f"blocks.{source}."
            if name.startswith(block):
                rest = name.removeprefix(block)
                silent = is_new and rest.startswith(("attn_out.", "ff_out."))
                deep[f"blocks.{index}.{rest}"] = torch.zeros_like(tensor) if silent else tensor.clone()
    network = FlashVideoDiT(dataclasses.replace(dit.config, num_layers=blocks))
    network.load_state_dict(deep, assign=True)
    return network.eval()


def describe_network(dit: FlashVideoDiT, settings: NetworkSettings) -> dict[str, Any]:
    """Numbers that a checkpoint must agree with."""
    return {"network": f"stage{dit.config.stage}", **dataclasses.asdict(dit.config), "lora_rank": settings.lora_rank}


def as_called(
    dit: FlashVideoDiT, *, checkpoint_blocks: bool = False, watch: Watch | None = None
) -> Callable[..., Tensor]:
    """The network as the losses call it: input in its data type, blocks recomputed in the backward pass if wanted.

    `watch` receives every layer's output.
    """
    dtype = dit.proj_out.weight.dtype

    def around(index: int, block: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        recomputed = checkpoint_blocks and torch.is_grad_enabled()
        tokens = checkpoint(block, tokens, use_reentrant=False) if recomputed else block(tokens)
        if watch is not None:
            watch(index, tokens)
        return tokens

    def call(latent: Tensor, timestep: Tensor, context: Tensor, **options: Any) -> Tensor:
        attention = _attention(latent, context.shape[1], dit.config.patch_size)
        return dit(latent.to(dtype), timestep, context.to(dtype), around_block=around, attention=attention, **options)

    return call


def _attention(latent: Tensor, text: int, patch: int) -> Attention:
    """The attention to train with: on a CPU, PyTorch's own takes 1.3 times as long forward and backward."""
    tokens = text + latent.shape[2] * (latent.shape[3] // patch) * (latent.shape[4] // patch)
    is_short = latent.device.type == "cpu" and torch.is_grad_enabled() and tokens <= SHORT_SEQUENCE
    return attention_products if is_short else attention_sdpa


def attention_products(q: Tensor, k: Tensor, v: Tensor, heads: int, start: int = 0) -> Tensor:
    """Exact attention as two matrix products, softmax in the data type: [B, heads, n or N, head_dim] -> [B, n, hidden].

    It is the same wherever the queries `start`.
    """
    q, k, v = (rearrange(each, "b heads n width -> (b heads) n width") for each in (q, k, v))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.mT)
    with torch.autocast(q.device.type, enabled=False):
        weights = scores.softmax(-1)
    return rearrange(torch.bmm(weights, v), "(b heads) n width -> b n (heads width)", heads=heads)


def round_as_stored(dit: FlashVideoDiT, settings: NetworkSettings) -> None:
    """Give a network the weights that its file will hold, so that what is measured is what is shipped."""
    if settings.eight_bits:
        dit.load_state_dict(as_stored(dit.state_dict(), DTYPES[settings.export_dtype], eight_bits=True))


def export_network(
    folder: Path, dit: FlashVideoDiT, settings: NetworkSettings, step: int, scores: Mapping[str, float]
) -> Path:
    """Write stage1.safetensors or stage2.safetensors; with LoRA the adapters alone, as ..._lora.safetensors."""
    stage = dit.config.stage
    metadata = {STAGE_METADATA: str(stage), "flashvideo.trained": "true", "flashvideo.step": str(step)}
    metadata |= {f"flashvideo.{name}": f"{value:.4f}" for name, value in scores.items()}
    if settings.lora_rank:
        path, state = folder / f"stage{stage}_lora.safetensors", lora_state(dit)
        metadata["flashvideo.lora_prefix"] = LORA_PREFIX
    else:
        path, state = folder / f"stage{stage}.safetensors", merged_state(dit)
    export_weights(path, state, metadata, DTYPES[settings.export_dtype], eight_bits=settings.eight_bits)
    return path


class FrozenText:
    """A text encoder that doesn't learn: it gives contexts for the cached latents, and is then freed."""

    def __init__(self, path: str, tokenizer: str, device: torch.device) -> None:
        """Check the files; the encoder itself is read when it is first needed."""
        if not Path(path).is_file():
            raise TrainingError(f"{path or 'text_encoder'}: there is no such text encoder. Train it, or set `text`.")
        self.path, self.device = Path(path), device
        self.digest = sha256(self.path, lambda *_: None)  # separates the cached latents of different encoders
        self.tokens = T5Tokens(tokenizer)
        self._encoder: T5Encoder | None = None

    def __call__(self, texts: list[str]) -> Tensor:
        """Contexts of texts, [N, 226, width], float32 on the CPU."""
        if self._encoder is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self._encoder = load_encoder(self.path, self.device, dtype).eval()
        return contexts(self._encoder, self.tokens, texts)

    def release(self) -> None:
        """Free the encoder's memory; the next call reads it again."""
        self._encoder = None


@contextmanager
def set_aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a model in main memory while others need the device."""
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def held_out_batch(cache: LatentCache, count: int) -> dict[str, Tensor]:
    """The first clips of a cache, stacked."""
    return cache.batch(range(min(count, len(cache))))
