"""`python -m flashvideo generate` and `bench`: a draft from words, kept without loss, and its refined video."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from flashvideo import atomic_files
from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.commands import drafts, loading, run_generate
from flashvideo.commands.main import main
from flashvideo.config import STAGE1_LATENT_SCALE
from flashvideo.frames import to_bytes, to_frames
from flashvideo.nano import NANO_FOLDER, nano_state
from flashvideo.samplers import sample_stage1
from flashvideo.t5 import T5Tokens, contexts, load_encoder

WORDS = "a red circle moves left over a green hill"


@pytest.fixture
def generate(tokenizer: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on small sizes; returns its exit code."""

    def run(
        *more: str, words: str = WORDS, name: str = "out.mp4", seed: str = "0", size: tuple = ("--scale", "1.5")
    ) -> int:
        small = ("--draft-size", "48x32", "--frames", "5", "--draft-steps", "3", "--steps", "1", *size)
        fixed = ("--tokenizer", str(tokenizer), "--device", "cpu", "--seed", seed)
        return main(["generate", words, str(tmp_path / name), *small, *fixed, *more])

    return run


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video, [T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_vae_that_does_not_belong_to_the_drafts_is_named(
    generate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    parts = {"draft-model": "stage1", "model": "stage2", "text-encoder": "text_encoder", "vae": "footage_vae"}
    files = [word for name, part in parts.items() for word in (f"--{name}", str(NANO_FOLDER / f"{part}.safetensors"))]
    assert generate("--draft-only", *files) == 0
    assert "drawn scenes, and the VAE of FlashVideo-Nano for real footage" in capsys.readouterr().err


def test_a_video_is_drafted_and_refined(generate: Callable[..., int], tokenizer: Path, tmp_path: Path) -> None:
    assert generate(seed="7") == 0
    assert frames_of(tmp_path / "out.mp4").shape == (5, 48, 72, 3)

    dit = load_dit(nano_state("stage1"), dtype=torch.float32)
    context = contexts(load_encoder(nano_state("text_encoder")), T5Tokens(str(tokenizer)), [WORDS])
    generator = torch.Generator().manual_seed(7)

    def noise(_step: int) -> torch.Tensor:
        return torch.randn(1, 16, 2, 4, 6, generator=generator)

    latent = sample_stage1(dit, noise(-1), context, torch.zeros_like(context), steps=3, step_noise=noise)
    with torch.no_grad():
        expected = to_frames(load_vae(nano_state("vae"), dtype=torch.float32).decode(latent / STAGE1_LATENT_SCALE))
    assert np.array_equal(frames_of(tmp_path / "out.mp4.draft.mkv"), to_bytes(expected).numpy())


def test_drafts_are_refined_by_the_networks_for_drawn_scenes(
    generate: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage I drafts in their latents."""
    parts, read = [], loading.model_file
    monkeypatch.setattr(loading, "model_file", lambda path, part: parts.append(part) or read(path, part))
    assert generate() == 0
    assert [part for part in parts if part != "text_encoder"] == ["stage2", "vae"]


def test_shapes_of_a_draft_are_made_anew_unless_a_detail_size_is_given(
    generate: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float | None] = []
    monkeypatch.setattr(run_generate, "refine", lambda options: used.append(options.settings.detail_size) or 0)
    for more in ((), ("--detail-size", "9")):
        assert generate(*more) == 0
    assert used == [70, 9]


def test_a_draft_is_kept_for_a_second_run_and_no_other(
    generate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate("--draft-only") == 0
    assert not (tmp_path / "out.mp4").exists()
    before = (tmp_path / "out.mp4.draft.mkv").read_bytes()

    monkeypatch.setattr("flashvideo.commands.drafts.sample_stage1", lambda *_, **__: pytest.fail("drafted again"))
    assert generate() == 0
    assert frames_of(tmp_path / "out.mp4").shape[0] == 5
    assert (tmp_path / "out.mp4.draft.mkv").read_bytes() == before
    capsys.readouterr()
    assert generate("--force", words="a blue circle") == 1
    assert "the draft of other words" in capsys.readouterr().err
    monkeypatch.undo()
    assert generate("--force", "--anew", words="a blue circle") == 0
    assert (tmp_path / "out.mp4.draft.mkv").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft-size", "50x32"], "multiples of 16"),
        (["--frames", "6"], "4n+1"),
        (["--draft-steps", "1"], "at least 2"),
        (["--draft-model", "stage1.safetensors"], "go together"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    generate: Callable[..., int], options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert generate(*options) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_draft_that_ends_early_leaves_no_file(
    generate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files.os, "fsync", fail)
    assert generate() == 130
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files, from the superuser neither")
def test_a_folder_that_takes_no_files_is_refused_before_the_draft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(drafts, "make_draft", None)
    assert main(["generate", WORDS, "/proc/out.mp4", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "/proc/out.mp4.draft.mkv: No such file or directory\n"


PROMPTS = """\ufeffa red circle moves left over a green hill

{"prompt": "a blue square", "seed": 7, "size": "48x32"}
{"prompt": "a blue square", "draft_size": "32x32", "frames": 1}
"""


def test_each_prompt_of_a_file_gives_what_it_gives_alone(
    generate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    assert generate("--prompts", words=str(prompts), name="many", seed="5") == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    results = [f"{number:04}.mp4" for number in (1, 3, 4)]
    assert sorted(made) == sorted(name + ending for name in results for ending in ("", ".draft.mkv"))
    assert [frames_of(tmp_path / "many" / name).shape for name in results] == [
        (5, 48, 72, 3),
        (5, 32, 48, 3),
        (1, 48, 48, 3),
    ]
    assert generate("--exact", "48x32", words="a blue square", name="0003.mp4", seed="7", size=()) == 0
    assert made["0003.mp4"] == (tmp_path / "0003.mp4").read_bytes()
    drafts = [frames_of(folder / "0003.mp4.draft.mkv") for folder in (tmp_path / "many", tmp_path)]
    assert np.array_equal(*drafts)  # Matroska has a random number in each file

    capsys.readouterr()
    (tmp_path / "many" / "0004.mp4").unlink()
    assert generate("--prompts", words=str(tmp_path / "many"), name="prompts.txt", seed="5") == 0  # in the other order
    assert capsys.readouterr().out.count("exists already and is left as it is") == 2
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}

    prompts.write_text("another prompt\n", encoding="utf-8")
    assert generate("--prompts", "--force", words=str(prompts), name="many") == 1
    assert "is the draft of other words or settings" in capsys.readouterr().err
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "prompts.txt holds no prompts."),
        ('a hill\n{"prompt": "a hill"', "prompts.txt, line 2: that is no JSON object: "),
        (
            '{"prompt": "a hill", "steps": 3}',
            "line 1: there is no 'steps', only prompt, seed, size, draft_size, frames.",
        ),
        ('{"prompt": "a hill", "seed": "3"}', 'line 1: seed takes a whole number; got "3".'),
        ('{"seed": 3}', "line 1: a prompt is missing."),
        ('{"prompt": "a hill", "seed": -3}', "prompts.txt, line 1: a seed must be 0 to"),
        ('{"prompt": "a hill", "size": "large"}', "prompts.txt, line 1: --exact takes a width and a height"),
        ('a hill\n\n{"prompt": "a hill", "frames": 6}', "prompts.txt, line 3: --frames must be"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_is_told_by_its_line_before_the_work(
    generate: Callable[..., int], text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    assert generate("--prompts", words=str(tmp_path / "prompts.txt"), name="many") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "many").exists()


def test_ray_spreads_prompts_only(generate: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    assert generate("--ray") == 1
    assert "it goes with --prompts" in capsys.readouterr().err


def test_bench_runs_a_script_of_the_benchmarks(capfd: pytest.CaptureFixture) -> None:
    assert main(["bench", "scaling", "--help"]) == 0
    assert "--rounds" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])


@pytest.mark.parametrize(("words", "sentence"), [
    (["--codec", "prores"], "can't hold ProRes pictures"),
    (["--fps", "24"], "--fps"),
    (["--start-number", "1"], "--start-number"),
    (["--deinterlace"], "--deinterlace"),
])  # fmt: skip
def test_what_the_video_cannot_have_is_refused_before_the_draft(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["generate", WORDS, str(tmp_path / "out.mp4"), *words])
    except SystemExit as end:
        code = end.code
    assert code and sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
