"""What FlashVideo Compare hands to the slider in ComfyUI's page, and that nothing of it can stop a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import folder_paths
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KEY = "flashvideo_compare"
NODE = "FlashVideoCompare"


@pytest.fixture()
def temporary(tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's temporary folder, not there yet."""
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    yield tmp_path / "temp"
    folder_paths.set_temp_directory(before)


def clips(frames: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(frames, 12, 20, 3), torch.rand(frames, 48, 80, 3)


def test_the_page_gets_a_short_video_of_both(run_prompt: Callable, values: dict[str, Any], temporary: Path) -> None:
    values["before"], values["after"] = clips()
    given = {name: {"class_type": "TestValue", "inputs": {"name": name}} for name in ("before", "after")}
    inputs = {"before": ["before", 0], "after": ["after", 0], "layout": "split", "fps": 8}
    prompt = {**given, "compare": {"class_type": NODE, "inputs": inputs}}  # nothing behind it
    outputs, events = run_prompt(prompt)
    assert list(outputs) == ["compare"] and list(outputs["compare"]) == [KEY]
    (shown,) = outputs["compare"][KEY]
    file, numbers = shown["file"], {name: value for name, value in shown.items() if name != "file"}
    assert numbers == {"height": 48, "width": 80, "offset": 64, "frames": 5, "total": 5, "fps": 8.0}
    assert file["type"] == "temp" and file["subfolder"] == ""
    assert [path.name for path in temporary.iterdir()] == [file["filename"]]
    with av.open(str(temporary / file["filename"])) as container:
        track = container.streams.video[0]
        assert (track.frames, track.average_rate, track.width) == (5, 8, 80)
    reported = [data for name, data in events if name == "executed" and data["node"] == "compare"]
    assert reported[0]["output"][KEY][0]["file"] == file

    outputs, _ = run_prompt(prompt)  # nothing has changed: the same file
    assert outputs["compare"][KEY][0]["file"] == file
    assert len(list(temporary.iterdir())) == 1


def test_a_picture_and_a_long_clip_are_shown_too(comfy_nodes: dict, temporary: Path) -> None:
    execute = comfy_nodes[NODE].execute
    (shown,) = execute(*clips(1), "split").ui[KEY]
    assert shown["file"]["filename"].endswith(".png") and shown["frames"] == 1 and shown["fps"] == 24
    assert (temporary / shown["file"]["filename"]).is_file()
    (shown,) = execute(torch.rand(241, 4, 4, 3), torch.rand(241, 8, 8, 3), "stacked").ui[KEY]
    assert (shown["frames"], shown["total"]) == (240, 241)


@pytest.mark.parametrize("reason", ["no folder", "no encoder"])
def test_without_a_preview_the_run_goes_on_with_a_warning(
    comfy_nodes: dict,
    submodule: Callable[[str], ModuleType],
    temporary: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    if reason == "no folder":
        temporary.write_text("a file")
    else:
        monkeypatch.setitem(submodule("flashvideo.compare.preview")._OPTIONS, "preset", "no such")
    before, after = clips()
    with caplog.at_level(logging.WARNING):
        output = comfy_nodes[NODE].execute(before, after, "side by side")
    expected = submodule("flashvideo.compare").compare(before, after, "side by side")
    assert torch.equal(output.result[0], expected)
    assert output.ui == {KEY: []}  # clears what the page shows of an earlier run
    (warning,) = [record.message for record in caplog.records if record.name == "root"]
    assert re.fullmatch(
        r"FlashVideo Compare: there is no slider, as its preview can't be made \(.+\)\. The result is whole\.", warning
    )
    assert temporary.is_file() or not list(temporary.iterdir())


def test_cancel_during_the_preview_ends_the_run_and_leaves_nothing(
    submodule: Callable[[str], ModuleType], temporary: Path
) -> None:
    from comfy.model_management import InterruptProcessingException

    def cancel(done: float, total: int) -> None:
        if done == 3:
            raise InterruptProcessingException

    slider = submodule("nodes.native.slider").slider
    with pytest.raises(InterruptProcessingException):
        slider(*clips(), 24, name="FlashVideo Compare", node_id=None, progress=cancel)
    assert not list(temporary.iterdir())


def test_the_page_and_the_node_use_the_same_words(submodule: Callable[[str], ModuleType]) -> None:
    page = (ROOT / "web" / "js" / "compare.js").read_text(encoding="utf-8")
    assert submodule("nodes.native.slider").KEY == KEY
    assert f'const KEY = "{KEY}"' in page and f'const NODE = "{NODE}"' in page


def test_the_page_s_scripts_hold_no_html_and_every_text_in_every_language() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "js").glob("*.js")}
    for name, text in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
    languages = dict(re.findall(r"^  (\w\w): \{\n(.+?)^  \},", scripts["compare_words.js"], re.M | re.S))
    keys = {language: re.findall(r'^    (\w+): ".+",$', texts, re.M) for language, texts in languages.items()}
    assert set(keys) == {"en", "zh", "ja"}
    assert keys["zh"] == keys["ja"] == keys["en"] and len(keys["en"]) >= 10
    used = set(re.findall(r"\bwords\.(\w+)", scripts["compare_slider.js"]))
    assert used == set(keys["en"])
