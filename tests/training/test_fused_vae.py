"""Training the VAE through its own kernels on a CPU with bfloat16 instructions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from small_recipes import VAE, head
from torch import Tensor, nn

from flashvideo.commands.main import main
from flashvideo.config import VAEConfig
from flashvideo.training.tasks.fused_vae import FusedVAE, fused_or_plain
from flashvideo.training.tasks.fused_vae.kernels import Modulation, doubled, kernels_problem, norm_silu_stack
from flashvideo.training.tasks.pixels import PixelSettings, decoder_of, visible_loss
from flashvideo.training.tasks.vae import initialise
from flashvideo.vae import VideoVAE

PROCESSOR = "the processor has no avx512_bf16 instructions"
ROUNDING = 2**-8  # of bfloat16, relative
WIDE = VAE.replace("base_channels = 8", "base_channels = 16\nnorm_groups = 4").replace(
    "learning_rate = 1e-3", "learning_rate = 1e-4"
)


@pytest.fixture
def kernels() -> None:
    """Skips where the kernels can't be used."""
    if problem := kernels_problem():
        pytest.skip(problem)


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    kernels_problem.cache_clear()
    yield
    kernels_problem.cache_clear()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vae(groups: int = 4) -> VideoVAE:
    vae = VideoVAE(VAEConfig(16, (1, 1, 2, 3), encoder_blocks=1, decoder_blocks=1, norm_groups=groups))
    initialise(vae, seed=3)
    return vae


def smooth_clips(frames: int) -> Tensor:
    """Two clips [2, 3, frames, 24, 32] with large shapes that move; the second is brighter and has more contrast."""
    clips = F.interpolate(random(2, 3, frames // 4 + 1, 3, 4, seed=5), (frames, 24, 32), mode="trilinear")
    return torch.stack((0.4 * clips[0], 0.8 * clips[1] + 0.2))


def learn(vae: VideoVAE, network: VideoVAE | FusedVAE, clips: Tensor) -> dict[str, Tensor]:
    """Latents, pictures and all gradients of a loss that depends on every number of the network's results."""
    vae.zero_grad()
    posterior = network.encode(clips)
    video = network.decode(posterior.sample(random(*posterior.mean.shape, seed=7)))
    ((video - clips).square().mean() + 0.01 * posterior.logvar.square().mean()).backward()
    gradients = {name: weight.grad.clone() for name, weight in vae.named_parameters()}
    return {"mean": posterior.mean.detach(), "logvar": posterior.logvar.detach(), "video": video.detach(), **gradients}


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: ((found[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("frames", "groups"), [(1, 4), (5, 4), (9, 8), (17, 4), (21, 8)])
def test_values_and_gradients_are_the_plain_networks(frames: int, groups: int) -> None:
    """21 frames are two chunks of the encoder; 9 are one of the decoder, 17 two.

    A sum of many roundings, so distances are of whole tensors. In bfloat16 by autocast, the plain network's are as far
    from float32: video 0.03, gradients 0.07 at most and 0.02 to 0.03 in the middle (clips of 48x64, seed 5).
    """
    vae, clips = small_vae(groups), smooth_clips(frames)
    fused = fused_or_plain(vae)
    assert isinstance(fused, FusedVAE)
    found = distances(learn(vae, fused, clips), learn(vae, vae, clips))
    assert found.pop("logvar") < 0.005  # starts as a constant, which is far from 0
    assert found.pop("mean") < 0.025
    assert found.pop("video") < 0.05
    assert max(found.values()) < 0.15
    assert sorted(found.values())[len(found) // 2] < 0.06


@pytest.mark.usefixtures("kernels")
def test_a_vae_that_does_not_learn_hands_gradients_to_its_latents() -> None:
    """As stage II needs them, whose pixels may be decoded so."""
    vae, clips = small_vae().requires_grad_(False), smooth_clips(9)
    settings, gradients = PixelSettings(1.0, window=3, edge=0), {}
    for fused in (False, True):
        latent = vae.encode(clips).mode().requires_grad_()
        decode = decoder_of(vae, fused=fused)
        visible_loss(decode, latent, clips[..., 8:], torch.tensor([0, 1]), settings).backward()
        gradients[fused] = {"latent": latent.grad}
    assert distances(gradients[True], gradients[False])["latent"] < 0.1


@pytest.mark.usefixtures("kernels")
def test_clips_of_a_batch_do_not_see_each_other() -> None:
    vae, clips = small_vae(), smooth_clips(5)
    fused = fused_or_plain(vae)
    with torch.no_grad():
        together = fused.decode(fused.encode(clips).mode())
        alone = torch.cat([fused.decode(fused.encode(clip[None]).mode()) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.02)


def plain_norm_silu_stack(
    x: Tensor, norm: nn.GroupNorm, modulation: Modulation, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`norm_silu_stack` in PyTorch's operators."""
    x = rearrange(norm(rearrange(x, "b t h w c -> b c t h w")), "b c t h w -> b t h w c")
    scale, shift = (
        each[:, modulation.frames].repeat_interleave(x.shape[2] // each.shape[2], 2).repeat_interleave(4, 3)
        for each in (modulation.scale, modulation.shift)
    )
    x = F.silu(x * scale + shift)
    before = x[:, :1].expand(-1, 2, -1, -1, -1) if before is None else before
    seen = torch.cat((before, x), dim=1)
    moments = torch.cat([seen[:, at : at + x.shape[1]] for at in range(3)], dim=4)
    return moments.flatten(0, 1), seen[:, -2:]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_norm_silu_and_moments_to_a_rounding(frames: int, follows: bool, groups: int) -> None:
    """Each result is rounded once to bfloat16, and the gradient of x once more on its way."""
    x, before = (random(2, count, 6, 8, 32, seed=count).bfloat16().requires_grad_() for count in (frames, 2))
    scale, shift = (random(2, 2, 3, 2, 32, seed=seed).requires_grad_() for seed in (11, 12))
    modulation = Modulation(scale, shift, [0] + [1] * (frames - 1))
    norm = nn.GroupNorm(groups, 32)
    with torch.no_grad():
        norm.weight.add_(0.3 * random(32, seed=13))
        norm.bias.add_(random(32, seed=14))
    learnt = [x, *([before] if follows else []), scale, shift, norm.weight, norm.bias]

    def run(call: Callable, dtype: torch.dtype) -> list[Tensor]:
        results = call(x.to(dtype), norm, modulation, before.to(dtype) if follows else None)
        upper = [random(*each.shape, seed=15).to(torch.bfloat16) for each in results]
        loss = sum((each.float() * weight).sum() for each, weight in zip(results, upper, strict=True))
        return [each.detach() for each in (*results, *torch.autograd.grad(loss, learnt))]

    for found, truth in zip(
        run(norm_silu_stack, torch.bfloat16), run(plain_norm_silu_stack, torch.float32), strict=True
    ):
        relative = 2 * ROUNDING if found.dtype == torch.bfloat16 else 1e-4
        bound = relative * truth.float().std().item()
        torch.testing.assert_close(found.float(), truth.float(), rtol=relative, atol=bound)


@pytest.mark.usefixtures("kernels")
def test_doubling() -> None:
    x = random(3, 4, 5, 32, seed=1).bfloat16().requires_grad_()
    out = doubled(x)
    assert torch.equal(out, x.repeat_interleave(2, 1).repeat_interleave(2, 2))
    weight = random(*out.shape, seed=2).bfloat16()
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    truth = rearrange(weight.float(), "n (h row) (w column) c -> n h w c row column", row=2, column=2).sum((4, 5))
    assert torch.equal(gradient, truth.bfloat16())


def train(folder: Path, recipe: str, **values: str) -> list[float]:
    """Two steps; returns their losses."""
    folder.mkdir()
    config = folder / "vae.toml"
    top = "".join(f"{name} = {value}\n" for name, value in values.items())
    config.write_text(head(folder / "run") + top + recipe, encoding="utf-8")
    assert main(["train", "vae", "--config", str(config), "--device", "cpu", "--steps", "2"]) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.usefixtures("kernels")
def test_training_through_kernels_learns_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, fused = train(tmp_path / "plain", WIDE), train(tmp_path / "fused", WIDE, fused="true")
    assert "fused" not in caplog.text
    assert fused != plain  # other roundings
    assert fused == pytest.approx(plain, rel=0.01)


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("compiler", "recipe", "reason"),
    [
        ("", WIDE, "there is no C++ compiler"),
        ("false", WIDE, "false can't compile their kernels"),
        ("", VAE, "every level's channels must be a multiple of 16"),
    ],
    ids=["no compiler", "no use of the compiler", "too few channels"],
)
def test_training_goes_on_where_kernels_cannot_be_used(
    compiler: str,
    recipe: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = train(tmp_path / "plain", recipe)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    problem = kernels_problem()
    if recipe is WIDE and PROCESSOR in problem:
        pytest.skip(problem)
    assert train(tmp_path / "fused", recipe, fused="true") == plain
    assert caplog.text.count("fused = true has no effect") == 1
    assert reason in caplog.text
    assert not list(tmp_path.rglob("*.so*"))


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    "flags", [{"architecture": "x86_64", "avx512_f": True}, {"architecture": "aarch64", "bf16": True}]
)
def test_other_processors_train_the_plain_network(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    vae = small_vae()
    assert fused_or_plain(vae) is vae
    assert PROCESSOR in kernels_problem()


@pytest.mark.parametrize("frames", [4, 0])
def test_videos_of_other_lengths_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="4n\\+1 frames"):
        FusedVAE(small_vae()).encode(torch.zeros(1, 3, frames, 16, 16))


def test_videos_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        FusedVAE(small_vae()).encode(torch.zeros(1, 3, 5, 20, 16))
