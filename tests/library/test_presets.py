"""Presets: their numbers, and that a command with one does what it does with the numbers typed by hand."""

from __future__ import annotations

import argparse
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_videos import make_video

from flashvideo.commands.chosen import refine_settings
from flashvideo.commands.options import add_refiner_options, add_size_options
from flashvideo.commands.refine import add_refine
from flashvideo.config import NANO_FOOTAGE_STAGE2, NANO_STAGE2, NANO_STRENGTH, STAGE2, DiTConfig
from flashvideo.degradation import AutoStrength, auto_strength
from flashvideo.frames import PictureSize, TargetSize
from flashvideo.nano import nano_state
from flashvideo.presets import PRESETS
from flashvideo.refiner import files as refine_files
from flashvideo.refiner.files import WORK_ENDING
from flashvideo.refiner.run import RefineSettings
from flashvideo.refiner.work_folder import WorkFolder

KEEP = TargetSize("keep")


def test_their_numbers() -> None:
    """Saved workflows name presets: their numbers stay."""
    numbers = {name: (each.strength, each.steps, each.cfg, each.shift) for name, each in PRESETS.items()}
    assert numbers == {
        "faithful": (600, 4, 10.0, 2.5),
        "balanced": (675, 4, 13.0, 2.5),
        "rich": (750, 6, 13.0, 2.5),
        "fast": (675, 3, 1.0, 2.5),
    }
    with pytest.raises(TypeError):
        PRESETS["rich"] = PRESETS["fast"]
    with pytest.raises(FrozenInstanceError):
        PRESETS["rich"].steps = 5


def settings(*arguments: str, prompt: str | None = "words") -> RefineSettings:
    """The settings of a command line."""
    parser = argparse.ArgumentParser()
    add_size_options(parser.add_argument_group())
    add_refiner_options(parser.add_argument_group())
    parser.set_defaults(prompt=prompt)
    return refine_settings(parser.parse_args(list(arguments)), KEEP)


def test_balanced_is_what_there_is_without_a_preset() -> None:
    assert settings() == settings("--preset", "balanced") == RefineSettings(KEEP, strength=None)


@pytest.mark.parametrize(("size", "strengths"), [
    ((1072, 1920), {"faithful": 600, "balanced": 675, "rich": 750, "fast": 675}),
    ((256, 448), {"faithful": 211, "balanced": 298, "rich": 412, "fast": 298}),
])  # fmt: skip
def test_strengths_follow_the_size(size: tuple[int, int], strengths: dict[str, int]) -> None:
    """As the ratio of signal to noise does."""
    found = {name: settings("--preset", name).strength_for(PictureSize(*size), STAGE2) for name in PRESETS}
    assert found == strengths
    assert found == {name: auto_strength(*size, strength=preset.strength) for name, preset in PRESETS.items()}


def test_numbers_that_are_given_win() -> None:
    chosen = settings("--preset", "rich", "--strength", "500", "--steps", "5", "--cfg", "11", "--shift", "3")
    assert (chosen.strength, chosen.steps, chosen.cfg, chosen.shift) == (500, 5, 11, 3)
    chosen = settings("--preset", "rich", "--steps", "5")
    assert (chosen.strength, chosen.steps, chosen.cfg, chosen.shift) == (AutoStrength(750), 5, 13, 2.5)
    assert settings("--preset", "rich", "--strength", "auto").strength is None
    assert settings("--preset", "rich", prompt=None).cfg == 1  # as without a preset: no prompt, no guidance


def test_a_strength_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 999"):
        AutoStrength(1000)


def refine(*arguments: str | Path) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser()
    add_refine(parser.add_subparsers())
    options = parser.parse_args(["refine", *map(str, arguments)])
    return options.run(options)


def test_a_command_with_a_preset_does_what_it_does_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By files of a model that isn't Nano, to the bit. Without a prompt cfg is 1."""
    source = make_video(tmp_path / "in.mp4", 1)
    shallow = {name: tensor for name, tensor in nano_state("stage2").items() if "blocks.3." not in name}
    save_file(shallow, tmp_path / "stage2.safetensors")
    save_file(nano_state("vae"), tmp_path / "vae.safetensors")
    models = ("--model", tmp_path / "stage2.safetensors", "--vae", tmp_path / "vae.safetensors")
    common = (*models, "--keep-size", "--device", "cpu", "--color", "none")
    strength = auto_strength(32, 48, strength=600)
    numbers = ("--strength", strength, "--steps", "4", "--shift", "2.5")
    for name, chosen in (("preset", ("--preset", "faithful")), ("numbers", numbers), ("default", ())):
        assert refine(source, tmp_path / f"{name}.mp4", *common, *chosen) == 0
        if name == "preset":
            assert f"strength {strength} (auto, for 48x32)" in capsys.readouterr().err
    preset, by_hand, default = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("preset", "numbers", "default"))
    assert preset == by_hand != default


@pytest.mark.parametrize("config", [NANO_STAGE2, NANO_FOOTAGE_STAGE2])
def test_nano_keeps_its_own_strength(config: DiTConfig) -> None:
    """At every size and with every preset, unless a number is given."""
    for size in (PictureSize(96, 160), PictureSize(1072, 1920)):
        for name in PRESETS:
            assert settings("--preset", name).strength_for(size, config) == NANO_STRENGTH
        assert settings("--strength", "auto").strength_for(size, config) == NANO_STRENGTH
        assert settings("--preset", "rich", "--strength", "300").strength_for(size, config) == 300


def test_another_preset_does_not_resume_a_run(tmp_path: Path) -> None:
    """What differs is said in words."""
    chosen = refine_files._work_folder
    source = make_video(tmp_path / "in.mp4", 1)
    at = (source, tmp_path / "out.mp4", PictureSize(32, 48))
    begun: WorkFolder = chosen(*at, settings("--preset", "faithful"), refine_files.FileOptions())
    begun.close()
    assert (tmp_path / f"out.mp4{WORK_ENDING}").is_dir()
    with pytest.raises(Exception, match=r"strength was auto, from 600 at 1080p, now None"):
        chosen(*at, settings(), refine_files.FileOptions())
    chosen(*at, settings("--preset", "faithful"), refine_files.FileOptions()).close()
