"""The VAE beside a training: the same clips and latents however little room there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from pretended_card import CARD, PretendedCard, prepare_card
from safetensors.torch import load_file, save_file
from small_models import write_models

from flashvideo.config import VAE
from flashvideo.training.data import frozen_vae
from flashvideo.training.data.frozen_vae import FrozenVAE
from flashvideo.training.data.latents import encoder_digest
from flashvideo.vae import VideoVAE
from flashvideo.vae.memory import decode_bytes, encode_bytes

CPU = torch.device("cpu")
SHALLOW_VAE = replace(VAE, encoder_blocks=1, decoder_blocks=1)  # as wide, and so as large, in a fraction of the time


def test_tiles_give_what_whole_pictures_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path / "models")
    whole = FrozenVAE(tmp_path / "models" / "vae.safetensors", CPU)
    little = FrozenVAE(whole.source, CPU, room=0.2 * encode_bytes(whole.network, (1, 3, 9, 64, 96), whole.dtype))
    video = torch.rand(3, 9, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = torch.stack([whole.encode(video, 3, "clip", index) for index in range(2)])
    shown = whole.decode(latents)
    assert latents.shape == (2, 16, 3, 8, 12)
    assert (latents[0] - latents[1]).std() > 0.1  # each has noise of its own

    for half in ("encode", "decode"):  # from here on, tiles or nothing
        monkeypatch.setattr(VideoVAE, half, lambda *_: pytest.fail("the whole picture"))
    tiled = torch.stack([little.encode(video, 3, "clip", index) for index in range(2)])
    torch.testing.assert_close(tiled, latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(little.decode(latents), shown, rtol=0, atol=1e-4)


def test_another_encoder_in_the_same_file_has_latents_of_its_own(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    path = tmp_path / "models" / "vae.safetensors"
    state, before = load_file(path), encoder_digest(path)
    changed = {"decoder.conv_out.conv.bias": False, "encoder.conv_out.conv.bias": True}
    for name, differs in changed.items():
        state[name] = state[name] + 1
        path.unlink()
        save_file(state, path)
        assert (encoder_digest(path) != before) == differs


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_card_keeps_its_room(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE as wide as the official one at 960x544 on a card that holds a network, too."""
    prepare_card(monkeypatch)
    monkeypatch.setattr(
        frozen_vae, "load_vae", lambda _, device, dtype: VideoVAE(SHALLOW_VAE, device=device, dtype=dtype).eval()
    )
    monkeypatch.setattr(frozen_vae, "main_memory", lambda: 32 * 2**30)
    clip, latent, room = (1, 3, 9, 544, 960), (1, 16, 3, 68, 120), 3 * 2**30
    with PretendedCard(), torch.no_grad():
        vae = FrozenVAE(Path("vae.safetensors"), torch.device(CARD), room)
        assert min(encode_bytes(vae.network, clip, vae.dtype), decode_bytes(vae.network, latent, vae.dtype)) > room
        given = torch.zeros(clip[1:]) if half == "encoder" else torch.zeros(latent, device=CARD)
        with LiveBytes(given, device=CARD) as held:
            result = vae.encode(given, 1, "clip") if half == "encoder" else vae.decode(given)
        assert 0.25 * room <= held.added <= 1.1 * room
        assert (result.device.type, tuple(result.shape), result.dtype) == (
            (CARD, latent[1:], torch.float32) if half == "encoder" else ("cpu", clip, torch.float32)
        )
