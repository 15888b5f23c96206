"""Nodes of stage II: latent degradation, the refiner, and how it is set up."""

from __future__ import annotations

from contextlib import nullcontext

from comfy_api.latest import io, ui

from ..flashvideo.config import (
    MAX_SEED,
    OVERLAP_FRAMES,
    PIXEL_MULTIPLE,
    STAGE2_SCALE,
    STAGE2_SHIFT,
    TEMPORAL_FACTOR,
    TILE,
    TRAIN_STEPS,
    WINDOW,
)
from ..flashvideo.degradation import degradation_weights, suited_strength
from ..flashvideo.presets import PRESETS, Preset
from ..flashvideo.refiner.tiles import SMALLEST_TILE_PIXELS
from .checks import batch_of, check_batch, check_latent, check_stage, check_text
from .common import CATEGORY, found_as, named, own_id
from .inputs import checked
from .native.degradation import (
    NOISE_LIKE,
    check_unmasked,
    counted_as_degraded,
    degradation_of,
    degrade,
    looks_like_noise,
    preset_of,
    suited_to_latent,
    was_degraded,
)
from .native.multidiffusion import with_tiles, with_windows
from .native.notices import note, warn
from .native.stages import latent_noise, refiner_settings, run_stage2

MAX_WINDOW = 1001  # frames; no card holds as many at once
MAX_TILE = 8192  # pixels
AS_KNOWN = -1  # in place of a strength: the latent brings it along
SOLVERS = ["euler", "heun", "dpmpp_2m", "res_multistep"]

AUTO = -1  # the value of the strength widget that means auto
STRENGTH_TOOLTIP = (
    "How much of the input's detail is hidden before it is generated again. -1 is auto: what the official 675 at 1080p "
    "means for this size, such as 298 at 448x256; for FlashVideo-Nano 60. The number is shown. Lower stays closer to "
    "the input, flaws included; higher invents more and can drift. Default: -1."
)
CUSTOM = "custom"  # the preset widget's choice that is none
PRESET_TOOLTIP = (
    "The refiner's numbers in one word, {overrides}. custom: the widgets count. faithful stays closer to the clip, "
    "rich repairs and invents more, fast takes 3 evaluations of the network in place of 8, balanced has the official "
    "numbers. The numbers are shown; FlashVideo-Nano keeps its strength of 60. Default: custom."
)
SHIFT_TOOLTIP = (
    "How the steps are spaced. Higher takes smaller steps at the start, where the layout is settled; 2 to 3.5 works "
    "well. Default: 2.5."
)


def strength_input() -> io.Int.Input:
    """The degradation strength, which two nodes ask for."""
    return io.Int.Input("strength", default=AUTO, min=AUTO, max=TRAIN_STEPS - 1, tooltip=STRENGTH_TOOLTIP)


def chosen_strength(strength: int) -> int | None:
    """The widget's strength; None for auto. Raises ValueError beyond 0 to 999."""
    if strength == AUTO:
        return None
    degradation_weights(strength)
    return strength


def preset_input(overrides: str) -> io.Combo.Input:
    """The preset, which three nodes ask for; `overrides` tells what it takes the place of."""
    return io.Combo.Input(
        "preset",
        options=[CUSTOM, *PRESETS],
        default=CUSTOM,
        optional=True,
        tooltip=PRESET_TOOLTIP.format(overrides=overrides),
    )


def chosen_preset(preset: str) -> Preset | None:
    """The widget's preset; None where the other widgets count."""
    return None if preset == CUSTOM else PRESETS[preset]


def shift_input() -> io.Float.Input:
    """The flow shift, which two nodes ask for."""
    return io.Float.Input("shift", default=STAGE2_SHIFT, min=0.1, max=20.0, step=0.1, tooltip=SHIFT_TOOLTIP)


def window_inputs() -> list[io.Int.Input]:
    """How long videos are cut, which two nodes ask for; both inputs came later and are optional."""
    return [
        io.Int.Input(
            "window",
            default=WINDOW,
            min=0,
            max=MAX_WINDOW,
            optional=True,
            tooltip="Frames that are refined together; 1, 5, 9 ... A longer video is refined in windows that are "
            "blended at every step, so that memory doesn't grow with its length. Fewer need less memory and agree "
            "less; 25 to 49 is useful. 0: always the whole video. Default: 49.",
        ),
        io.Int.Input(
            "overlap",
            default=OVERLAP_FRAMES,
            min=0,
            max=MAX_WINDOW - 1,
            step=TEMPORAL_FACTOR,
            optional=True,
            tooltip="Frames that neighbouring windows share, less than window. More blends more smoothly and takes "
            "longer; 8 to 24 is useful. Default: 16.",
        ),
    ]


class FlashVideoLatentDegradation(io.ComfyNode):
    """The noise that stage II starts from."""

    NAME = "FlashVideo Latent Degradation"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoLatentDegradation",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("add noise", "degrade latent", "refine strength"),
            description="Hides the flaws of an upscaled video under noise, so that the refiner generates its "
            "detail again. Goes between VAE Encode and the Stage II Refiner.",
            inputs=[
                io.Latent.Input("latent", tooltip="The upscaled video, from VAE Encode."),
                strength_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Which noise is used: another seed gives another version of the fine detail. Default: 0.",
                ),
                preset_input("in place of strength here and of steps, cfg and shift of the Stage II Refiner after it"),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The degraded latent; it carries its strength, and its preset, to the refiner.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, latent: dict, strength: int, seed: int, preset: str = CUSTOM) -> io.NodeOutput:
        """Degrade the latent."""
        with named(cls.NAME):
            samples = check_latent(latent)
            check_unmasked(latent.get("noise_mask"))
            before = degradation_of(latent)
            if before is not None:
                raise ValueError(
                    f"this latent was degraded before, with strength {before}; a second time would ruin it. "
                    "Remove one of the two degradation nodes"
                )
            if looks_like_noise(samples):
                warn(NOISE_LIKE, own_id(cls))
            known = chosen_preset(preset)
            chosen = chosen_strength(strength) if known is None else known.choices["strength"]
            is_own = isinstance(chosen, int)
            used = suited_to_latent(samples, chosen)
            noise = latent_noise(samples.shape, seed, check_batch(latent)).to(samples)
            degraded = degrade(latent, noise, used, None if known is None else preset)
        if is_own:
            return io.NodeOutput(degraded)
        text = f"strength {used} (auto)" if known is None else f"preset {preset}: strength {used}"
        note(cls.NAME, text, own_id(cls))
        return io.NodeOutput(degraded, ui=ui.PreviewText(text))


class FlashVideoStage2Refiner(io.ComfyNode):
    """The official stage-II sampler."""

    NAME = "FlashVideo Stage II Refiner"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoStage2Refiner",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("video upscale", "upscaler", "refine", "enhance", "super resolution", "video to video"),
            description="Gives a degraded, upscaled video real detail in a few steps.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage II, from Load FlashVideo Model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the video shows, from FlashVideo Prompt; motion 'medium' is the official setting "
                    "for the refiner.",
                ),
                io.Conditioning.Input("negative", tooltip="The empty prompt, from FlashVideo Prompt's second output."),
                io.Latent.Input("latent", tooltip="The degraded video, from FlashVideo Latent Degradation."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=20,
                    tooltip="Number of steps. 4 to 6 is enough; more is slower and hardly better. Default: 4.",
                ),
                io.Float.Input(
                    "cfg",
                    default=STAGE2_SCALE,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly detail follows the prompt. 10 to 13 works well; lower is softer, higher "
                    "crisper and harsher. 1 halves the time and loses most of the effect. Default: 13.",
                ),
                shift_input(),
                io.Combo.Input(
                    "solver",
                    options=SOLVERS,
                    default=SOLVERS[0],
                    tooltip="How a step is taken. euler is the official way; heun takes twice as long a step for "
                    "more precision; the others look back at earlier steps. Default: euler.",
                ),
                *window_inputs(),
                io.Int.Input(
                    "degraded_strength",
                    default=AS_KNOWN,
                    min=AS_KNOWN,
                    max=TRAIN_STEPS - 1,
                    optional=True,
                    tooltip="Only for a degraded latent from elsewhere, such as Load Latent: the strength that it was "
                    "degraded with. -1: the latent brings its strength along. Default: -1.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The refined video, for VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        positive: list,
        negative: list,
        latent: dict,
        steps: int,
        cfg: float,
        shift: float,
        solver: str,
        window: int = WINDOW,
        overlap: int = OVERLAP_FRAMES,
        **later: int,
    ) -> io.NodeOutput:
        """Refine the latent. `later` holds the inputs behind overlap."""
        degraded_strength = later.get("degraded_strength", AS_KNOWN)
        settings = {"steps": steps, "cfg": cfg, "shift": shift, "solver": solver}
        with named(cls.NAME):
            check_stage(model, 2)
            samples = check_latent(latent)
            check_unmasked(latent.get("noise_mask"))
            check_text(model, positive=positive, negative=negative)
            strength = degradation_of(latent) if degraded_strength == AS_KNOWN else degraded_strength
            if strength is None and was_degraded(latent):
                raise ValueError(
                    "another node (a sampler, an upscale) has changed this latent since it was degraded. Put "
                    "FlashVideo Latent Degradation right before this node"
                )
            if strength is None:
                raise ValueError(
                    "this latent was never degraded. Put FlashVideo Latent Degradation between VAE Encode and this "
                    "node. Or it was, but that isn't known here, for example after Load Latent: then give its "
                    "strength as degraded_strength"
                )
            preset = preset_of(latent) if degraded_strength == AS_KNOWN else None
            settings |= {} if preset is None else PRESETS[preset].sampling
            model = with_windows(model, window, overlap)
            how = nullcontext() if degraded_strength == AS_KNOWN else counted_as_degraded(samples, strength)
        with how:
            refined = run_stage2(model, positive, negative, samples, strength=strength, **settings)
        refined = batch_of(latent) | {"samples": refined}
        if preset is None:
            return io.NodeOutput(refined)
        text = f"preset {preset}: {PRESETS[preset]}"
        note(cls.NAME, text, own_id(cls))
        return io.NodeOutput(refined, ui=ui.PreviewText(text))


class FlashVideoRefinerSettings(io.ComfyNode):
    """Strength and shift for ComfyUI's own samplers."""

    NAME = "FlashVideo Refiner Settings"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoRefinerSettings",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("video upscale", "refine with ksampler", "model sampling", "refine strength"),
            description="Sets the refiner up for KSampler, which then degrades the latent itself: connect VAE "
            "Encode straight to it, with sampler euler and scheduler simple. denoise below 1 refines more gently.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage II, from Load FlashVideo Model."),
                strength_input(),
                shift_input(),
                *window_inputs(),
                preset_input("in place of strength and shift; the steps and cfg for KSampler are shown"),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The refiner, set up for KSampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        strength: int,
        shift: float,
        window: int = WINDOW,
        overlap: int = OVERLAP_FRAMES,
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        known = chosen_preset(preset)
        with named(cls.NAME):
            check_stage(model, 2)
            chosen = chosen_strength(strength) if known is None else known.choices["strength"]
            shift = shift if known is None else known.shift
            ready = with_windows(refiner_settings(model, chosen, shift), window, overlap)
        if known is None:
            return io.NodeOutput(ready)
        suited = suited_strength(chosen, model.model.diffusion_model.config)
        used = suited if isinstance(suited, int) else f"auto from {known.strength}"
        text = f"preset {preset}: strength {used}, shift {shift:g}. For KSampler: steps "
        text += f"{known.steps}, cfg {known.cfg:g}"
        note(cls.NAME, text, own_id(cls))
        return io.NodeOutput(ready, ui=ui.PreviewText(text))


class FlashVideoSpatialTiles(io.ComfyNode):
    """The refiner in tiles of the picture: an approximation for small cards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoSpatialTiles",
            display_name="FlashVideo Spatial Tiles",
            category=CATEGORY,
            **found_as("tiled refine", "tiled diffusion", "low memory", "out of memory", "small card", "video upscale"),
            description="Lets the refiner see large pictures in overlapping tiles that are blended at every step: less "
            "memory, but an approximation, since no tile knows the whole picture. Goes between Load "
            "FlashVideo Model and the refiner; without this node the picture is always refined as a whole.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage II, from Load FlashVideo Model."),
                io.Int.Input(
                    "tile",
                    default=TILE,
                    min=SMALLEST_TILE_PIXELS,
                    max=MAX_TILE,
                    step=PIXEL_MULTIPLE,
                    tooltip="Width and height of a tile in pixels. Larger agrees better with the whole picture; "
                    "smaller needs less memory. 512 to 1024 is useful. Neighbours share a quarter. Default: "
                    f"{TILE}.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The refiner in tiles, for any sampler.")],
        )

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, tile: int) -> io.NodeOutput:
        """Patch a clone of the model."""
        with named("FlashVideo Spatial Tiles"):
            check_stage(model, 2)
            return io.NodeOutput(with_tiles(model, tile))


NODES = [FlashVideoLatentDegradation, FlashVideoStage2Refiner, FlashVideoRefinerSettings, FlashVideoSpatialTiles]
