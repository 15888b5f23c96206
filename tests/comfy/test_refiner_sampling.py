"""Stage II in every sampler of ComfyUI: how much noise a sampler thinks is left is what is left."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from draws import normal
from torch import Tensor

STRENGTH, STEPS, SCALE = 675, 30, 1.15258426  # the latent's scale in the network
PREFERRED = {"euler", "heun", "dpmpp_2m", "uni_pc", "res_multistep"}  # what the pack and its help page name
# Of a spread of 1. Few steps and errors of first order cost some; a wrong noise law is off by a third and more.
SPREAD_TOLERANCE = 0.12
# LCM keeps nothing of a sample, and the other one narrows what it makes of any model: neither ends at the full spread.
NARROW = {"lcm", "dpmpp_2s_ancestral_cfg_pp"}
SAMPLERS = sorted(set(comfy.samplers.SAMPLER_NAMES) - NARROW)


def expecting(weights: tuple[float, float]) -> Callable[..., Tensor]:
    """In the network's place: the best guess where clean latents are standard normal numbers.

    A sample on the flow is w latent + n noise, so that its clean latent is w sample / (w^2 + n^2) on average.
    """
    signal, noise = weights

    def velocity(_executor: Any, x: Tensor, timestep: Tensor, *_: Any, **__: Any) -> Tensor:
        place = timestep.reshape(-1, 1, 1, 1, 1) / 1000
        w, n = 1 - place * (1 - signal), place * noise
        return (w * x / (w**2 + n**2) - x) / place

    return velocity


@pytest.fixture(scope="module")
def weights(submodule: Callable[[str], ModuleType]) -> tuple[float, float]:
    """How much of latent and of noise there is where the flow begins."""
    return submodule("flashvideo.degradation").degradation_weights(STRENGTH)


@pytest.fixture(scope="module")
def sample(comfy_nodes: dict[str, Any], text: dict[str, list]) -> Callable[..., Tensor]:
    """A KSampler on a MODEL, at cfg 1."""

    def run(model: Any, sampler: str, latent: Tensor, **changes: Any) -> Tensor:
        choices = {"seed": 2, "steps": STEPS, "cfg": 1.0, "scheduler": "simple", "denoise": 1.0, **changes}
        latents = {"samples": latent, **choices.pop("extras", {})}
        inputs = {"sampler_name": sampler, "latent_image": latents, **text, **choices}
        with torch.inference_mode():
            return comfy_nodes["KSampler"]().sample(model=model, **inputs)[0]["samples"]

    return run


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning", "ignore:To copy construct:UserWarning")  # of theirs
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_the_right_spread(
    model: Any, weights: tuple[float, float], sample: Callable[..., Tensor], sampler: str
) -> None:
    ideal = model.clone()
    ideal.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "ideal", expecting(weights))
    latent = normal(1, 16, 3, 16, 16, seed=1) / SCALE
    refined = sample(ideal, sampler, latent) * SCALE
    assert abs(float(refined.std()) - 1) < SPREAD_TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "res_multistep"])
def test_the_refiners_solvers_are_the_samplers_of_that_name(
    comfy_nodes: dict[str, Any], model: Any, text: dict[str, list], sample: Callable[..., Tensor], solver: str
) -> None:
    latent, settings = normal(1, 16, 3, 4, 6, seed=1), {"steps": 4, "cfg": 4.0}
    refiner, choices = comfy_nodes["FlashVideoStage2Refiner"], {**text, **settings, "shift": 2.5}
    degraded = comfy_nodes["FlashVideoLatentDegradation"].execute({"samples": latent}, STRENGTH, 2).result[0]

    def refined(name: str) -> Tensor:
        with torch.inference_mode():
            return refiner.execute(model, latent=degraded, solver=name, **choices).result[0]["samples"]

    set_up = comfy_nodes["FlashVideoRefinerSettings"].execute(model, STRENGTH, 2.5).result[0]
    torch.testing.assert_close(refined(solver), sample(set_up, solver, latent, **settings), rtol=0, atol=2e-3)
    others = [refined(name) for name in ("euler", "heun") if name != solver]
    assert min(float((refined(solver) - other).abs().max()) for other in others) > 0.01


@pytest.mark.parametrize("way", ["whole", "windows", "tiles"])
def test_videos_of_a_batch_are_refined_as_alone(
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    model: Any,
    text: dict[str, list],
    way: str,
) -> None:
    degrade = submodule("nodes.native.degradation").degrade
    shape = {"whole": (3, 4, 6), "windows": (8, 4, 4), "tiles": (1, 16, 24)}[way]
    latents, noise = normal(2, 16, *shape, seed=1), normal(2, 16, *shape, seed=2)
    if way == "tiles":
        model = comfy_nodes["FlashVideoSpatialTiles"].execute(model, 128).result[0]
    settings = {"steps": 2, "cfg": 4.0, "shift": 2.5, "solver": "euler", "window": 17, "overlap": 8}

    def refined(rows: slice) -> Tensor:
        latent = degrade({"samples": latents[rows]}, noise[rows], STRENGTH)
        with torch.inference_mode():
            run = comfy_nodes["FlashVideoStage2Refiner"].execute(model, latent=latent, **text, **settings)
        return run.result[0]["samples"]

    alone = torch.cat([refined(slice(0, 1)), refined(slice(1, 2))])
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(refined(slice(0, 2)), alone, rtol=0, atol=1e-3)


def test_videos_of_a_batch_are_drafted_as_alone(submodule: Callable[[str], ModuleType]) -> None:
    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    context = normal(1, 8, model.model.diffusion_model.config.text_dim, seed=3)
    texts = [[[context, {}]], [[torch.zeros_like(context), {}]]]
    noise = [normal(2, 16, 3, 4, 6, seed=seed) for seed in range(4)]

    def draft(rows: slice) -> Tensor:
        draws = iter(noise)
        with torch.inference_mode():
            return submodule("nodes.native.stages").run_stage1(
                model, *texts, noise[0][rows], lambda: next(draws)[rows], steps=3, scale=6.0
            )

    alone = torch.cat([draft(slice(0, 1)), draft(slice(1, 2))])
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(draft(slice(0, 2)), alone, rtol=0, atol=1e-3)


def test_the_preferred_samplers_exist() -> None:
    assert set(SAMPLERS) >= PREFERRED


def test_ancestral_steps_without_noise_are_eulers(
    comfy_nodes: dict[str, Any], model: Any, text: dict[str, list]
) -> None:
    latent = {"samples": normal(1, 16, 3, 4, 6, seed=1)}
    sigmas = comfy_nodes["BasicScheduler"].execute(model, "simple", 4, 1.0).result[0]

    def run(sampler: Any) -> Tensor:
        inputs = (model, True, 3, 4.0, text["positive"], text["negative"], sampler.result[0], sigmas, latent)
        with torch.inference_mode():
            return comfy_nodes["SamplerCustom"].execute(*inputs).result[0]["samples"]

    still = run(comfy_nodes["SamplerEulerAncestral"].execute(eta=0.0, s_noise=1.0))
    assert (still - run(comfy_nodes["KSamplerSelect"].execute("euler"))).abs().max() < 1e-4  # rounding, times cfg


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_mask_keeps_what_is_outside(model: Any, sample: Callable[..., Tensor], denoise: float) -> None:
    latent, mask = normal(1, 16, 3, 4, 8, seed=1), torch.zeros(1, 1, 32, 64)
    mask[..., :32] = 1
    refined = sample(model, "euler", latent, steps=3, cfg=4.0, denoise=denoise, extras={"noise_mask": mask})
    assert (refined - latent)[..., 5:].abs().max() < 1e-5
    assert (refined - latent)[..., :3].abs().mean() > 0.1


@pytest.mark.parametrize("strength", [0, 675, 999])
def test_sigmas_and_the_flow_are_two_names_of_one_thing(submodule: Callable[[str], ModuleType], strength: int) -> None:
    sampling = submodule("nodes.native.sampling")
    place = torch.linspace(0, 1, 101)
    again = sampling.sigma_to_flow(sampling.flow_to_sigma(place, strength), strength)
    assert (again - place).abs().max() < 1e-5
    law = sampling.RefinerSampling(strength)
    assert float(law.timestep(law.sigma_max)) == pytest.approx(1000, abs=1e-2)
    assert law.percent_to_sigma(0.0) == pytest.approx(float(law.sigma_max), rel=1e-5)


def test_sigmas_of_another_model_are_refused(comfy_nodes: dict[str, Any], model: Any, text: dict[str, list]) -> None:
    latent = {"samples": normal(1, 16, 1, 4, 4, seed=1)}
    sigmas = comfy_nodes["KarrasScheduler"].execute(4, 14.6, 0.03, 7.0).result[0]
    sampler = comfy_nodes["KSamplerSelect"].execute("euler").result[0]
    with pytest.raises(ValueError, match=r"sigmas begin at 14.6, but 3.65 is the most.* Take them from BasicScheduler"):
        comfy_nodes["SamplerCustom"].execute(model, True, 3, 4.0, *text.values(), sampler, sigmas, latent)
