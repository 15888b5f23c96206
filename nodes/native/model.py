"""Both stages as native ComfyUI MODELs: ComfyUI's loading, memory, precision, attention, LoRA and previews."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...flashvideo.checkpoints import OWN_PREFIX, read_dit, read_stored_dit
from ...flashvideo.config import (
    SPATIAL_FACTOR,
    STAGE1_LATENT_SCALE,
    STAGE2_LATENT_SCALE,
    TEMPORAL_FACTOR,
    DiTConfig,
)
from ...flashvideo.dit import FlashVideoDiT
from ...flashvideo.dit.tile_attention import WindowAttention
from ...flashvideo.memory import dit_bytes
from ...flashvideo.nano import latent_family, nano_preview
from .attention import ATTENTION_TILES, exact_attention
from .degradation import guard_degradation
from .host import ModelPatcher, assigned, keep_quantised, patcher_class, remember_loader
from .latent_origin import watch_sampler
from .packed import PackedOperations, PackedPatcher, keep_packed, unpacked
from .sampling import RefinerSampling, Stage1Sampling
from .schedule_guard import guard_stage1

# Linear map from the CogVideoX VAE's latent to RGB in [-1, 1], for previews (figures: ComfyUI-CogVideoXWrapper).
PREVIEW_FACTORS = [
    [0.1195, 0.0992, -0.0048],
    [-0.0012, 0.0550, 0.0213],
    [-0.0141, -0.0087, -0.0210],
    [0.0306, 0.1219, 0.0140],
    [0.0927, 0.0303, 0.0508],
    [0.0379, 0.0494, 0.0586],
    [0.0177, 0.0088, 0.0360],
    [0.1061, 0.0234, 0.0572],
    [0.1274, -0.0110, 0.0433],
    [-0.0187, 0.0822, 0.1061],
    [0.0084, 0.0762, 0.0930],
    [0.1294, 0.1236, 0.0448],
    [0.0457, 0.0411, -0.0177],
    [0.0002, -0.0140, 0.0533],
    [0.0808, 0.1155, -0.0215],
    [-0.0152, -0.0058, 0.0722],
]


class Stage1Latent(comfy.latent_formats.LatentFormat):
    """Stage I's latent space: the VAE's, times 0.7."""

    latent_channels = 16
    latent_dimensions = 3
    scale_factor = STAGE1_LATENT_SCALE
    spacial_downscale_ratio = SPATIAL_FACTOR
    temporal_downscale_ratio = TEMPORAL_FACTOR
    latent_rgb_factors = PREVIEW_FACTORS


class Stage2Latent(Stage1Latent):
    """Stage II's latent space: the VAE's, times 1.15258426."""

    scale_factor = STAGE2_LATENT_SCALE


def _nano_latent(kind: type[Stage1Latent], preview: Tensor) -> Stage1Latent:
    """A stage's latent space with FlashVideo-Nano's own colours in previews."""
    latent = kind()
    latent.latent_rgb_factors = (preview[:-1] / kind.scale_factor).tolist()
    latent.latent_rgb_factors_bias = preview[-1].tolist()
    return latent


class NativeDiT(FlashVideoDiT):
    """The network with ComfyUI's attention, wrappers and block replacements around it."""

    def __init__(
        self,
        config: DiTConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: Any = None,
        **_sizes: int,
    ) -> None:
        """`_sizes` are only there for ComfyUI's nodes, which read them in a model's settings; `config` has them too."""
        super().__init__(config, device=device, dtype=dtype, operations=operations)
        self.dtype = dtype
        self.in_channels = config.in_channels  # where ComfyUI's RenormCFG looks for it

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        transformer_options: dict[str, Any] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """ComfyUI's call: latent [B, C, T, H, W], timestep [B] and text [B, L, D] to the model's prediction."""
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timestep, context, options, **conditions)

    def _predict(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        transformer_options: dict[str, Any],
        degradation_step: int | None = None,
        **_unused: Any,
    ) -> Tensor:
        attend = exact_attention(x.device)

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, _start: int) -> Tensor:
            return attend(q, k, v, heads, skip_reshape=True, transformer_options=transformer_options)

        order = None
        if ATTENTION_TILES in transformer_options:
            size = self.config.patch_size
            grid = (x.shape[2], x.shape[3] // size, x.shape[4] // size)
            attention = WindowAttention(context.shape[1], grid, transformer_options[ATTENTION_TILES], attention)
            order = attention.order.to(x.device)
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})

        def around_block(index: int, block: Any, tokens: Tensor) -> Tensor:
            replacement = replacements.get(("double_block", index))
            if replacement is None:
                return block(tokens)
            return run_replacement(replacement, block, tokens, context.shape[1], transformer_options)

        return super().forward(
            x,
            timestep,
            context,
            degradation_step=degradation_step,
            attention=attention,
            order=order,
            around_block=around_block,
        )


def run_replacement(
    replacement: Any, block: Any, tokens: Tensor, text_tokens: int, transformer_options: dict[str, Any]
) -> Tensor:
    """Call a block replacement by ComfyUI's convention, which keeps video ("img") and text ("txt") apart."""

    def original(args: dict[str, Any]) -> dict[str, Any]:
        text, video = block(torch.cat((args["txt"], args["img"]), dim=1)).tensor_split((text_tokens,), dim=1)
        return {"txt": text, "img": video}

    text, video = tokens.tensor_split((text_tokens,), dim=1)
    args = {"img": video, "txt": text, "transformer_options": transformer_options}
    out = replacement(args, {"original_block": original})
    return torch.cat((out.get("txt", text), out["img"]), dim=1)


class FlashVideoModel(comfy.model_base.BaseModel):
    """What the two stages share as ComfyUI models."""

    latent_family: str | None = None  # see `flashvideo.nano.latent_family`

    def __init__(self, model_config: StageConfig, model_type: comfy.model_base.ModelType) -> None:
        super().__init__(model_config, model_type, unet_model=NativeDiT)

    def memory_required(self, input_shape: list[int], cond_shapes: dict[str, Any] | None = None) -> float:
        """Bytes of activations for a latent of `input_shape` [B, C, T, H, W]."""
        batch, _, *volume = input_shape
        dtype = self.manual_cast_dtype or self.get_dtype()
        device = comfy.model_management.get_torch_device().type
        return batch * dit_bytes(self.diffusion_model.config, tuple(volume), dtype, device)


class FlashVideoStage1(FlashVideoModel):
    """Stage I, the draft model."""

    def __init__(self, model_config: StageConfig) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.V_PREDICTION)
        self.model_sampling = Stage1Sampling()


class FlashVideoStage2(FlashVideoModel):
    """Stage II, the refiner. The network's degradation strength comes from the model sampling, as the noise does."""

    def __init__(self, model_config: StageConfig) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW)
        self.model_sampling = RefinerSampling()

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """ComfyUI's conditions, and the degradation strength."""
        conditions = super().extra_conds(**kwargs)
        conditions["degradation_step"] = comfy.conds.CONDConstant(self.model_sampling.degradation_step)
        return conditions


class StageConfig(comfy.supported_models_base.BASE):
    """How ComfyUI runs one stage."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]

    def __init__(self, config: DiTConfig) -> None:
        self.latent_format = Stage2Latent if config.stage == 2 else Stage1Latent
        if (preview := nano_preview(config)) is not None:
            self.latent_format = partial(_nano_latent, self.latent_format, preview)
        sizes = {"in_channels": config.in_channels, "out_channels": config.out_channels}
        super().__init__({"config": config, "model_channels": config.hidden_size, **sizes})

    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> FlashVideoModel:
        """The stage's model, its weights not yet loaded."""
        return FlashVideoStage2(self) if self.unet_config["config"].stage == 2 else FlashVideoStage1(self)

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names for Save Checkpoint and ModelSave that ComfyUI's own loaders don't take for CogVideoX's."""
        named = {OWN_PREFIX + key: each for key, each in unpacked(state_dict).items()}
        return super().process_unet_state_dict_for_saving(named)


def load_model(
    source: Path | dict[str, Tensor],
    dtype: torch.dtype | None = None,
    fp8_matmul: bool = False,
    *,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL from a checkpoint in any known layout, or from its state dict.

    `dtype` overrides how weights are stored; `fp8_matmul` multiplies in fp8 on cards that can; `disable_dynamic` loads
    it without newer ComfyUIs' dynamic VRAM. Without a `dtype`, GGUF's packed weights stay packed, and quantised layers
    stay so where this ComfyUI has such layers; elsewhere they become bfloat16. Raises CheckpointError.
    """
    stored = read_stored_dit(source)
    config, state = stored.config, stored.state
    stage = StageConfig(config)
    packed = bool(stored.packings) and dtype is None
    quantised = packed or (bool(stored.layers) and dtype is None and keep_quantised(stage, state, stored.layers))
    if packed:
        stage.custom_operations = PackedOperations
        keep_packed(state, stored.packings)
    elif (stored.layers or stored.packings) and not quantised:
        logging.info("FlashVideo: quantised weights become plain ones here, which take as much memory as those do.")
        _, state = read_dit(source)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    storage = dtype or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=stage.supported_inference_dtypes,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(state),
    )
    held = None if quantised else storage  # None: whatever the layers hold, they compute in what the device does best
    compute = comfy.model_management.unet_manual_cast(held, load_device, stage.supported_inference_dtypes)
    stage.set_inference_dtype(storage, compute)
    stage.optimizations["fp8"] = fp8_matmul
    model = stage.get_model(state).to(offload_device)
    model.latent_family = latent_family(source, config)
    make_patcher = PackedPatcher if packed else patcher_class(disable_dynamic=disable_dynamic)
    patcher = make_patcher(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(state, "", **assigned(patcher))
    if not quantised:  # newer ComfyUIs' layers take weights as the file has them
        for parameter in model.diffusion_model.parameters():
            parameter.data = parameter.data.to(storage)
    remember_loader(patcher, load_model, source, dtype, fp8_matmul)
    return guarded(patcher)


def guarded(patcher: ModelPatcher) -> ModelPatcher:
    """The MODEL itself, with the check of its stage's samplers and latents."""
    guard = guard_degradation if patcher.model.diffusion_model.config.stage == 2 else guard_stage1
    # The guard gives the sampler other latents: what watches them goes first.
    for key, wrapper in (("flashvideo_origin", watch_sampler), ("flashvideo_guard", guard)):
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, key, wrapper)
    return patcher
