"""Where training clips come from: one source, or a mixture, as a config names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_libraries import counted, name_of, texture, write_library
from small_recipes import CLIPS, CROPS, SMALL_VAE, VAE, head

from flashvideo.training.config import build, load_toml
from flashvideo.training.data.clip_library import ClipLibrary
from flashvideo.training.data.latents import ClipSettings, ScenePieces, content_of, layout_of, sample_uncut
from flashvideo.training.data.photographs import MovingPhotographs
from flashvideo.training.data.real_clips import RealClips
from flashvideo.training.data.sources import Footage, Mixture, Weights
from flashvideo.training.errors import TrainingError
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.training.tasks.vae import CropData, VAESettings

SIZE = 32, 48


class TestSources:
    @pytest.fixture
    def real(self, tmp_path: Path) -> Path:
        clips = {name_of(split, "a", ".mp4"): counted(30) for split in ("train", "validation")}
        clips |= {name_of(split, "p", ".png"): texture(200, 300) for split in ("train", "validation")}
        write_library(tmp_path / "real", clips, {name: "a real clip" for name in clips if name.startswith("a")})
        return tmp_path / "real"

    def test_a_config_names_its_source(self, real: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        for source, kind in (
            ("", SceneStream),
            ('source = "scenes"\n', SceneStream),
            ('source = "scenes"\nscene = [64, 96]\n', ScenePieces),
            (f'source = "real"\nreal = "{real.as_posix()}"\nshrink = [1.0, 1.5]\nstrides = [1]\n', RealClips),
            (f'source = "photographs"\nreal = "{real.as_posix()}"\nspeeds = [0.1, 0.2]\n', MovingPhotographs),
            (f'source = "mixed"\nreal = "{real.as_posix()}"\nweights = {{ scenes = 2, real = 1 }}\n', Mixture),
        ):
            path.write_text(CLIPS + source, encoding="utf-8")
            settings = build(ClipSettings, load_toml(path), path.name)
            for split in ("train", "validation"):
                opened = settings.open(split, 3)
                assert isinstance(opened, kind)
                video, caption = opened.sample(1)
                assert video.shape == (3, 5, 32, 48)
                assert isinstance(caption, str)

    def test_a_mixture_draws_by_its_weights(self, real: Path) -> None:
        weights = Weights(scenes=2, real=1, photographs=1)
        settings = ClipSettings(32, 48, 5, clips=4, source="mixed", real=str(real), weights=weights)
        mixture = settings.open("train", 3)
        kinds = [type(mixture.of(index)) for index in range(2000)]
        for kind, share in ((SceneStream, 0.5), (RealClips, 0.25), (MovingPhotographs, 0.25)):
            assert kinds.count(kind) / 2000 == pytest.approx(share, abs=0.04)
        again = settings.open("train", 3)
        for index in range(12):
            assert torch.equal(mixture.sample(index)[0], again.sample(index)[0])
            assert torch.equal(mixture.sample(index)[0], mixture.of(index).sample(index)[0])
        without = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), weights=Weights(1, 1, 0)).open("train", 3)
        assert {type(without.of(index)) for index in range(50)} == {SceneStream, RealClips}

    def test_a_scene_of_a_mixture_is_cut_from_its_whole_and_knows_its_layout(self, real: Path) -> None:
        pieces = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), scene=(64, 96)).open("train", 3)
        wholes = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real)).open("train", 3)
        seen = set()
        for index in range(12):
            whole, caption, cut = sample_uncut(pieces, index)
            video, same = pieces.sample(index)
            assert torch.equal(cut(whole), video)
            assert caption == same
            seen.add(tuple(whole.shape[-2:]))
            layout = layout_of(wholes, index, 4)
            assert (layout is None) == (not isinstance(wholes.of(index), SceneStream))
        assert seen == {(64, 96), (32, 48)}

    def test_latents_are_made_anew_for_other_files_and_cuts_only(self, real: Path) -> None:
        scenes = ClipSettings(32, 48, 5, clips=4)
        mixed = ClipSettings(32, 48, 5, clips=4, source="mixed", real=str(real))
        assert content_of(scenes.open("train", 1)) == ()
        assert scenes.identity == ClipSettings(32, 48, 5, clips=4, shrink=(1.0, 1.5)).identity
        assert mixed.identity != ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), shrink=(1.0, 1.5)).identity
        before = content_of(mixed.open("train", 1))
        library = ClipLibrary.open(real)
        library.caption([{clip.name: "other words" for clip in library.clips.values()}])
        assert content_of(mixed.open("train", 1)) != before

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"source": "films"}, "source must be one of scenes, real, photographs, mixed; got 'films'"),
            ({"source": "real"}, 'source = "real" needs the folder of fetched clips: add real = "runs/nano/real"'),
            ({"source": "mixed", "real": "x", "weights": (0, 0, 0)}, "weights must be 0 or more"),
            ({"shrink": (0.5, 2.0)}, "shrink must be two numbers of 1 or more"),
            ({"strides": ()}, "strides must be whole numbers of 1 or more"),
            ({"speeds": (0.0, 1.0)}, "speeds must be two numbers above 0"),
            ({"folder": "videos", "source": "real", "real": "x"}, 'source = "real" name different clips'),
        ],
    )
    def test_settings_that_can_not_be_are_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            weights = settings.pop("weights", None)
            more = {"weights": Weights(*weights)} if weights else {}
            ClipSettings(32, 48, 5, clips=4, **settings, **more)

    def test_the_vae_learns_from_all_sources_and_is_judged_by_held_out_ones(self, real: Path, tmp_path: Path) -> None:
        path = tmp_path / "vae.toml"
        clips = f'[clips]\nsource = "mixed"\nreal = "{real.as_posix()}"\n'
        crop = '[[crops]]\nrender = [32, 48]\nsize = [16, 24]\nframes = 5\nclips = 2\ncrops = 2\nsource = "{}"\n'
        judged = '[[validation]]\nname = "real"\nsize = [32, 48]\nframes = 5\nclips = 3\nsource = "real"\n'
        text = head(tmp_path / "run") + VAE + judged + "".join(map(crop.format, ("scenes", "real", "photographs", "")))
        path.write_text(text + clips, encoding="utf-8")
        settings = build(VAESettings, load_toml(path), path.name)
        data = CropData(settings.crops, settings.seed, settings.clips)
        shapes = {tuple(data[index].shape) for index in range(40)}
        assert shapes == {(2, 3, 5, 16, 16), (4, 3, 5, 16, 24)}
        assert torch.equal(data[7], CropData(settings.crops, settings.seed, settings.clips)[7])
        scenes = CropData(settings.crops[:1], settings.seed)
        assert torch.equal(scenes[3], CropData(settings.crops[:1], settings.seed, Footage())[3])

    def test_a_source_without_its_folder_is_told_before_training(self, tmp_path: Path) -> None:
        path = tmp_path / "vae.toml"
        path.write_text(head(tmp_path / "run") + VAE.replace(CROPS, f'{CROPS}source = "real"\n'))
        with pytest.raises(TrainingError, match='source = "real" needs the folder'):
            build(VAESettings, load_toml(path), path.name)
        assert SMALL_VAE in VAE
