"""The node that estimates memory and time of a video before it is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..flashvideo.config import STAGE2_SCALE
from ..flashvideo.devices import GIB
from ..flashvideo.frames import MAX_SIDE
from ..flashvideo.planner import NANO, OFFICIAL, NetworkConfigs, Setting, make_plan
from ..flashvideo.planner.budget import Budget, advise, on_card
from ..flashvideo.planner.plot import plot
from ..flashvideo.planner.report import advice_report, report
from ..flashvideo.planner.speed import CALIBRATION_BYTES, CalibratedRates
from ..flashvideo.vae.memory import STORE_SHARE
from .checks import check_stage
from .common import CATEGORY, found_as, named
from .inputs import checked
from .native.multidiffusion import tile_of
from .native.vae import FlashVideoVAE

# Saved workflows hold these names: they never change.
MODELS = {"FlashVideo": OFFICIAL, "FlashVideo-Nano": NANO}
PRECISIONS = {"16-bit": "bf16", "8-bit": "fp8", "32-bit": "fp32"}
_FIELDS = {
    "length": "frames",
    "draft_steps": "stage1_steps",
    "steps": "stage2_steps",
}  # inputs that a Setting calls otherwise
_PRECISION_OF = {1: "fp8", 2: "bf16", 4: "fp32"}  # by bytes of a weight


class FlashVideoPlanner(io.ComfyNode):
    """What a video costs, and the best that a budget allows."""

    NAME = "FlashVideo Planner"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoPlanner",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("vram", "memory estimate", "time estimate", "out of memory", "budget"),
            description="Estimates how much memory and time a video will take on this computer, before you make it, "
            "and the best settings within a budget. It tests the speed of your card for a second.",
            is_output_node=True,
            inputs=[
                io.Int.Input(
                    "width",
                    default=1920,
                    min=16,
                    max=MAX_SIDE,
                    tooltip="Width of the final video in pixels. Time grows much faster than the number of pixels. "
                    "Useful: 960 to 2560. Default: 1920.",
                ),
                io.Int.Input(
                    "height",
                    default=1080,
                    min=16,
                    max=MAX_SIDE,
                    tooltip="Height of the final video in pixels; above the width for portrait. Useful: 540 to 1440. "
                    "Default: 1080.",
                ),
                io.Int.Input(
                    "length",
                    default=49,
                    min=1,
                    max=100000,
                    tooltip="Number of frames. Longer takes more time; beyond 49 the refiner works in windows, so that "
                    "its memory stays the same. Default: 49.",
                ),
                io.Int.Input(
                    "draft_steps",
                    default=50,
                    min=0,
                    max=1000,
                    tooltip="Steps of the draft. More takes longer; 30 to 50 is useful. 0 plans the refining of a clip "
                    "that you have. Default: 50.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=20,
                    tooltip="Steps of the Stage II Refiner. Time grows with them; 4 to 6 is useful. Default: 4.",
                ),
                io.Float.Input(
                    "cfg",
                    default=STAGE2_SCALE,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="cfg of the Stage II Refiner. 1 halves its time; all others, such as the useful 10 to 13, "
                    "cost the same. Default: 13.",
                ),
                io.Combo.Input(
                    "models",
                    options=list(MODELS),
                    default=next(iter(MODELS)),
                    tooltip="Which models to plan for where none is connected. FlashVideo: the official ones. "
                    "FlashVideo-Nano: the built-in miniature. Default: FlashVideo.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=next(iter(PRECISIONS)),
                    tooltip="How the models are kept in memory; a connected model brings its own. 8-bit: the fp8 "
                    "choices of Load FlashVideo Model, half the memory. 32-bit: twice as much. Default: 16-bit.",
                ),
                io.Float.Input(
                    "memory_budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Memory of the card to plan for, in GiB, such as 8, 12, 16 or 24: less allows smaller "
                    "videos. 0 is the card in this computer. Default: 0.",
                ),
                io.Float.Input(
                    "time_budget",
                    default=0.0,
                    min=0.0,
                    max=1000000.0,
                    step=10.0,
                    tooltip="How long the video may take, in seconds: less allows smaller or shorter videos. 0 doesn't "
                    "limit the time. Useful: 60 to 3600. Default: 0.",
                ),
                io.Model.Input(
                    "draft_model",
                    optional=True,
                    tooltip="FlashVideo stage I, to plan for the one that is loaded.",
                ),
                io.Model.Input(
                    "refiner_model",
                    optional=True,
                    tooltip="FlashVideo stage II, to plan for the one that is loaded, and its Spatial Tiles.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE, to plan for the one that is loaded. One that ComfyUI's Load VAE loaded counts as "
                    "the official one.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The plan as text, as it is shown on the node."),
                io.Image.Output(
                    display_name="plot", tooltip="Memory and time of each phase as bars, for Preview Image."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        models: str,
        precision: str,
        memory_budget: float,
        time_budget: float,
        draft_model: io.Model.Type | None = None,
        refiner_model: io.Model.Type | None = None,
        vae: io.Vae.Type | None = None,
        **video: Any,
    ) -> io.NodeOutput:
        """Plan, and measure how fast the card is. `video` holds the inputs from width to cfg."""
        device = comfy.model_management.get_torch_device()
        with named(cls.NAME):
            networks = _networks(MODELS[models], draft_model, refiner_model, vae)
            loaded = refiner_model or draft_model
            name = PRECISIONS[precision] if loaded is None else _precision(loaded)
            setting = Setting(**{_FIELDS.get(key, key): value for key, value in video.items()}, precision=name)
            tile = 0 if refiner_model is None else tile_of(refiner_model)
            setting = replace(setting, networks=networks, tile=tile, device=device.type)
            memory = memory_budget * GIB or comfy.model_management.get_total_memory(device)
            budget = Budget(memory, time_budget or None)
            store = comfy.model_management.get_free_memory(torch.device("cpu")) * STORE_SHARE
            setting = replace(on_card(setting, memory), store=store)
        comfy.model_management.free_memory(CALIBRATION_BYTES, device)
        rates = CalibratedRates(device)
        plan = make_plan(setting)
        text = "\n\n".join(
            (report(plan, rates(setting)), advice_report(plan, advise(setting, budget, rates), budget, rates))
        )
        picture = torch.from_numpy(np.asarray(plot(plan, rates(setting), budget), dtype=np.float32) / 255)[None]
        return io.NodeOutput(text, picture, ui=ui.PreviewText(text))


def _networks(networks: NetworkConfigs, draft: Any, refiner: Any, vae: Any) -> NetworkConfigs:
    """The networks that are connected, and the chosen ones for the rest."""
    connected: dict[str, Any] = {}
    for part, stage, model in (("stage1", 1, draft), ("stage2", 2, refiner)):
        if model is not None:
            check_stage(model, stage)
            connected[part] = model.model.diffusion_model.config
    if vae is not None:
        ours = isinstance(vae, FlashVideoVAE)
        connected["vae"] = vae.first_stage_model.config if ours else OFFICIAL.vae
    return replace(networks, name="connected", **connected) if connected else networks


def _precision(model: Any) -> str:
    return _PRECISION_OF[min(4, model.model.get_dtype().itemsize)]


NODES = [FlashVideoPlanner]
