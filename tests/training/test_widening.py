"""A wider VAE begins as a narrower one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashvideo.config import VAEConfig
from flashvideo.training.errors import TrainingError
from flashvideo.training.tasks.vae import initialise
from flashvideo.training.tasks.widening import widened
from flashvideo.vae import VideoVAE

NARROW = VAEConfig(4, (1, 2, 2, 4), encoder_blocks=1, decoder_blocks=1, norm_groups=4)
CLIP = torch.randn(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def narrow_vae() -> VideoVAE:
    vae = VideoVAE(NARROW)
    initialise(vae, seed=3)
    return vae


def pictures(vae: VideoVAE) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(vae.encode(CLIP).mode())


def test_widened_vae_gives_the_same_pictures() -> None:
    vae, config = narrow_vae(), dataclasses.replace(NARROW, channel_multipliers=(1, 2, 6, 8))
    wide = widened(vae, config, [], seed=0)
    assert wide.config == config
    torch.testing.assert_close(pictures(wide), pictures(vae), rtol=1e-4, atol=1e-4)


def test_copies_of_a_channel_can_learn_different_things() -> None:
    wide = widened(narrow_vae(), dataclasses.replace(NARROW, channel_multipliers=(1, 2, 2, 8)), [], seed=0)
    weight = wide.encoder.mid_block.resnets[0].conv1.conv.weight
    assert not torch.equal(weight[:, 0::2], weight[:, 1::2])


def test_other_norm_groups_are_fitted_to_what_the_norms_gave() -> None:
    vae, config = narrow_vae(), dataclasses.replace(NARROW, norm_groups=2)
    fitted = widened(vae, config, [CLIP], seed=0)
    plain = VideoVAE(config)
    plain.load_state_dict(vae.state_dict())
    truth = pictures(vae)
    assert (pictures(fitted) - truth).square().mean() < 0.25 * (pictures(plain) - truth).square().mean()


@pytest.mark.parametrize(
    "change", [{"channel_multipliers": (1, 3, 3, 4)}, {"decoder_blocks": 2}, {"base_channels": 2, "norm_groups": 2}]
)
def test_sizes_that_cannot_begin_so_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="can only begin one with the same blocks"):
        widened(narrow_vae(), dataclasses.replace(NARROW, **change), [], seed=0)


def test_levels_that_become_equally_wide_are_refused() -> None:
    """A block between them has a shortcut of its own in the narrow VAE, and none in the wide one."""
    with pytest.raises(TrainingError, match="conv_shortcut.bias would be lost"):
        widened(narrow_vae(), dataclasses.replace(NARROW, channel_multipliers=(2, 2, 4, 4)), [], seed=0)
