"""The page that compares versions: one file, the right frames, the right numbers, nothing of a name runs."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import make_video, ramps

from flashvideo.commands.main import main
from flashvideo.compare.page import settings_of


def content(page: Path) -> tuple[dict, list[np.ndarray]]:
    """A page's data and its video's frames."""
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    video = page.with_suffix(".mp4")
    video.write_bytes(base64.b64decode(re.search(r"data:video/mp4;base64,([^\"]*)", text)[1]))
    with av.open(str(video)) as container:
        return data, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_versions_lie_one_above_the_other_in_the_size_of_the_largest(tmp_path: Path) -> None:
    small, large = make_video(tmp_path / "a.mp4", 5), make_video(tmp_path / "b.mkv", 3, size=(64, 96))
    assert main(["compare", str(small), str(large), str(tmp_path / "page.html")]) == 0
    data, frames = content(tmp_path / "page.html")
    assert (data["names"], data["frames"], data["rate"]) == (["a.mp4", "b.mkv"], 5, 24)
    assert (data["height"], data["width"]) == (64, 96)
    assert {frame.shape for frame in frames} == {(128, 96, 3)} and len(frames) == 5
    last = ramps(2, 64, 96)  # held
    assert np.abs(frames[4][64:].astype(int) - last).mean() < 4
    assert np.abs(frames[4][:64:2, ::2].astype(int) - ramps(4, 32, 48)).mean() < 6


def test_the_numbers_are_right(tmp_path: Path) -> None:
    first, second = make_video(tmp_path / "a.mkv", 4, crf="0"), make_video(tmp_path / "b.mkv", 4, crf="40")
    page = tmp_path / "page.html"
    assert main(["compare", str(first), str(second), str(page)]) == 0
    curves = np.array(content(page)[0]["curves"])
    lumas = []
    for path in (first, second):
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        lumas.append(frames @ np.array([0.2126, 0.7152, 0.0722]))
    for luma, curve in zip(lumas, curves, strict=True):
        sharp = np.abs(np.diff(luma, axis=1)).mean((1, 2)) + np.abs(np.diff(luma, axis=2)).mean((1, 2))
        assert np.allclose(curve[:, 0], sharp, atol=0.4)
        assert np.allclose(curve[1:, 1], np.abs(np.diff(luma, axis=0)).mean((1, 2)), atol=0.4)
    assert (curves[0, :, 2] == 100).all()
    psnr = -10 * np.log10((((lumas[1] - lumas[0]) / 255) ** 2).mean((1, 2)))
    assert np.allclose(curves[1, :, 2], psnr, atol=1)


def test_a_page_needs_no_network_and_runs_nothing_of_a_name(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a<script>alert(1)<.mkv", 2)
    other = make_video(tmp_path / "b.mkv", 2)
    assert main(["compare", str(video), str(other), str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?https?:""", text) and "@" not in re.sub(r"@media", "", text)
    assert json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["names"][0] == "a<script>alert(1)<.mkv"


def test_settings_that_comfyui_stored_are_shown(tmp_path: Path) -> None:
    nodes = {
        "1": {"class_type": "FlashVideoLatentDegradation", "inputs": {"strength": "auto", "latent": ["2", 0]}},
        "2": {"class_type": "LoadVideo", "inputs": {"file": "a.mp4"}},
    }
    assert settings_of({"prompt": json.dumps(nodes)}) == (("LatentDegradation: strength", "auto"),)
    assert settings_of({}) == settings_of({"prompt": "no JSON"}) == settings_of({"prompt": "[1]"}) == ()


@pytest.mark.parametrize(("words", "sentence"), [
    (["a.mkv", "page.html"], "A page takes 2 to 6 videos; got 1."),
    (["a.mkv", "b.mkv"], "b.mkv should end in .html"),
    (["a.mkv", "nowhere.mkv", "page.html"], "There is no file nowhere.mkv"),
    (["a.mkv", "a.mkv", "there.html"], "there.html exists already"),
    (["a.mkv", "text.mkv", "page.html"], "text.mkv can't be read as a video"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "a.mkv", 1)
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "text.mkv").write_text("no video")
    assert main(["compare", *words]) == 1
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "page.html").exists()
