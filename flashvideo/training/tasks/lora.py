"""Low-rank adapters (arXiv 2106.09685): frozen linear layers with a small trained correction beside each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...dit import FlashVideoDiT
from ..randomness import generator_for

# ComfyUI's stock LoRA loader knows a diffusion model's layers by this prefix.
LORA_PREFIX = "diffusion_model."


class LoRALinear(nn.Module):
    """A frozen linear layer plus `up @ down / rank`, alpha 1 as in FlashVideo's official stage I."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        """Wrap `base`; the correction starts at zero."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(down.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    @property
    def correction(self) -> Tensor:
        """What is added to the weight, [out, in] in float32."""
        return self.lora_B @ self.lora_A / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = self.base(x)
        low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        return out + (nn.functional.linear(low, self.lora_B) / self.rank).to(out.dtype)


def add_lora(dit: FlashVideoDiT, rank: int, seed: int) -> None:
    """Freeze a network, and put adapters beside its attention and modulation layers, where the official ones are."""
    dit.requires_grad_(False)
    for index, block in enumerate(dit.blocks):
        for owner, name in ((block, "q"), (block, "k"), (block, "v"), (block, "attn_out")):
            setattr(owner, name, LoRALinear(getattr(owner, name), rank, generator_for(seed, "lora", index, name)))
        for name in ("norm1", "norm2"):
            norm = getattr(block, name)
            norm.linear = LoRALinear(norm.linear, rank, generator_for(seed, "lora", index, name))


def lora_state(dit: FlashVideoDiT) -> dict[str, Tensor]:
    """Adapters by the names that ComfyUI's LoRA loader reads."""
    state = {}
    for name, module in dit.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{LORA_PREFIX}{name}.lora_A.weight"] = module.lora_A
            state[f"{LORA_PREFIX}{name}.lora_B.weight"] = module.lora_B
            state[f"{LORA_PREFIX}{name}.alpha"] = torch.tensor(1.0)
    return state


@torch.no_grad()
def merged_state(dit: FlashVideoDiT) -> dict[str, Tensor]:
    """The network's whole weights, with adapters added in if it has any, by a plain network's names."""
    state = {}
    adapters = {name: module for name, module in dit.named_modules() if isinstance(module, LoRALinear)}
    for name, tensor in dit.state_dict().items():
        if not name.endswith((".lora_A", ".lora_B")):
            state[name.replace(".base.", ".")] = tensor
    for name, module in adapters.items():
        weight = module.base.weight
        state[f"{name}.weight"] = (weight.float() + module.correction).to(weight.dtype)
    return state
