"""Procedural scenes, their captions, and the judge that reads them back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flashvideo.training.scenes.backgrounds import View, draw_background
from flashvideo.training.scenes.captions import caption, parse_prompt
from flashvideo.training.scenes.judge import judge
from flashvideo.training.scenes.rendering import render, subject_coverage
from flashvideo.training.scenes.stream import SPLITS, SceneStream, random_scene
from flashvideo.training.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    Scene,
    contrasts,
    possible,
)

SMALL = (64, 112)
LARGE = (256, 448)


@pytest.fixture(scope="module")
def held_out() -> list[tuple[torch.Tensor, Scene, dict[str, str]]]:
    """Twenty-four clips of held-out combinations, with what their captions ask for."""
    stream = SceneStream("test", *SMALL, frames=17, seed=5)
    clips = []
    for index in range(24):
        video, text = stream.sample(index)
        clips.append((video, stream.scene(index), parse_prompt(text)))
    return clips


class TestScenes:
    def test_a_sample_depends_on_seed_and_index_only(self) -> None:
        first, second = (SceneStream("train", *SMALL, frames=5, seed=7) for _ in range(2))
        for index in range(3):
            first.sample(index)
        video, text = first.sample(11)
        again, same_text = second.sample(11)
        assert torch.equal(video, again)
        assert text == same_text
        assert not torch.equal(video, SceneStream("train", *SMALL, frames=5, seed=8).sample(11)[0])

    def test_videos_have_the_wanted_size_and_range(self) -> None:
        for height, width, frames in ((64, 112, 17), (48, 48, 1), (80, 96, 9)):
            video = render(random_scene(3), frames, height, width)
            assert video.shape == (3, frames, height, width)
            assert video.dtype == torch.float32
            assert -1 <= video.min() < video.max() <= 1

    def test_a_longer_clip_begins_with_the_shorter_one(self) -> None:
        scene = random_scene(4)
        longer = render(scene, 9, *SMALL)
        assert torch.allclose(longer[:, :5], render(scene, 5, *SMALL), atol=1e-5)
        # Twice the rate shows the same moments, and one between each two.
        assert torch.allclose(longer[:, :5], render(scene, 9, *SMALL, rate=16)[:, ::2], atol=1e-5)

    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_a_small_picture_is_what_remains_of_the_large_one(self, background: str) -> None:
        scene = _scene_with(background)
        large = F.interpolate(render(scene, 2, *LARGE), SMALL, mode="area")
        error = (large - render(scene, 2, *SMALL)).square().mean()
        assert 10 * torch.log10(4 / error) > 24  # dB; a picture of another scene has about 10

    def test_a_draft_of_a_quarter_the_size_loses_detail(self) -> None:
        for background in BACKGROUNDS:
            large = render(_scene_with(background), 1, *LARGE)
            enlarged = F.interpolate(F.interpolate(large, SMALL, mode="area"), LARGE, mode="bicubic")
            sharp, soft = (picture.diff(dim=-1).abs().mean() for picture in (large, enlarged))
            assert sharp > 1.3 * soft, background

    def test_every_word_of_the_vocabulary_occurs(self) -> None:
        scenes = [random_scene(seed) for seed in range(600)]
        subjects = [subject for scene in scenes for subject in scene.subjects]
        assert {subject.colour for subject in subjects} == set(COLOURS)
        assert {subject.shape for subject in subjects} == set(SHAPES)
        assert {subject.direction for subject in subjects} == set(DIRECTIONS)
        assert {scene.background for scene in scenes} == set(BACKGROUNDS)
        assert {len(scene.subjects) for scene in scenes} == {1, 2}
        assert min(Counter(subject.colour for subject in subjects).values()) > 20

    def test_subjects_stand_out_and_can_be_seen_to_move(self) -> None:
        for scene in map(random_scene, range(300)):
            for subject in scene.subjects:
                assert contrasts(subject.colour, scene.background, scene.background_colour)
                assert possible(subject.shape, subject.direction)

    def test_subjects_are_in_the_picture_from_the_first_frame_to_the_last(self) -> None:
        for scene in map(random_scene, range(30)):
            with_subjects = render(scene, 17, *SMALL)
            without = render(Scene((), *list(vars(scene).values())[1:]), 17, *SMALL)
            covered = ((with_subjects - without).abs().amax(0) > 0.1).float().mean((1, 2))
            assert covered.min() > 0.005, scene


class TestSplits:
    def test_training_never_sees_a_held_out_combination(self) -> None:
        for split in ("train", "validation"):
            triples = {subject.triple for seed in range(800) for subject in random_scene(seed, split).subjects}
            assert not triples & HELD_OUT
        assert all(random_scene(seed, "test").subjects[0].triple in HELD_OUT for seed in range(100))

    def test_held_out_combinations_are_few_and_of_every_kind(self) -> None:
        assert ("red", "circle", "left") in HELD_OUT
        assert 25 <= len(HELD_OUT) <= 60
        for place, words in enumerate((COLOURS, SHAPES, DIRECTIONS)):
            assert {triple[place] for triple in HELD_OUT} == set(words)

    def test_splits_have_different_scenes(self) -> None:
        assert len({random_scene(1, split) for split in SPLITS}) == len(SPLITS)

    def test_an_unknown_split_is_named(self) -> None:
        with pytest.raises(ValueError, match="'holdout'"):
            random_scene(0, "holdout")
        with pytest.raises(ValueError, match="'holdout'"):
            SceneStream("holdout", *SMALL, frames=5, seed=0)


class TestCaptions:
    @pytest.mark.parametrize("motion_prefix", [False, True])
    def test_every_caption_is_understood(self, motion_prefix: bool) -> None:
        for seed in range(400):
            scene = random_scene(seed)
            subject = scene.subjects[0]
            wanted = parse_prompt(caption(scene, seed, motion_prefix=motion_prefix))
            assert (wanted["colour"], wanted["shape"], wanted["direction"]) == subject.triple
            assert wanted["background"] == scene.background
            assert wanted.get("texture", "plain") == subject.texture
            assert wanted.get("speed", subject.speed) == subject.speed
            assert wanted.get("camera", "static") == scene.camera

    def test_wordings_differ(self) -> None:
        assert len({caption(random_scene(1), seed) for seed in range(60)}) > 8

    def test_motion_is_told_as_the_official_prompts_do(self) -> None:
        texts = {caption(random_scene(seed), seed, motion_prefix=True).split(",")[0] for seed in range(60)}
        assert texts == {"low motion", "medium motion", "high motion"}

    def test_prompts_from_elsewhere(self) -> None:
        assert parse_prompt("a striped red circle moves left over a green hill") == {
            "colour": "red",
            "shape": "circle",
            "direction": "left",
            "texture": "striped",
            "background": "hill",
        }
        assert parse_prompt("A cat sleeps on a sofa") is None
        assert parse_prompt("a red circle over a green hill, the camera pans left") is None


class TestJudge:
    def test_held_out_scenes_are_read_right(self, held_out: list) -> None:
        right = [all(judge(video, wanted).values()) for video, _, wanted in held_out]
        assert sum(right) >= 0.95 * len(right)

    def test_a_wrong_shape_or_direction_is_noticed(self, held_out: list) -> None:
        for video, _, wanted in held_out[:10]:
            other_shape = SHAPES[(SHAPES.index(wanted["shape"]) + 1) % len(SHAPES)]
            other_way = DIRECTIONS[(DIRECTIONS.index(wanted["direction"]) + 1) % len(DIRECTIONS)]
            verdict = judge(video, {**wanted, "shape": other_shape, "direction": other_way})
            assert not verdict["direction"]
            assert not verdict["shape"]

    def test_a_colour_that_is_not_there_is_not_found(self, held_out: list) -> None:
        found = []
        for video, scene, wanted in held_out:
            there = {subject.colour for subject in scene.subjects}
            absent = [
                colour
                for colour in COLOURS
                if colour not in there and contrasts(colour, scene.background, scene.background_colour)
            ]
            found += [judge(video[:, :9], {**wanted, "colour": colour})["colour"] for colour in absent[:2]]
        assert sum(found) <= 0.05 * len(found)

    def test_noise_and_empty_backgrounds_show_nothing(self) -> None:
        wanted = {"colour": "red", "shape": "circle", "direction": "left"}
        noise = 2 * torch.rand(3, 9, *SMALL, generator=torch.Generator().manual_seed(0)) - 1
        assert not any(judge(noise, wanted).values())
        assert not any(judge(torch.zeros(3, 9, *SMALL), wanted).values())


def test_backgrounds_of_one_kind_differ() -> None:
    x = ((torch.arange(112) - 55.5) / 64).view(1, 1, -1)
    y = ((torch.arange(64) - 31.5) / 64).view(1, -1, 1)
    for background in BACKGROUNDS:
        pictures = [
            draw_background(Scene((), background, "pink", "static", seed), View(x, y, torch.zeros(1, 1, 1), 1 / 64))
            for seed in (1, 2)
        ]
        # A plain one has no detail at this size.
        assert background == "plain" or not torch.allclose(*pictures, atol=1e-2)


@pytest.mark.parametrize("seed", range(6))
def test_a_layout_is_where_subjects_are(seed: int) -> None:
    """A scene and the same one without its subjects differ there, and nowhere else."""
    scenes = map(random_scene, range(100 * seed, 100 * seed + 100))
    scene = next(scene for scene in scenes if len(scene.subjects) == 1 + seed % 2)
    differs = (render(scene, 9, *SMALL) - render(replace(scene, subjects=()), 9, *SMALL)).abs().amax(0) > 0.02
    covered = subject_coverage(scene, 9, *SMALL)
    assert covered.shape == differs.shape
    assert not differs[covered == 0].any()
    assert differs[covered == 1].float().mean() > 0.95  # a pixel may have the background's colour
    coarse = subject_coverage(scene, 9, SMALL[0] // 4, SMALL[1] // 4)
    assert float((coarse - F.avg_pool2d(covered[None], 4)[0]).abs().mean()) < 0.01  # smoothed at corners


def test_a_streams_layout_belongs_to_its_clip() -> None:
    stream = SceneStream("train", *SMALL, 5, 7)
    assert torch.equal(stream.layout(3, 4), subject_coverage(stream.scene(3), 5, 16, 28))


def _scene_with(background: str) -> Scene:
    return next(scene for scene in map(random_scene, range(1000)) if scene.background == background)
