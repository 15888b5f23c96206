"""What all commands have in common, and what `plan`, `info` and `bench` say of themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flashvideo
from flashvideo import color, config
from flashvideo.checkpoints import convert
from flashvideo.commands import bench
from flashvideo.commands.main import main
from flashvideo.config import DiTConfig

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("convert", "info", "models", "plan", "generate", "refine", "compare", "train", "ablate", "bench")
PLAN = ("plan", "--width", "320", "--height", "192", "--frames", "17")


def test_version_is_the_project_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)
    assert (end.value.code, capsys.readouterr().out) == (0, f"ComfyUI-FlashVideo {version}\n")


# Prints the exit code of each command line, and those of HEAVY that were imported for it.
WITHOUT_PYTORCH = """
import contextlib, os, sys
from flashvideo.commands.main import main

for line in sys.argv[2].splitlines():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
    print(f"{line}: {code}", *(name for name in sys.argv[1].split() if name in sys.modules))
"""
HEAVY = ("torch", "numpy", "safetensors", "einops", "av", "PIL", "ray", "transformers", "tokenizers", "huggingface_hub")
MISTAKES = (
    *("wrong", "convert", "convert a b --to int3", "info", "models delete", "plan --width wide", "generate words"),
    *("refine a b --seed x", "refine a b --solver best", "refine a b --ray clips", "compare", "train vae --steps x"),
    *("ablate --minutes x", "bench wrong"),
)


def test_help_and_mistakes_do_not_wait_for_pytorch() -> None:
    right = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    command = [sys.executable, "-c", WITHOUT_PYTORCH, " ".join(HEAVY), "\n".join([*right, *MISTAKES])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = [*(f"{line}: 0" for line in right), *(f"{line}: 2" for line in MISTAKES)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_what_can_be_chosen_is_what_there_is() -> None:
    """The lists that help shows stand beside the code that does it."""
    methods = ("none", *color.METHODS)
    assert methods == config.COLOR_MATCHES
    assert tuple(convert.DTYPES) == config.FILE_DTYPES
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in config.DTYPES)


def test_the_list_of_commands_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, re.M)
    assert listed == list(COMMANDS)


def test_the_package_has_the_names_that_it_lists() -> None:
    assert all(getattr(flashvideo, name) is not None for name in flashvideo.__all__)
    assert flashvideo.DiTConfig is DiTConfig
    assert flashvideo.checkpoints.load_dit is flashvideo.load_dit
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = flashvideo.nothing


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_begins_with_what_the_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _usage, sentence, *_ = capsys.readouterr().out.split("\n\n")
    assert re.match(r"[A-Z].+\.$", sentence, re.S), sentence


@pytest.mark.parametrize(
    ("metadata", "width", "expected"),
    [
        ({"flashvideo.stage": "2"}, 1920, "LoRA for the official stage II (width 1920), rank 4, 2 layers"),
        ({"flashvideo.stage": "1"}, 3072, "LoRA for the official stage I (width 3072), rank 4, 2 layers"),
        ({"flashvideo.stage": "2"}, 77, "LoRA for a stage II (width 77), rank 4, 2 layers"),
        ({}, 640, "LoRA for a model that it doesn't name (width 640), rank 4, 2 layers"),
    ],
)
def test_info_tells_stage_base_and_rank_of_a_lora(
    metadata: dict[str, str], width: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {}
    for layer in ("q", "v"):
        state[f"diffusion_model.blocks.0.attn.{layer}.lora_A.weight"] = torch.zeros(4, width)
        state[f"diffusion_model.blocks.0.attn.{layer}.lora_B.weight"] = torch.zeros(width, 4)
        state[f"diffusion_model.blocks.0.attn.{layer}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "own.safetensors", metadata=metadata)
    assert main(["info", str(tmp_path / "own.safetensors")]) == 0
    assert f"own.safetensors: {expected}" in capsys.readouterr().out


def test_a_plan_without_a_card_has_no_times_of_the_official_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashvideo.commands.plan.open_device", lambda _name: torch.device("cpu"))
    assert main([*PLAN]) == 0
    text = capsys.readouterr().out
    assert "Name one with --card" in text
    assert not re.search(r"\d (s|min|h|days)\b", text)
    assert main([*PLAN, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] is None and plan["memory_bytes"] > 0


def test_a_plan_for_a_named_card_has_its_memory_and_says_that_times_are_estimates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("4090", "rtx 4090", "NVIDIA GeForce RTX-4090"):
        assert main([*PLAN, "--card", name]) == 0
        text = capsys.readouterr().out
        assert "This is within a budget of 24 GiB." in text
        assert "Times are estimates for RTX 4090" in text
    assert main([*PLAN, "--card", "Voodoo 2"]) == 1
    assert "Known: RTX 3060," in capsys.readouterr().err


def test_what_fits_only_in_tiles_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--card", "H100"]) == 0
    text = capsys.readouterr().out
    fits = int(re.search(r"Fits a card with (\d+) GiB, where the VAE works in smaller tiles", text).group(1))
    most = float(re.search(r"and ([\d.]+) GiB of work space", text).group(1))
    assert fits < most


def test_a_plan_beyond_its_budget_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--card", "4090", "--memory", "3"]) == 4
    assert "This is beyond a budget of 3 GiB." in capsys.readouterr().out


def test_lengths_that_no_draft_has_are_refused_by_plan_and_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["plan", "--frames", "50"], ["generate", "words", str(tmp_path / "x.mp4"), "--frames", "50"]):
        assert main(command) == 1
        assert "--frames must be 1, 5, 9, ..., 49, ... (4n+1)" in capsys.readouterr().err
    assert main(["plan", "--stage1-steps", "0", "--frames", "50", "--card", "H100"]) == 0


def test_the_download_says_where_the_benchmarks_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    assert main(["bench", "dit"]) == 1
    assert "Benchmarks are not part of this download. Clone https://" in capsys.readouterr().err
