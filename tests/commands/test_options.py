"""Numbers of the command line: what isn't one, or is out of range, is refused in one sentence before any work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashvideo import arguments
from flashvideo.commands import main as command_line
from flashvideo.commands.chosen import refine_settings
from flashvideo.commands.main import main
from flashvideo.commands.options import add_refiner_options, add_size_options
from flashvideo.errors import CommandError
from flashvideo.frames import TargetSize
from flashvideo.t5 import T5Tokens

NO_NUMBERS = ("nan", "-inf", "1e400", "", "many", "9" * 5000, "1_0", "²", "٣")
COMMANDS = {
    "refine": ("in.mp4", "out.mp4"),
    "generate": ("a red ball", "out.mp4"),
    "plan": (),
    "train": ("vae", "--config", "vae.toml"),
    "ablate": (),
}
OUT_OF_RANGE = [
    *((command, option, number) for command in ("refine", "generate") for option, number in (
        ("--shift", "0"), ("--shift", "-2"), ("--shift", "1e300"), ("--scale", "0"), ("--scale", "-1"),
        ("--scale", "1e300"), ("--cfg", "-1"), ("--cfg", "1e30"), ("--steps", "0"), ("--steps", "-3"),
        ("--steps", "9999999"), ("--seed", "-1"), ("--crf", "-1"), ("--crf", "52"), ("--short-side", "0"),
        ("--short-side", "-5"), ("--short-side", "999999"), ("--exact", "0x0"), ("--exact", "²x4"), ("--exact", ""),
        ("--exact", "99999x99999"), ("--window", "-3"), ("--overlap", "-4"), ("--tile", "-16"), ("--strength", "-1"),
        ("--strength", "1000"), ("--vae-memory", "0"), ("--vae-memory", "-1"), ("--vae-memory", "1e300"),
    )),
    *(("generate", option, number) for option, number in (
        ("--frames", "0"), ("--frames", "-3"), ("--frames", "999999997"), ("--draft-steps", "1"),
        ("--draft-steps", "-1"), ("--draft-steps", "99999"), ("--draft-cfg", "-1"), ("--draft-cfg", "1e30"),
        ("--draft-size", ""), ("--draft-size", "²x16"), ("--draft-size", "0x16"), ("--draft-size", "999984x16"),
    )),
    *(("plan", option, number) for option, number in (
        ("--width", "0"), ("--height", "-1"), ("--width", "9999999"), ("--frames", "0"),
        ("--frames", "99999999999999999999"[:18]), ("--steps", "0"), ("--stage1-steps", "-1"), ("--cfg", "-1"),
        ("--cfg", "1e30"), ("--tile", "-1"), ("--memory", "0"), ("--memory", "-4"), ("--seconds", "0"),
    )),
    *(("train", option, number) for option, number in (("--steps", "0"), ("--minutes", "-1"))),
    *(("ablate", option, number) for option, number in (
        ("--steps", "-1"), ("--minutes", "-0.5"), ("--strength", "-2"), ("--strength", "1000"), ("--steps", "1001"),
    )),
]  # fmt: skip


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    made: dict[str, argparse.ArgumentParser] = {}
    found = {}

    class Noted(arguments.Parser):
        def __init__(self, *positional: object, **options: object) -> None:
            super().__init__(*positional, **options)
            made[self.prog.split()[-1]] = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "Parser", Noted)
        for command in command_line._COMMANDS:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            found[command] = made[command]
    return found


def numeric_options() -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """All options that take a number, by command."""
    types = (arguments.whole, arguments.positive, arguments.real, arguments.duration)
    for command, parser in parsers().items():
        for action in parser._actions:
            assert action.type not in (int, float), f"{command} {action.option_strings}: a type of flashvideo.arguments"
            if action.type in types or "--strength" in action.option_strings:
                yield command, parser, action.option_strings[0]


def answer(command: str, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """A command's exit code, and what it says on standard error."""
    capsys.readouterr()
    try:
        code = main([command, *COMMANDS[command], *words])
    except SystemExit as end:
        code = int(end.code)
    return code, capsys.readouterr().err


def check_refusal(code: int, said: str, option: str) -> None:
    assert code in (1, 2)
    assert said.count("\n") == 1, said
    assert len(said) < 400, said
    assert "Traceback" not in said
    assert "usage" not in said
    if code == 2:
        assert option in said


def test_every_option_with_a_number_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    options = list(numeric_options())
    assert {command for command, _, _ in options} == set(COMMANDS)
    for command, parser, option in options:
        for text in NO_NUMBERS:
            with pytest.raises(SystemExit) as end:
                parser.parse_args([*COMMANDS[command], f"{option}={text}"])
            check_refusal(end.value.code, capsys.readouterr().err, option)


@pytest.mark.parametrize(("command", "option", "number"), OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_before_any_work(
    command: str, option: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, said = answer(command, capsys, f"{option}={number}")
    check_refusal(code, said, option)
    assert "no file" not in said, "the number comes first"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_before_any_work(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    for command in ("refine", "generate"):
        for place in (path, tmp_path):
            code, said = answer(command, capsys, "--tokenizer", str(place))
            check_refusal(code, said, "--tokenizer")
            assert str(place) in said
            assert "--tokenizer" in said
    with pytest.raises(CommandError, match="tokenizer"):
        T5Tokens(str(path))


@pytest.mark.parametrize("option", ["--model", "--vae", "--text-encoder", "--draft-model"])
def test_model_files_that_are_missing_are_named_first(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    partner = {"--model": "--vae", "--vae": "--model", "--draft-model": "--model"}.get(option)
    words = [option, "nowhere.safetensors"] + ([partner, __file__] if partner else [])
    if option == "--draft-model":
        words += ["--vae", __file__]
    code, said = answer("generate", capsys, *words)
    assert code == 1
    assert said.startswith(("There is no file nowhere.safetensors", "--draft-model and --model go together"))
    assert said.count("\n") == 1


def test_what_can_be_a_number_is_one() -> None:
    assert arguments.whole("18446744073709551615") == 2**64 - 1
    assert arguments.whole("-3") == -3
    assert arguments.real("1e-3") == 0.001
    assert arguments.width_and_height("1920X1080") == (1920, 1080)
    assert arguments.width_and_height("1920x") is None


@pytest.mark.parametrize(("window", "overlap"), [(49, 16), (17, 16), (13, 12), (5, 4), (1, 0)])
def test_overlap_follows_a_shorter_window(window: int, overlap: int) -> None:
    parser = argparse.ArgumentParser()
    for add in (add_size_options, add_refiner_options):
        add(parser.add_argument_group())
    parser.set_defaults(prompt="words")
    settings = refine_settings(parser.parse_args(["--window", str(window)]), TargetSize())
    assert (settings.window, settings.overlap) == (window, overlap)
