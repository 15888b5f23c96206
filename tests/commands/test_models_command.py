"""`python -m flashvideo models`: finds what is there, tells what is missing, checks checksums, downloads what is named.

Downloads come from a real HTTP server on this machine that answers as huggingface.co does.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvideo import model_files
from flashvideo.checkpoints import catalogue
from flashvideo.checkpoints.convert import convert_file
from flashvideo.commands import main as cli
from flashvideo.config import NANO_TEXT_ENCODER, T5Config
from flashvideo.nano import nano_state
from flashvideo.t5 import t5_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
T5_XXL = T5Config(num_layers=24, d_model=4096, d_ff=10240, d_kv=64, num_heads=64)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_PATHS = """
elsewhere:
    base_path: {base}
    diffusion_models: models/video
    clip: |
        models/encoders
    checkpoints: models/checkpoints
shelf:
    is_default: true
    vae: {base}/vaes
"""


class Hub(ThreadingHTTPServer):
    """Answers as huggingface.co does, with the files put into `files`; remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}  # by repository/name
        self.claimed_size: int | None = None
        self.claimed_sha256: str | None = None
        self.break_after: int | None = None  # bytes of a download after which the connection is lost, once
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """The three requests that listing and downloading a file of a repository take."""

    server: Hub

    def do_POST(self) -> None:
        self._remember()
        repository = self.path.removeprefix("/api/models/").split("/paths-info/")[0]
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        entries = []
        for key, content in self.server.files.items():
            name = key.removeprefix(f"{repository}/")
            if key.startswith(f"{repository}/") and name in asked:
                size = self.server.claimed_size or len(content)
                lfs = {"oid": self._sha256(content), "size": size, "pointerSize": 130}
                entries.append({"type": "file", "path": name, "size": size, "oid": "0" * 40, "lfs": lfs})
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self._remember()
        content = self._content()
        linked = {"X-Linked-Etag": f'"{self._sha256(content)}"', "X-Linked-Size": str(len(content))}
        self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{COMMIT}"', **linked}, body=False)

    def do_GET(self) -> None:
        self._remember()
        content = self._content()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        lost, self.server.break_after = self.server.break_after, None
        span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}", "Accept-Ranges": "bytes"}
        self._send(206 if start else 200, content[start:], span, only=lost)

    def _content(self) -> bytes:
        return self.server.files[self.path.removeprefix("/").replace("/resolve/main/", "/")]

    def _sha256(self, content: bytes) -> str:
        return self.server.claimed_sha256 or hashlib.sha256(content).hexdigest()

    def _remember(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, only: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:only])
        self.close_connection = only is not None

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read once, at import
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in catalogue.PLACES:
        (tmp_path / "ComfyUI" / "models" / kind).mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    return tmp_path / "ComfyUI"


def official(stage: int, path: Path) -> Path:
    torch.save({"module": load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors")}, path)
    return path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code, and everything that `python -m flashvideo models` with these arguments says."""
    capsys.readouterr()
    code = cli.main(["models", *arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def chapter(text: str, title: str) -> str:
    """What `list` says of one role."""
    rest = text.split(f"{title}: ", 1)[1]
    return rest.split("\nstage")[0].split("\nthe ")[0]


def test_an_empty_comfyui_is_told_what_to_put_where(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answer(capsys)
    assert code == 0 and said.count("missing") == len(model_files.ROLES)
    for role, file in model_files.DOWNLOADS.values():
        text = chapter(said, role.name)
        assert file.file in text and f"https://huggingface.co/{file.repository}" in text
        assert str(comfyui / "models" / role.folder) in text
        assert f"download {role.files[0].name}" in text


def test_files_are_found_by_contents_wherever_comfyui_looks(
    comfyui: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (comfyui / "extra_model_paths.yaml").write_text(MODEL_PATHS.format(base=tmp_path / "shelf"))
    for folder in ("models/video/sub", "models/encoders", "vaes"):
        (tmp_path / "shelf" / folder).mkdir(parents=True)
    draft = official(1, comfyui / "models" / "diffusion_models" / "my draft model.pt")
    refiner = tmp_path / "shelf" / "models" / "video" / "sub" / "refiner.safetensors"
    convert_file(official(2, tmp_path / "stage2.pt"), refiner)
    vae = tmp_path / "shelf" / "vaes" / "video.safetensors"
    save_file(nano_state("vae"), vae)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, comfyui / "models/vae/sd.safetensors")
    said = answer(capsys)[1]
    for role, path in (("stage I", draft), ("stage II", refiner), ("the VAE", vae)):
        assert f"found    {path}" in chapter(said, role)
    assert "missing" in chapter(said, "the text encoder") and "sd.safetensors" not in said


def test_only_t5_xxl_is_the_text_encoder(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comfyui / "models" / "text_encoders"
    write_hollow(folder / "small.safetensors", t5_shapes(NANO_TEXT_ENCODER))
    assert "missing" in chapter(answer(capsys)[1], "the text encoder")
    write_hollow(folder / "t5.safetensors", t5_shapes(T5_XXL))
    assert "found" in chapter(answer(capsys)[1], "the text encoder")


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of 8-bit zeros that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_a_broken_file_with_a_known_name_is_named(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comfyui / "models" / "vae" / "3d-vae.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    said = chapter(answer(capsys)[1], "the VAE")
    assert f"BROKEN   {path}" in said and "git-lfs pointer" in said and "missing" in said
    code, said = answer(capsys, "verify", "--offline")
    assert code == 1 and f"BAD   {path}" in said


def test_which_comfyui_is_asked_when_it_is_not_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert "--comfyui PATH" in answer(capsys)[1]
    code, said = answer(capsys, "list", "--comfyui", str(tmp_path))
    assert code == 1 and "no folder `models`" in said


def test_a_pack_in_custom_nodes_knows_its_comfyui(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH")
    pack = comfyui / "custom_nodes" / "ComfyUI-FlashVideo"
    pack.parent.mkdir()
    pack.symlink_to(Path(catalogue.__file__).resolve().parents[2], target_is_directory=True)
    monkeypatch.setattr(catalogue, "__file__", str(pack / "flashvideo" / "checkpoints" / "catalogue.py"))
    assert catalogue.comfyui_folder(None) == comfyui


def test_broken_model_paths_are_named(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (comfyui / "extra_model_paths.yaml").write_text("comfyui: [not, a, section]\n")
    code, said = answer(capsys)
    assert code == 1 and "extra_model_paths.yaml is not what ComfyUI expects" in said


def test_only_what_was_named_is_downloaded_and_then_verified(
    comfyui: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    refiner = official(2, tmp_path / "stage2.pt").read_bytes()
    hub.files = {f"{model_files.OFFICIAL}/stage2.pt": refiner, f"{model_files.OFFICIAL}/stage1.pt": b"other"}
    target = comfyui / "models" / "diffusion_models" / "stage2.pt"
    code, said = answer(capsys, "download", "stage2")
    assert code == 0 and f"{target}: downloaded" in said
    assert target.read_bytes() == refiner
    assert [path for path in comfyui.rglob("*") if path.is_file()] == [target], "nothing is left beside it"
    assert not any("stage1" in path for _, path, _ in hub.asked)

    hub.asked.clear()
    assert "exists already, complete" in answer(capsys, "download", "stage2")[1]
    assert all(method == "POST" for method, _, _ in hub.asked), "nothing is downloaded twice"

    converted = comfyui / "models" / "diffusion_models" / "refiner.safetensors"
    convert_file(target, converted)
    code, said = answer(capsys, "verify", "stage2")
    assert f"good  {target}" in said and f"the checksum is that of stage2.pt at {model_files.OFFICIAL}" in said
    assert f"good  {converted}" in said and "converted from the official stage2.pt" in said

    hub.files[f"{model_files.OFFICIAL}/stage2.pt"] = b"a newer one"
    code, said = answer(capsys, "verify", "stage2")
    assert code == 1 and f"BAD   {target}" in said
    code, said = answer(capsys, "download", "stage2")
    assert code == 1 and "is another file" in said and target.read_bytes() == refiner


def test_an_interrupted_download_resumes(comfyui: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytes(range(256)) * 100_000  # huggingface_hub writes pieces of 10 MB
    hub.files = {f"{model_files.OFFICIAL}/3d-vae.pt": content}
    hub.break_after = 15_000_000
    target = comfyui / "models" / "vae" / "3d-vae.pt"
    code, said = answer(capsys, "download", "vae")
    if code == 1:  # newer versions of huggingface_hub go on by themselves
        assert "The same command resumes the download" in said and not target.exists()
        code, said = answer(capsys, "download", "vae")
    assert code == 0 and target.read_bytes() == content
    assert any(part and not part.startswith("bytes=0-") for method, _, part in hub.asked if method == "GET")


def test_a_download_that_does_not_fit_is_not_begun(comfyui: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {f"{model_files.OFFICIAL}/3d-vae.pt": b"small"}
    hub.claimed_size = 10**15
    code, said = answer(capsys, "download", "vae")
    assert code == 1 and "GB free, and 3d-vae.pt needs 1000000.1 GB there" in said
    assert not any(method == "GET" for method, _, _ in hub.asked)


def test_a_damaged_download_never_gets_the_file_s_name(
    comfyui: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = {f"{model_files.OFFICIAL}/3d-vae.pt": b"not what was published"}
    hub.claimed_sha256 = "0" * 64
    code, said = answer(capsys, "download", "vae")
    assert code == 1 and "arrived damaged" in said
    assert not any(path.is_file() for path in comfyui.rglob("*"))


def test_nothing_is_downloaded_without_a_name(comfyui: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Name one or more of stage1, stage2" in answer(capsys, "download")[1]
    assert "no model file called everything" in answer(capsys, "download", "everything")[1]
    answer(capsys, "list")
    assert hub.asked == []


def test_without_hugging_face_it_says_what_to_do(
    comfyui: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official(2, comfyui / "models" / "diffusion_models" / "stage2.pt")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    code, said = answer(capsys, "verify")
    assert code == 0 and "only contents are checked" in said and "good" in said
    assert answer(capsys, "download", "vae")[0] == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what an import finds where it isn't installed
    code, said = answer(capsys, "download", "vae")
    assert code == 1 and "pip install huggingface_hub" in said


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's kinds of files")
def test_links_pipes_and_circles_end_no_list(tmp_path: Path) -> None:
    """None of them can be read; a pipe would be waited for, and a circle followed without end."""
    place = tmp_path / "models" / "diffusion_models"
    place.mkdir(parents=True)
    (place / "circle").symlink_to(place)
    (place / "stage1.pt").symlink_to(tmp_path / "gone.pt")
    os.mkfifo(place / "stage2.pt")
    os.mkfifo(place / "other.safetensors")
    (place / "itself.safetensors").symlink_to(place / "itself.safetensors")
    found = {each.path.name: each.trouble for each in catalogue.find_files(catalogue.model_folders(tmp_path))}
    assert sorted(found) == ["stage1.pt", "stage2.pt"]
    assert "gone.pt, which isn't there" in found["stage1.pt"]
    assert "a pipe" in found["stage2.pt"]
    assert cli.main(["models", "list", "--comfyui", str(tmp_path)]) == 0
