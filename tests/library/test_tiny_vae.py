"""The tiny autoencoder's decoder: equal to another implementation of its architecture, and safe to load."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvideo.checkpoints import CheckpointError
from flashvideo.checkpoints.tiny_vae import is_tiny, load_tiny
from flashvideo.vae.tiny import TinyDecoder, decode_tiny, tiny_bytes

# Made with the published code, from weights as `weights` makes them.
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "tiny_vae.safetensors"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights that depend on names and shapes alone, and give pictures that are neither black nor white."""
    made = {}
    for name, shape in shapes.items():
        numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        fan_in = math.prod(shape[1:])
        scale = 0.1 if len(shape) == 1 else 0.01 if name == "decoder.22.weight" else math.sqrt(1.5 / fan_in)
        made[name] = torch.from_numpy(numbers * scale).float()
    made["decoder.22.bias"] += 0.5
    return made


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in TinyDecoder().state_dict().items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published ones are, with an encoder's weight, which nothing reads."""
    path = tmp_path_factory.mktemp("tiny") / "taecvx.safetensors"
    save_file({**weights(shapes()), "encoder.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    return path


@pytest.fixture(scope="module")
def decoder(file: Path) -> TinyDecoder:
    """The decoder, loaded."""
    return load_tiny(file, TinyDecoder(), torch.float32)


def test_it_decodes_as_the_published_implementation_does(decoder: TinyDecoder) -> None:
    golden = load_file(GOLDEN)
    steps: list[tuple[int, int]] = []
    out = torch.empty(golden["video"].shape)
    with torch.no_grad():
        decode_tiny(decoder, golden["latent"], out, lambda *step: steps.append(step))
    torch.testing.assert_close(out, golden["video"], rtol=0, atol=2e-5)
    assert 0.05 < golden["video"].std() < 0.4  # there is something to compare
    assert steps == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize("frames", [3, 13])
def test_memory_does_not_grow_with_the_length(frames: int) -> None:
    dtype, device = torch.float16, torch.device("meta")
    network = TinyDecoder(dtype=dtype, device=device)
    latent = torch.empty(1, 16, frames, 136, 240, dtype=dtype, device=device)
    video = torch.empty(1, 3, 4 * frames - 3, 1088, 1920, device=device)
    with torch.no_grad(), LiveBytes(latent, video, *network.parameters()) as held:
        decode_tiny(network, latent, video)
    assert 0.55 < held.added / tiny_bytes(latent.shape, dtype) < 0.6  # what convolutions take themselves isn't seen


def test_a_preview_is_smaller_and_has_a_frame_a_latent(file: Path) -> None:
    preview = load_tiny(file, TinyDecoder(1, (1, 1, 1)), torch.float32)
    with torch.no_grad():
        frames = list(preview.frames(load_file(GOLDEN)["latent"][0]))
    assert [tuple(frame.shape) for frame in frames] == [(1, 3, 4, 6)] * 3
    assert all(frame.min() >= 0 and frame.max() <= 1 for frame in frames)


def test_files_of_other_models_are_refused(file: Path, tmp_path: Path) -> None:
    state = load_file(file)
    save_file(state, tmp_path / "taew2_1.safetensors")
    with pytest.raises(CheckpointError, match=r"taew2_1.safetensors is a tiny autoencoder, and taecvx.safetensors is"):
        load_tiny(tmp_path / "taew2_1.safetensors", TinyDecoder(), torch.float32)
    with pytest.raises(CheckpointError, match=r"taecvx.safetensors is incomplete: decoder.9.conv.0.weight is missing"):
        save_file({k: v for k, v in state.items() if k != "decoder.9.conv.0.weight"}, tmp_path / "taecvx.safetensors")
        load_tiny(tmp_path / "taecvx.safetensors", TinyDecoder(), torch.float32)
    with pytest.raises(CheckpointError, match=r"taecvx.safetensors doesn't fit: decoder.22.bias is \[4\]"):
        save_file({**state, "decoder.22.bias": torch.zeros(4)}, tmp_path / "taecvx.safetensors")
        load_tiny(tmp_path / "taecvx.safetensors", TinyDecoder(), torch.float32)
    with pytest.raises(CheckpointError, match=r"no tiny autoencoder"):
        save_file({"decoder.1.weight": torch.zeros(4)}, tmp_path / "taecvx.safetensors")
        load_tiny(tmp_path / "taecvx.safetensors", TinyDecoder(), torch.float32)
    assert is_tiny(shapes()) and not is_tiny({"decoder.conv_in.conv.weight": (1,)})
