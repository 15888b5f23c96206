"""What a user can wire wrongly: each says so before work starts, in plain words."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
TEXT = [[torch.zeros(1, 24, 48), {}]]  # the golden models read 48 numbers a word


def video_latent(*shape: int) -> dict[str, torch.Tensor]:
    """A LATENT of that shape, by default 3 latent frames of 32x32 pixels."""
    return {"samples": torch.randn(*(shape or (1, 16, 3, 4, 4)))}


@pytest.fixture(scope="module")
def models(pack: ModuleType) -> dict[int, Any]:
    """Both golden stages as MODELs."""
    load_model = importlib.import_module(f"{pack.__name__}.nodes.native.model").load_model
    return {stage: load_model(load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors")) for stage in (1, 2)}


@pytest.fixture()
def draft(comfy_nodes: dict) -> Callable[..., Any]:
    """Stage I on given inputs."""
    return lambda model, latent, text=TEXT: comfy_nodes["FlashVideoStage1Sampler"].execute(
        model, text, text, latent, 0, 2, 8.0, True
    )


@pytest.fixture()
def refine(comfy_nodes: dict) -> Callable[..., Any]:
    """Stage II on given inputs."""
    return lambda model, latent, text=TEXT: comfy_nodes["FlashVideoStage2Refiner"].execute(
        model, text, text, latent, 1, 13.0, 2.5, "euler"
    )


@pytest.fixture()
def degrade(comfy_nodes: dict) -> Callable[..., dict]:
    """Latent Degradation with a strength."""
    return lambda latent, strength=675: (
        comfy_nodes["FlashVideoLatentDegradation"].execute(latent, strength, 0).result[0]
    )


def test_refiner_in_the_draft_slot(models: dict, draft: Callable) -> None:
    with pytest.raises(
        ValueError,
        match=r"^FlashVideo Stage I Sampler: model must be FlashVideo stage I .* got "
        r"FlashVideo stage II \(the refiner\)$",
    ):
        draft(models[2], video_latent())


def test_draft_model_in_the_refiner_slot(models: dict, refine: Callable, degrade: Callable) -> None:
    with pytest.raises(ValueError, match=r"^FlashVideo Stage II Refiner: model must be .* got FlashVideo stage I "):
        refine(models[1], degrade(video_latent()))


def test_draft_model_in_refiner_settings(models: dict, comfy_nodes: dict) -> None:
    with pytest.raises(ValueError, match="^FlashVideo Refiner Settings: model must be FlashVideo stage II"):
        comfy_nodes["FlashVideoRefinerSettings"].execute(models[1], 675, 2.5)


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 4), (1, 16, 4, 4), (1, 16, 0, 4, 4), (0, 16, 3, 4, 4)])
def test_latents_of_the_wrong_kind(models: dict, draft: Callable, degrade: Callable, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="video latent with 16 channels"):
        draft(models[1], video_latent(*shape))
    with pytest.raises(ValueError, match="video latent with 16 channels"):
        degrade(video_latent(*shape))


def test_odd_picture_sizes_name_the_node_that_mends_them(degrade: Callable) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16; got 40x32.*FlashVideo Prepare Frames"):
        degrade(video_latent(1, 16, 3, 4, 5))


def test_latents_that_are_not_finite(degrade: Callable) -> None:
    latent = video_latent()
    latent["samples"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        degrade(latent)


def test_text_of_another_encoder(models: dict, draft: Callable) -> None:
    with pytest.raises(ValueError, match="positive comes from another text encoder: it has 768 numbers a word"):
        draft(models[1], video_latent(), [[torch.zeros(1, 77, 768), {}]])


def test_no_text(models: dict, draft: Callable) -> None:
    with pytest.raises(ValueError, match="positive is empty; connect FlashVideo Prompt"):
        draft(models[1], video_latent(), [])


def test_a_latent_degraded_twice(degrade: Callable) -> None:
    with pytest.raises(ValueError, match="degraded before, with strength 700"):
        degrade(degrade(video_latent(), 700))


def test_a_latent_never_degraded(models: dict, refine: Callable) -> None:
    with pytest.raises(ValueError, match="never degraded. Put FlashVideo Latent Degradation between"):
        refine(models[2], video_latent())


@pytest.fixture()
def advanced(models: dict, comfy_nodes: dict) -> Callable[..., dict]:
    """KSampler (Advanced) with the refiner on a LATENT, which adds no noise unless it is told to."""

    def run(latent: dict, add_noise: str = "disable", steps: int = 2, start: int = 0) -> dict:
        sampling = (steps, 13.0, "euler", "simple", TEXT, TEXT)
        return comfy_nodes["KSamplerAdvanced"]().sample(
            models[2], add_noise, 0, *sampling, latent, start, 10000, "disable"
        )[0]

    return run


@pytest.fixture()
def refined(models: dict, advanced: Callable, refine: Callable, degrade: Callable) -> Callable[[str], dict]:
    """A latent that was degraded, and refined by our node or by a stock sampler, which copies what it doesn't know."""

    def run(node: str) -> dict:
        degraded = degrade(video_latent())
        if node == "ours":
            return refine(models[2], degraded).result[0]
        return advanced(degraded)

    return run


@pytest.mark.parametrize("node", ["ours", "stock"])
def test_a_refined_latent_is_not_degraded(
    models: dict, refine: Callable, degrade: Callable, refined: Callable, node: str
) -> None:
    with pytest.raises(ValueError, match="Put FlashVideo Latent Degradation (between|right before)"):
        refine(models[2], refined(node))
    second = refine(models[2], degrade(refined(node))).result[0]["samples"]
    assert torch.isfinite(second).all()


CHANGES = {
    "a frame": lambda samples: samples[:, :, 1:2],
    "a crop": lambda samples: samples[..., 2:, 4:],
    "half of a batch": lambda samples: samples[1:],
    "a batch of two": lambda samples: torch.cat((samples, samples)),
    "turned": lambda samples: samples.flip(-1).rot90(1, (-2, -1)),
    "in half precision": lambda samples: samples.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_of_a_degraded_latent_is_degraded(
    models: dict, refine: Callable, degrade: Callable, change: str
) -> None:
    latent = degrade(video_latent(2, 16, 3, 8, 8))
    part = {**latent, "samples": CHANGES[change](latent["samples"])}
    assert torch.isfinite(refine(models[2], part).result[0]["samples"]).all()
    with pytest.raises(ValueError, match="degraded before, with strength 675"):
        degrade(part)


def test_an_enlarged_degraded_latent_is_not_one(
    models: dict, comfy_nodes: dict, refine: Callable, degrade: Callable
) -> None:
    larger = comfy_nodes["LatentUpscaleBy"]().upscale(degrade(video_latent()), "bilinear", 2.0)[0]
    with pytest.raises(ValueError, match="another node .* has changed this latent since it was degraded"):
        refine(models[2], larger)


def test_masks_are_for_ksampler(
    models: dict, comfy_nodes: dict, refine: Callable, degrade: Callable, advanced: Callable
) -> None:
    def masked(latent: dict) -> dict:
        return comfy_nodes["SetLatentNoiseMask"]().set_mask(latent, torch.eye(32)[None])[0]

    message = "has a mask .* give the masked latent to KSampler, with FlashVideo Refiner Settings"
    with pytest.raises(ValueError, match=f"^FlashVideo Latent Degradation: .*{message}"):
        degrade(masked(video_latent()))
    with pytest.raises(ValueError, match=f"^FlashVideo Stage II Refiner: .*{message}"):
        refine(models[2], masked(degrade(video_latent())))
    with pytest.raises(ValueError, match=f"^FlashVideo stage II: .*{message}"):
        advanced(masked(degrade(video_latent())))


def test_a_white_mask_is_none(models: dict, comfy_nodes: dict, refine: Callable, degrade: Callable) -> None:
    latent = comfy_nodes["SetLatentNoiseMask"]().set_mask(video_latent(), torch.ones(1, 32, 32))[0]
    assert torch.isfinite(refine(models[2], degrade(latent)).result[0]["samples"]).all()


@pytest.mark.parametrize(
    ("add_noise", "degraded", "message"),
    [
        ("enable", True, "degraded twice"),
        ("disable", False, "never degraded"),
    ],
)
def test_stock_samplers_degrade_exactly_once(
    degrade: Callable, advanced: Callable, add_noise: str, degraded: bool, message: str
) -> None:
    latent = degrade(video_latent()) if degraded else video_latent()
    with pytest.raises(ValueError, match=message):
        advanced(latent, add_noise)


def test_stock_samplers_refuse_another_strength(degrade: Callable, advanced: Callable) -> None:
    with pytest.raises(ValueError, match="degraded with strength 700, but the model is set to 675"):
        advanced(degrade(video_latent(), 700))


def test_stock_samplers_refuse_half_a_run_on_a_degraded_latent(degrade: Callable, advanced: Callable) -> None:
    with pytest.raises(ValueError, match="needs the whole run"):
        advanced(degrade(video_latent()), steps=4, start=2)


def test_a_foreign_noise_schedule_on_the_refiner(models: dict, comfy_nodes: dict) -> None:
    model = comfy_nodes["ModelSamplingSD3"]().patch(models[2], 3.0)[0]
    with pytest.raises(ValueError, match="another node replaced the refiner's noise schedule"):
        comfy_nodes["KSampler"]().sample(model, 0, 2, 13.0, "euler", "simple", TEXT, TEXT, video_latent(), denoise=1.0)


@pytest.mark.parametrize("strength", [0, 999])
def test_strength_at_its_ends(models: dict, refine: Callable, degrade: Callable, strength: int) -> None:
    latent = video_latent()
    degraded = degrade(latent, strength)
    refined = refine(models[2], degraded).result[0]["samples"]
    assert torch.isfinite(refined).all()
    if strength == 0:
        # a = 0.99957 and b = 0.029 (spec table): almost the latent itself
        assert (degraded["samples"] - latent["samples"]).abs().mean() < 0.05
    else:
        # a = 0: nothing of the latent is left
        other = degrade(video_latent(), strength)
        assert torch.allclose(degraded["samples"], other["samples"], atol=1e-6)


@pytest.mark.parametrize("strength", [-2, 1000])
def test_strength_beyond_its_ends(degrade: Callable, strength: int) -> None:
    with pytest.raises(ValueError, match="strength must be a whole number from -1 to 999"):
        degrade(video_latent(), strength)


@pytest.mark.parametrize(
    ("width", "height", "length", "message"),
    [
        (270, 256, 49, r"width must be a multiple of 16; got 270 \(nearest: 272\)"),
        (480, 8, 49, "height must be a whole number from 16 to 4096; got 8"),
        (480, 256, 20, r"length must be 4n\+1 frames .* got 20 \(nearest: 21\)"),
        (480, 256, 0, "length must be a whole number from 1 to 1025; got 0"),
    ],
)
def test_sizes_of_a_new_video(comfy_nodes: dict, width: int, height: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Empty FlashVideo Latent: {message}"):
        comfy_nodes["EmptyFlashVideoLatent"].execute(width, height, length, 1)


def test_empty_latent_has_the_size_it_was_asked_for(comfy_nodes: dict) -> None:
    (latent,) = comfy_nodes["EmptyFlashVideoLatent"].execute(480, 256, 49, 2).result
    assert latent["samples"].shape == (2, 16, 13, 32, 60)
    (still,) = comfy_nodes["EmptyFlashVideoLatent"].execute(64, 32, 1, 1).result
    assert still["samples"].shape == (1, 16, 1, 4, 8)


@pytest.fixture()
def load_file_named(run_prompt: Any, comfy_base: Path, captured: dict[str, Any]) -> Callable[[str], Any]:
    """Load a file of models/diffusion_models with the loader node, as a graph does."""
    (comfy_base / "models" / "diffusion_models").mkdir(parents=True, exist_ok=True)

    def load(name: str) -> Any:
        run_prompt(
            {
                "load": {
                    "class_type": "FlashVideoModelLoader",
                    "inputs": {"model_name": name, "weight_dtype": "default"},
                },
                "out": {"class_type": "TestCapture", "inputs": {"value": ["load", 0], "name": "model"}},
            }
        )
        return captured["model"]

    return load


def test_a_truncated_model_file(run_prompt: Any, load_file_named: Callable, comfy_base: Path) -> None:
    whole = (GOLDEN / "dit_stage1_weights.safetensors").read_bytes()
    (comfy_base / "models" / "diffusion_models" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(run_prompt.Failed) as failed:
        load_file_named("cut.safetensors")
    assert failed.value.message.startswith("Load FlashVideo Model: cut.safetensors is damaged or incomplete")


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.target,)


def test_a_model_file_that_carries_code(
    run_prompt: Any, load_file_named: Callable, comfy_base: Path, tmp_path: Path
) -> None:
    file = comfy_base / "models" / "diffusion_models" / "stage1.pt"
    torch.save({"module": Payload(tmp_path / "ran")}, file)
    with pytest.raises(run_prompt.Failed) as failed:
        load_file_named("stage1.pt")
    assert failed.value.message.startswith("Load FlashVideo Model: stage1.pt")
    assert not (tmp_path / "ran").exists()


def test_a_vae_in_the_model_loader(run_prompt: Any, load_file_named: Callable, comfy_base: Path) -> None:
    name = "vae_stored_weights_encoder.safetensors"
    (comfy_base / "models" / "diffusion_models" / name).write_bytes((GOLDEN / name).read_bytes())
    with pytest.raises(run_prompt.Failed) as failed:
        load_file_named(name)
    assert "is FlashVideo's VAE, and a diffusion model (stage I or II) is needed here" in failed.value.message
