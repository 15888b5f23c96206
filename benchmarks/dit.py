"""The network's forward beside its peers and its machine's floor: `python benchmarks/dit.py`.

Peers, at equal weights and sizes: diffusers' CogVideoXTransformer3DModel (if diffusers is installed), and ComfyUI
core's CogVideoX (if COMFYUI_PATH names a ComfyUI that has it). The floor is what no implementation of this network
can do without: its matrix products and attention calls alone, with nothing between them. Outputs are compared first;
then all run in turn. `--width` and `--layers` make the network; heads are 64 wide, as in both stages.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, SEED, add_options, alternate, load_library, medians, peak_memory, report
from torch import Tensor

load_library()

from flashvideo.checkpoints import load_dit  # noqa: E402
from flashvideo.checkpoints.keymaps import Layout, original_name  # noqa: E402
from flashvideo.config import TEXT_TOKENS, DiTConfig  # noqa: E402
from flashvideo.dit import FlashVideoDiT, attention_sdpa  # noqa: E402
from flashvideo.dit.rope import rope_table  # noqa: E402

TEXT_WIDTH = 512
# Latent frames, rows and columns of patches; with the text's 226 about 256, 512, 1,024, ... tokens.
LADDER = [(1, 5, 6), (1, 13, 22), (3, 14, 19), (3, 24, 25), (5, 27, 28), (7, 32, 36)]
# Largest difference of two implementations, relative to the output's largest value. Their last norm's epsilon differs
# (1e-5, and 1e-6 in FlashVideo), and in bfloat16 each rounds in other places.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # latent [B, C, T, H, W], timestep [B], text [B, L, D]


@dataclass
class Inputs:
    """One size of video."""

    latent: Tensor
    timestep: Tensor
    context: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, the text's included."""
        return self.context.shape[1] + self.latent[0, 0].numel() // 4


def main() -> None:
    """Measure each size and dtype, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(LADDER), help="how many sizes, from the smallest")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    options = parser.parse_args()
    rows = []
    for name in options.dtypes:
        dtype = DTYPES[name]
        networks = make_networks(options.width, options.layers, dtype, options.device)
        for size in LADDER[: options.sizes]:
            inputs = make_inputs(size, dtype, options.device)
            rows.append([name, inputs.tokens, *measure(networks, inputs, options.rounds, options.device)])
            sys.stderr.write(f"{rows[-1]}\n")
    columns = ["dtype", "tokens", "floor, s"]
    for peer in networks:
        columns += [f"{peer}, s", f"{peer} / floor", f"{peer} peak, bytes / token"]
    facts = {"width": options.width, "layers": options.layers, "batch": 1, "rounds": options.rounds}
    title = "One evaluation of the network, floor and peers in turn, medians"
    report(title, columns, rows, device=options.device, facts=facts, target=options.json)


def make_networks(width: int, layers: int, dtype: torch.dtype, device: str) -> dict[str, Forward | FlashVideoDiT]:
    """Our network and its peers, with the same random weights."""
    state = load_dit(random_state(width, layers)).state_dict()
    ours = load_dit(state, device=device, dtype=dtype).eval()
    networks: dict[str, Forward | FlashVideoDiT] = {"ours": ours}
    if importlib.util.find_spec("diffusers"):
        networks["diffusers"] = diffusers_forward(ours)
    core = os.environ.get("COMFYUI_PATH")
    if core and (Path(core) / "comfy" / "ldm" / "cogvideo").is_dir():
        networks["core"] = core_forward(ours, core)
    return networks


def random_state(width: int, layers: int) -> dict[str, Tensor]:
    """Weights of a stage-I network that neither fade nor blow up."""
    config = DiTConfig(layers, width, width // 64, 512, TEXT_WIDTH, 4 * width)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in FlashVideoDiT(config).state_dict().items()}
    generator = torch.Generator().manual_seed(SEED)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = values / shape[1:].numel() ** 0.5
        else:
            norm_weight = "norm" in name and name.endswith("weight")
            state[name] = values * 0.1 + (1.0 if norm_weight else 0.0)
    return state


def _sizes(config: DiTConfig) -> dict[str, Any]:
    """The arguments that diffusers' network and core's have in common."""
    return {
        "num_attention_heads": config.num_heads,
        "time_embed_dim": config.time_embed_dim,
        "text_embed_dim": config.text_dim,
        "num_layers": config.num_layers,
        "use_rotary_positional_embeddings": True,
    }


def diffusers_forward(ours: FlashVideoDiT) -> Forward:
    """diffusers' network with the weights of ours."""
    from diffusers import CogVideoXTransformer3DModel

    config, weight = ours.config, ours.proj_out.weight
    peer = CogVideoXTransformer3DModel(**_sizes(config))
    layout = Layout("dit", "diffusers")
    peer.load_state_dict({original_name(name, layout): value for name, value in ours.state_dict().items()})
    peer.to(weight).eval()

    def forward(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        cos, sin = rope_table(
            latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2, config.head_dim, weight.device
        )
        positions = (cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))
        out = peer(latent.transpose(1, 2), context, timestep, image_rotary_emb=positions, return_dict=False)
        return out[0].transpose(1, 2)

    return forward


def core_forward(ours: FlashVideoDiT, comfyui: str) -> Forward:
    """ComfyUI core's network with the weights of ours, and PyTorch's attention."""
    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    args.cpu = ours.proj_out.weight.device.type == "cpu"
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    config, weight = ours.config, ours.proj_out.weight
    core = CogVideoXTransformer3DModel(
        **_sizes(config),
        spatial_interpolation_scale=1.0,
        device=weight.device,
        dtype=weight.dtype,
        operations=comfy.ops.disable_weight_init,
    )
    core.load_state_dict(ours.state_dict())
    core.to(weight.dtype).eval()
    return core


def make_inputs(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Inputs:
    """Random latent and text for a size in latent frames, rows and columns of patches."""
    frames, rows, columns = size
    generator = torch.Generator().manual_seed(SEED)
    latent = torch.randn(1, 16, frames, 2 * rows, 2 * columns, generator=generator)
    context = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return Inputs(latent.to(device, dtype), torch.tensor([500.0], device=device), context.to(device, dtype))


def make_floor(dit: FlashVideoDiT, inputs: Inputs) -> Callable[[], None]:
    """All matrix products and attention calls of one evaluation, on tensors that are already there."""
    config, weight = dit.config, dit.proj_out.weight

    def rows(count: int, width: int) -> Tensor:
        return torch.randn(1, count, width, dtype=weight.dtype, device=weight.device)

    tokens, text = inputs.tokens, inputs.context.shape[1]
    hidden, embedding = rows(tokens, config.hidden_size), rows(1, config.time_embed_dim)
    expanded, video = rows(tokens, config.ff_dim), rows(tokens - text, config.hidden_size)
    patches = inputs.latent.transpose(1, 2).flatten(0, 1)
    q, k, v = (rows(tokens, config.hidden_size).unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for _ in "qkv")
    products = [
        (dit.patch_embed.proj, patches),
        (dit.patch_embed.text_proj, inputs.context),
        (dit.time_embedding_linear_1, rows(1, config.hidden_size)),
        (dit.time_embedding_linear_2, embedding),
        (dit.norm_out.linear, embedding),
        (dit.proj_out, video),
    ]
    for block in dit.blocks:
        products += [(layer, hidden) for layer in (block.q, block.k, block.v, block.attn_out, block.ff_proj)]
        products += [(block.ff_out, expanded), (block.norm1.linear, embedding), (block.norm2.linear, embedding)]

    def run() -> None:
        for layer, x in products:
            layer(x)
        for _ in dit.blocks:
            attention_sdpa(q, k, v, config.num_heads)

    return run


@torch.inference_mode()
def measure(networks: dict[str, Forward | FlashVideoDiT], inputs: Inputs, rounds: int, device: str) -> list[float]:
    """Compare outputs, then time: seconds of the floor; of each network its seconds, ratio to the floor, and memory."""
    arguments = (inputs.latent, inputs.timestep, inputs.context)
    expected = networks["ours"](*arguments).float()
    for name, network in networks.items():
        error = float((network(*arguments).float() - expected).abs().max() / expected.abs().max())
        if not error <= AGREEMENT[inputs.latent.dtype]:
            raise SystemExit(f"{name} gives other numbers than ours: {error:.2g} of the largest value.")
    runs = {name: lambda network=network: network(*arguments) for name, network in networks.items()}
    seconds = alternate({"floor": make_floor(networks["ours"], inputs), **runs}, rounds, device)
    times = medians(seconds)
    row = [times["floor"]]
    for name, run in runs.items():
        ratios = sorted(mine / floor for mine, floor in zip(seconds[name], seconds["floor"], strict=True))
        row += [times[name], ratios[len(ratios) // 2], peak_memory(run, device) / inputs.tokens]
    return row


if __name__ == "__main__":
    main()
