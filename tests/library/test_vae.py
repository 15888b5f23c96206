"""The causal 3D VAE against the official code's numbers (float32, CPU), and its behaviour at the edges."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashvideo.checkpoints import load_vae
from flashvideo.config import STAGE2_LATENT_SCALE, VAE, VAEConfig
from flashvideo.vae import Posterior, VideoVAE, decode_chunks, decode_in_halves, encode_chunks
from flashvideo.vae.layers import ChunkContext, LayerFactory, Upsample, group_norm, group_statistics
from flashvideo.vae.moments import by_moments

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "data" / "golden"
NETWORK_TOLERANCE = 1e-4  # an independent implementation reached 1e-5
VIDEO_TOLERANCE = 2e-2  # of 0..255; likewise 8e-4
SUM_TOLERANCE = 1e-3  # a sum of up to 2e5 float32 numbers, in another order

TINY = VAEConfig(
    base_channels=4,
    channel_multipliers=(1, 1, 2, 2),
    encoder_blocks=1,
    decoder_blocks=1,
    latent_channels=4,
    norm_groups=2,
)


def recipe_weights(description: dict) -> dict[str, Tensor]:
    """Weights made from their official names, checked against the sums noted with them."""
    spec = importlib.util.spec_from_file_location("golden_recipe", TESTS / "golden_recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    weights = {}
    for key, noted in description["keys"].items():
        value = recipe.tensor(key, noted["shape"], description["recipe_seed"])
        assert abs(float(value.sum(dtype=np.float64)) - noted["sum"]) < SUM_TOLERANCE, key
        weights[key] = torch.from_numpy(value)
    return weights


def official_weights(name: str) -> dict[str, Tensor]:
    if name == "vae_recipe":
        return recipe_weights(json.loads((GOLDEN / "vae.json").read_text())[name]["weights"])
    halves = [load_file(GOLDEN / f"{name}_weights_{half}.safetensors") for half in ("encoder", "decoder")]
    return {key: value.float() for half in halves for key, value in half.items()}


class Golden:
    """One VAE of the golden data with its inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.vae = load_vae(official_weights(name), dtype=torch.float32)
        self.io = load_file(GOLDEN / f"{name}_io.safetensors")

    def __getitem__(self, key: str) -> Tensor:
        return self.io[key]


@pytest.fixture(scope="module", params=["vae_stored", "vae_recipe"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def stored() -> Golden:
    return Golden("vae_stored")


@pytest.fixture(scope="module")
def tiny() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(TINY)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def as_0_255(raw: Tensor) -> Tensor:
    """[1, 3, T, H, W] raw -> [T, H, W, 3], the scale of the golden videos."""
    return (((raw + 1) / 2).clamp(0, 1) * 255)[0].permute(1, 2, 3, 0)


# The official numbers


@pytest.mark.parametrize("case", ["enc1", "enc9", "enc17"])
@torch.inference_mode()
def test_encoding_in_one_piece_equals_the_official_one(golden: Golden, case: str) -> None:
    posterior = golden.vae.encode(golden[f"{case}.x"], chunked=False)
    assert error(posterior.mean, golden[f"{case}.mean"]) <= NETWORK_TOLERANCE
    assert error(posterior.logvar, golden[f"{case}.logvar_raw"]) <= NETWORK_TOLERANCE
    assert error(posterior.sample(golden[f"{case}.noise"]), golden[f"{case}.sample"]) <= NETWORK_TOLERANCE


@pytest.mark.parametrize(("case", "chunk"), [("enc9", 4), ("enc17", 8)])
@torch.inference_mode()
def test_encoding_in_chunks_equals_the_official_one(golden: Golden, case: str, chunk: int) -> None:
    posterior = golden.vae.encode(golden[f"{case}.x"], chunk=chunk)
    assert error(posterior.mean, golden[f"{case}.chunked.mean"]) <= NETWORK_TOLERANCE
    assert error(posterior.logvar, golden[f"{case}.chunked.logvar_raw"]) <= NETWORK_TOLERANCE


@torch.inference_mode()
def test_49_frames_are_encoded_as_the_official_stage_2_does(stored: Golden) -> None:
    posterior = stored.vae.encode(stored["enc49.x"])
    noise = torch.cat([stored[f"enc49.noise.{draw}"] for draw in range(3)], dim=2)
    assert error(posterior.mean, stored["enc49.chunked.mean"]) <= NETWORK_TOLERANCE
    assert error(posterior.logvar, stored["enc49.chunked.logvar_raw"]) <= NETWORK_TOLERANCE
    latent = posterior.sample(noise) * STAGE2_LATENT_SCALE
    assert error(latent, stored["enc49.latent_scaled"]) <= NETWORK_TOLERANCE


@pytest.mark.parametrize("case", ["dec1", "dec3", "dec5"])
@torch.inference_mode()
def test_decoding_in_one_piece_equals_the_official_one(golden: Golden, case: str) -> None:
    raw = golden.vae.decode(golden[f"{case}.z"], chunked=False)
    assert error(raw, golden[f"{case}.raw"]) <= NETWORK_TOLERANCE


@torch.inference_mode()
def test_decoding_in_chunks_equals_the_official_one(golden: Golden) -> None:
    raw = golden.vae.decode(golden["dec5.z"])
    assert error(raw, golden["dec5.chunked.raw"]) <= NETWORK_TOLERANCE
    assert error(as_0_255(raw), golden["dec5.chunked.video"]) <= VIDEO_TOLERANCE


@torch.inference_mode()
def test_two_latents_give_five_frames_and_leave_no_trace(golden: Golden) -> None:
    assert error(as_0_255(golden.vae.decode(golden["dec2.z"])), golden["dec2.video_force_split"]) <= VIDEO_TOLERANCE
    assert golden.vae.decode(golden["dec5.z"]).shape[2] == 17  # the official code returns 14 after that


@torch.inference_mode()
def test_thirteen_latents_decode_to_the_official_49_frames(stored: Golden) -> None:
    assert error(as_0_255(stored.vae.decode(stored["dec13.z"])), stored["dec13.video"]) <= VIDEO_TOLERANCE


@pytest.mark.parametrize("case", ["tile40", "tile20"])  # wide enough to overlap, and not
@torch.inference_mode()
def test_decoding_in_halves_equals_the_official_stage_2(stored: Golden, case: str) -> None:
    raw = decode_in_halves(stored.vae, stored[f"{case}.z"])
    assert error(as_0_255(raw), stored[f"{case}.video"]) <= VIDEO_TOLERANCE


# Names and sizes


def test_full_size_names_and_shapes_are_those_of_cogvideox() -> None:
    expected = json.loads((GOLDEN / "core_cogvideox_keys.json").read_text())["vae"]["keys"]
    state = VideoVAE(VAE, device="meta").state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize(
    ("frames", "chunks"), [(1, [1]), (5, [5]), (17, [17]), (21, [17, 4]), (33, [17, 16]), (49, [17, 16, 16])]
)
def test_encode_chunks(frames: int, chunks: list[int]) -> None:
    assert encode_chunks(frames) == chunks


@pytest.mark.parametrize(
    ("latents", "chunks"), [(1, [1]), (2, [2]), (3, [3]), (4, [3, 1]), (5, [3, 2]), (6, [3, 2, 1]), (7, [3, 2, 2])]
)
def test_decode_chunks(latents: int, chunks: list[int]) -> None:
    assert decode_chunks(latents) == chunks


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5, 6])
@torch.inference_mode()
def test_any_count_of_latents_gives_its_4n_plus_1_frames(tiny: VideoVAE, latents: int, chunked: bool) -> None:
    video = tiny.decode(torch.randn(2, 4, latents, 2, 3), chunked=chunked)
    assert video.shape == (2, 3, 4 * latents - 3, 16, 24)
    assert tiny.encode(video, chunked=chunked).mode().shape == (2, 4, latents, 2, 3)


@torch.inference_mode()
def test_an_even_count_of_latents_starts_like_the_odd_count_before_it(tiny: VideoVAE) -> None:
    latent = torch.randn(1, 4, 4, 2, 3)
    assert torch.equal(tiny.decode(latent)[:, :, :9], tiny.decode(latent[:, :, :3]))


# Behaviour


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 20, 16, 16), r"videos of 4n\+1 frames \(1, 5, 9, \.\.\.\); got 20"),
        ((1, 3, 5, 16, 20), r"Width and height of a video must be multiples of 8; got 20x16"),
        ((1, 4, 5, 16, 16), r"must be \[batch, 3, frames, height, width\]; got \[1, 4, 5, 16, 16\]"),
        ((3, 5, 16, 16), r"must be \[batch, 3, frames, height, width\]; got \[3, 5, 16, 16\]"),
        ((1, 3, 0, 16, 16), r"must be \[batch, 3, frames, height, width\]; got \[1, 3, 0, 16, 16\]"),
    ],
)
def test_encode_says_what_is_wrong_with_a_video(tiny: VideoVAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode(torch.zeros(shape))


@pytest.mark.parametrize("decode", [VideoVAE.decode, decode_in_halves])
@pytest.mark.parametrize("shape", [(1, 16, 3, 2, 2), (4, 3, 2, 2), (1, 4, 0, 2, 2)])
def test_decode_says_what_is_wrong_with_a_latent(
    tiny: VideoVAE, shape: tuple[int, ...], decode: Callable[[VideoVAE, Tensor], Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"latent .* must be \[batch, 4, frames, height, width\]; got"):
        decode(tiny, torch.zeros(shape))


def test_a_config_that_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match="4 channel multipliers, one a level; got 3"):
        VideoVAE(VAEConfig(32, (1, 2, 2), 1, 1))
    with pytest.raises(ValueError, match="divide by the norm groups; got 48 and 32"):
        VideoVAE(VAEConfig(48, (1, 1, 1, 1), 1, 1))


def test_progress_is_told_after_each_chunk(tiny: VideoVAE) -> None:
    told = []
    tiny.encode(torch.zeros(1, 3, 37, 8, 8), on_chunk=lambda done, total: told.append(("encode", done, total)))
    tiny.decode(torch.zeros(1, 4, 4, 1, 1), on_chunk=lambda done, total: told.append(("decode", done, total)))
    assert told == [("encode", 1, 3), ("encode", 2, 3), ("encode", 3, 3), ("decode", 1, 2), ("decode", 2, 2)]


@torch.inference_mode()
def test_a_stop_from_on_chunk_ends_the_run_and_the_next_run_is_unharmed(tiny: VideoVAE) -> None:
    class CancelledError(Exception):
        pass

    told = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        raise CancelledError

    latent = torch.randn(1, 4, 7, 1, 1)
    before = tiny.decode(latent)
    with pytest.raises(CancelledError):
        tiny.decode(latent, on_chunk=stop)
    with pytest.raises(CancelledError):
        tiny.encode(before, on_chunk=stop)
    assert told == [(1, 3), (1, 2)]
    assert torch.equal(tiny.decode(latent), before)


@pytest.mark.parametrize("chunked", [True, False])
def test_gradients_are_those_of_finite_differences(chunked: bool) -> None:
    torch.manual_seed(1)
    vae = VideoVAE(TINY, dtype=torch.float64)
    video = torch.rand(1, 3, 9, 8, 8, dtype=torch.float64) * 2 - 1
    direction = torch.randn_like(video)
    step = 1e-5

    def loss(x: Tensor) -> Tensor:
        posterior = vae.encode(x, chunked=chunked, chunk=4)
        decoded = vae.decode(posterior.sample(torch.ones_like(posterior.mean)), chunked=chunked)
        return decoded.square().mean()

    video.requires_grad_()
    loss(video).backward()
    slope = (loss((video + step * direction).detach()) - loss((video - step * direction).detach())) / (2 * step)
    assert float((video.grad * direction).sum()) == pytest.approx(float(slope.detach()), rel=1e-5)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


def test_results_with_and_without_autograd_are_equal_and_inputs_stay_as_they_were(tiny: VideoVAE) -> None:
    latent = torch.randn(1, 4, 5, 2, 2)
    kept = latent.clone()
    with_grad = tiny.decode(latent)
    with torch.no_grad():
        without = tiny.decode(latent)
    assert with_grad.requires_grad
    assert error(without, with_grad.detach()) <= 1e-6  # the fused in-place kernels may round differently
    assert torch.equal(latent, kept)


def test_big_convolutions_run_in_windows_of_time_with_equal_results(
    tiny: VideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = torch.randn(2, 4, 5, 2, 2)
    with torch.inference_mode():
        whole = tiny.decode(latent)
        moments = tiny.encode(whole)
        for elements in (1, 4096):  # every frame by itself, and a few together
            monkeypatch.setattr("flashvideo.vae.layers.WINDOW_ELEMENTS", elements)
            assert error(tiny.decode(latent), whole) <= 1e-5  # another shape may take another kernel
            assert error(tiny.encode(whole).mean, moments.mean) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)])
def test_doubling_by_quarters_equals_a_convolution_of_the_doubled_picture(
    size: tuple[int, int], in_time: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    layer = Upsample(6, LayerFactory(torch.nn, None, dtype, 2), in_time=in_time)
    x = torch.randn(2, 6, 3, *size, dtype=dtype)
    doubled = torch.nn.functional.interpolate(x.float().transpose(1, 2).flatten(0, 1), scale_factor=2.0)
    conv = layer.conv.float()
    expected = conv(doubled).unflatten(0, (2, 3)).transpose(1, 2)
    if in_time:
        expected = expected.repeat_interleave(2, dim=2)[:, :, 1:]
    layer.to(dtype)
    result = layer(x, ChunkContext())
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)


def test_sampling_clamps_the_log_variance() -> None:
    zeros = torch.zeros(1, 4, 1, 1, 1)
    assert Posterior(zeros, zeros + 50).sample(zeros + 1).max() == pytest.approx(np.exp(10), rel=1e-6)
    assert Posterior(zeros, zeros - 50).sample(zeros + 1).max() == pytest.approx(np.exp(-15), rel=1e-6)


def test_every_weight_belongs_to_a_layer_of_the_given_operations() -> None:
    class Operations:
        """Layers that skip initialisation and cast their weights to their input's type, as ComfyUI's do."""

        class Conv2d(torch.nn.Conv2d):
            def reset_parameters(self) -> None:
                pass

            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, self.weight.to(x), self.bias.to(x))

        class Conv3d(torch.nn.Conv3d):
            def reset_parameters(self) -> None:
                pass

            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, self.weight.to(x), self.bias.to(x))

        class GroupNorm(torch.nn.GroupNorm):
            def reset_parameters(self) -> None:
                pass

            def forward(self, x: Tensor) -> Tensor:
                weight, bias = self.weight.to(x), self.bias.to(x)
                return torch.nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)

    given = (Operations.Conv2d, Operations.Conv3d, Operations.GroupNorm)
    vae = VideoVAE(TINY, dtype=torch.bfloat16, operations=Operations)
    for module in vae.modules():
        assert isinstance(module, given) or not list(module.parameters(recurse=False)), module
    reference = VideoVAE(TINY).to(torch.bfloat16)
    vae.load_state_dict(reference.state_dict())
    latent = torch.randn(1, 4, 3, 2, 2)
    with torch.inference_mode():
        video = vae.decode(latent)  # float32 activations, bfloat16 weights
        assert video.dtype == torch.float32
        assert error(video, reference.float().decode(latent)) == 0
        assert vae.encode(video).mean.dtype == torch.float32


@torch.inference_mode()
def test_norms_take_statistics_measured_elsewhere(tiny: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny.decoder.norm_out.norm_layer
    x = torch.randn(2, layer.num_channels, 3, 4, 6) * 3 + 1
    whole = group_statistics(x, layer.num_groups)
    assert error(group_norm(layer, x, whole), layer(x)) <= 1e-5  # values up to 5, two orders of the same sums
    monkeypatch.setattr("flashvideo.vae.layers.WINDOW_ELEMENTS", 1)  # measured and applied a frame at a time
    split = group_statistics(x, layer.num_groups)
    assert error(split.mean, whole.mean) <= 1e-6
    assert error(split.variance, whole.variance) <= 1e-5  # of about 9
    assert error(group_norm(layer, x, split), layer(x)) <= 1e-5
    left = ChunkContext(last=True, statistics=lambda _layer, _x: whole)
    z = torch.randn(2, 4, 3, 4, 6)
    tile = tiny.decoder.norm_out(x[..., :3], left, z[..., :3])
    assert error(tile, tiny.decoder.norm_out(x, ChunkContext(last=True), z)[..., :3]) <= 1e-5


@pytest.mark.parametrize(("kernel", "frames"), [(1, 2), (3, 3), (3, 7)])
def test_a_convolution_of_moments_side_by_side_is_the_convolution_in_time(kernel: int, frames: int) -> None:
    torch.manual_seed(5)
    conv = torch.nn.Conv3d(4, 6, kernel, padding=(0, kernel // 2, kernel // 2))
    video = torch.randn(2, 4, frames, 5, 7)
    torch.testing.assert_close(by_moments(conv, video), conv(video), rtol=1e-5, atol=1e-5)
