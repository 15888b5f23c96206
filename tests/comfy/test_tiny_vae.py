"""The tiny autoencoder in ComfyUI: decodes drafts and makes previews, and doesn't encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.cli_args
import latent_preview
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import save_file

LATENT = {"samples": torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def file(comfy_base: Path, submodule: Callable[[str], ModuleType]) -> Iterator[Path]:
    """A tiny autoencoder with random weights, for the loader and for previews."""
    torch.manual_seed(0)
    state = submodule("flashvideo.vae.tiny").TinyDecoder().state_dict()
    places = [comfy_base / "models" / folder / "taecvx.safetensors" for folder in ("vae", "vae_approx")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, place)
    yield places[0]
    for place in places:
        place.unlink()


@pytest.fixture(scope="module")
def vae(file: Path, comfy_nodes: dict[str, Any]) -> Any:
    """The VAE that Load FlashVideo VAE makes of the file."""
    return comfy_nodes["FlashVideoVAELoader"].execute(file.name).result[0]


def test_stock_nodes_decode_with_it(vae: Any, comfy_nodes: dict[str, Any]) -> None:
    (frames,) = comfy_nodes["VAEDecode"]().decode(vae, LATENT)
    assert frames.shape == (9, 32, 48, 3) and frames.std() > 0
    (tiled,) = comfy_nodes["VAEDecodeTiled"]().decode(vae, LATENT, 512, 64)
    assert torch.equal(tiled, frames)


def test_what_needs_an_exact_vae_refuses_it(vae: Any, comfy_nodes: dict[str, Any]) -> None:
    for node in ("VAEEncode", "VAEEncodeTiled"):
        extra = (512, 64) if node.endswith("Tiled") else ()
        with pytest.raises(ValueError, match="tiny autoencoder only decodes"):
            comfy_nodes[node]().encode(vae, torch.rand(9, 32, 48, 3), *extra)
    with pytest.raises(ValueError, match=r"FlashVideo's VAE must be \[batch, 16, frames, height, width\]"):
        comfy_nodes["VAEDecode"]().decode(vae, {"samples": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize(("side", "size"), [(4, (32, 32)), (70, (280, 16))])
def test_previews_are_small_pictures_of_the_middle(
    side: int,
    size: tuple[int, int],
    file: Path,
    submodule: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    previewer = submodule("nodes.native.tiny_vae").previewer
    assert previewer(0.7, torch.device("cpu"), side) is None
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.TAESD)
    found = previewer(0.7, torch.device("cpu"), side)
    latent = torch.randn(1, 16, 5, 4, side, generator=torch.Generator().manual_seed(2))
    picture = found.decode_latent_to_preview(latent)
    assert isinstance(picture, Image) and picture.size == size
    other = latent.clone()
    other[:, :, 3:] = 0  # frames after the middle
    assert found.decode_latent_to_preview(other).tobytes() == picture.tobytes()
    other[:, :, 2] = 0
    assert found.decode_latent_to_preview(other).tobytes() != picture.tobytes()


def test_the_samplers_show_its_previews(
    file: Path, comfy_nodes: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.TAESD)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *given, **_: seen.append(given))
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: pytest.fail("ComfyUI's own preview was asked for"))
    text = [[torch.zeros(1, 4, model.model.diffusion_model.config.text_dim), {}]]
    degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(LATENT, 60, 5).result[0]
    comfy_nodes["FlashVideoStage2Refiner"].execute(model, text, text, degraded, 2, 1.0, 2.5, "euler")
    pictures = [given[2] for given in seen if given[2] is not None]
    assert [(kind, picture.size) for kind, picture, _ in pictures] == [("JPEG", (48, 32))] * 2


def test_a_broken_file_costs_the_previews_and_not_the_run(
    file: Path,
    comfy_base: Path,
    submodule: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.TAESD)
    place = comfy_base / "models" / "vae_approx" / file.name
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    try:
        assert submodule("nodes.native.tiny_vae").previewer(0.7, torch.device("cpu"), 4) is None
    finally:
        place.write_bytes(whole)
    assert "no previews by the tiny autoencoder. taecvx.safetensors" in caplog.text
