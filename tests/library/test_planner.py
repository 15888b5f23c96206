"""The planner: its phases, its advice, its words, and its command."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flashvideo.commands.plan import add_plan
from flashvideo.config import NANO_STAGE2, NANO_VAE, STAGE2
from flashvideo.devices import GIB
from flashvideo.dit import FlashVideoDiT
from flashvideo.errors import CommandError
from flashvideo.nano import build_nano
from flashvideo.planner import NANO, OFFICIAL, Plan, Setting, make_plan
from flashvideo.planner.budget import LADDER, RESERVED, Advice, Budget, advise, on_card, rung_size
from flashvideo.planner.flops import Flops, dit_flops
from flashvideo.planner.plot import LIMIT, TIME, WEIGHTS, WORK, plot
from flashvideo.planner.report import advice_report, describe, duration, report, size
from flashvideo.planner.speed import Rates, calibrate

CARD = Rates("a fast card", matmul=5e14, attention=4e14, convolution=2e14)
FULL_HD = (13, 136, 240)  # latent of 1920x1088, 49 frames


def test_phases_of_the_official_setting() -> None:
    plan = make_plan(Setting())
    assert [phase.name for phase in plan.phases] == [
        "text", "stage I", "draft decode", "VAE encode", "stage II", "VAE decode"
    ]  # fmt: skip
    tokens = {phase.name: phase.tokens for phase in plan.phases}
    assert tokens["stage I"] == 226 + 13 * 16 * 30
    assert tokens["stage II"] == 226 + 13 * 68 * 120
    stage2 = next(phase for phase in plan.phases if phase.name == "stage II")
    assert stage2.flops == dit_flops(STAGE2, FULL_HD) * 8  # four steps, guided
    assert plan.flops.total == pytest.approx(sum(phase.flops.total for phase in plan.phases))
    assert plan.memory == max(phase.memory for phase in plan.phases)


def test_refining_alone_needs_no_draft() -> None:
    phases = [phase.name for phase in make_plan(Setting(stage1_steps=0)).phases]
    assert phases == ["text", "VAE encode", "stage II", "VAE decode"]


def test_cfg_1_halves_the_refiner() -> None:
    guided, plain = (make_plan(Setting(stage1_steps=0, cfg=cfg)).phases[2].flops.total for cfg in (13, 1))
    assert plain == guided / 2


def test_the_vae_runs_in_tiles_where_it_has_to() -> None:
    whole, tiled = (make_plan(on_card(Setting(precision="fp8"), memory)) for memory in (None, 12 * GIB))
    for one, other in zip(whole.phases, tiled.phases, strict=True):
        if one.memory <= 11 * GIB:
            assert other == one
        else:
            assert other.name in ("VAE encode", "VAE decode")
            assert other.tile < 1920 and other.memory <= 11 * GIB
            assert other.flops.total > 1.2 * one.flops.total
    assert "VAE decode (tiles of " in report(tiled, CARD)


def test_stage_two_in_tiles_needs_less_memory_and_says_so() -> None:
    whole, tiled, larger = (make_plan(Setting(tile=tile)) for tile in (0, 768, 1920))
    assert larger.phases == whole.phases  # one tile is the whole picture
    for one, other in zip(whole.phases, tiled.phases, strict=True):
        if one.name == "stage II":
            assert other.tile == 768
            assert other.tokens == 226 + 13 * 48 * 48
            assert other.activations < 0.45 * one.activations
            assert other.flops.attention < 0.52 * one.flops.attention
            assert other.flops.matmul > 1.7 * one.flops.matmul
        else:
            assert other == one
    assert "stage II sees tiles of 768 pixels, as you chose: an approximation." in report(tiled, CARD)
    assert "To fit" not in report(tiled, CARD)
    with pytest.raises(ValueError, match="a tile's side is a multiple of 16"):
        Setting(tile=100)


def test_fp8_halves_the_weights_of_everything_but_the_vae() -> None:
    for half, quarter in zip(make_plan(Setting()).phases, make_plan(Setting(precision="fp8")).phases, strict=True):
        assert quarter.activations == half.activations
        assert quarter.weights == (half.weights if "code" in half.name else half.weights / 2)


def test_a_long_video_is_refined_in_windows_of_the_same_memory() -> None:
    short, long = (
        next(phase for phase in make_plan(Setting(frames=frames)).phases if phase.name == "stage II")
        for frames in (49, 49 + 2 * 32)  # every further window brings 33 frames, less one that overlaps
    )
    assert long.memory == short.memory
    assert long.flops.total == pytest.approx(3 * short.flops.total)


@pytest.mark.parametrize(
    ("size", "draft"), [((1920, 1080), (256, 480)), ((1080, 1920), (480, 256)), ((1080, 1080), (352, 352))]
)
def test_the_draft_has_the_shape_of_the_video(size: tuple[int, int], draft: tuple[int, int]) -> None:
    assert Setting(width=size[0], height=size[1], frames=50).draft == (53, *draft)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, r"width must be 1 to 16384; got 0\."),
        ({"frames": 0}, r"frames must be at least 1; got 0\."),
        ({"stage2_steps": 0}, r"stage2 steps must be 1 to 1000; got 0\."),
        ({"precision": "int4"}, r"precision must be one of fp32, bf16, fp8; got 'int4'\."),
    ],
)
def test_what_no_run_could_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**wrong)


def within(plan: Plan, budget: Budget) -> bool:
    in_memory = budget.memory is None or plan.memory + RESERVED <= budget.memory
    return in_memory and (budget.seconds is None or CARD.seconds(plan.flops) <= budget.seconds)


def ask(setting: Setting, budget: Budget) -> Advice:
    return advise(setting, budget, lambda _: CARD)


BUDGETS = [Budget(memory * GIB) for memory in (6, 8, 12, 16, 24, 80)]
BUDGETS += [Budget(24 * GIB, seconds) for seconds in (1, 20, 60, 600)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("setting", [Setting(), Setting(1080, 1920, 81, 0), Setting(720, 720, 25, networks=NANO)])
def test_advice_is_within_the_budget_and_nothing_better_is(setting: Setting, budget: Budget) -> None:
    advice = ask(setting, budget)
    setting = on_card(setting, budget.memory)
    assert advice.fits == within(make_plan(setting), budget)
    assert (advice.length is not None) == within(make_plan(replace(setting, frames=1)), budget)
    if advice.length is not None:
        assert within(advice.length, budget)
        frames = advice.length.setting.frames
        assert advice.length.setting == replace(setting, frames=frames)
        assert frames == 481 or not within(make_plan(replace(setting, frames=frames + 4)), budget)
    if advice.resolution is not None:
        best = advice.resolution.setting
        assert within(advice.resolution, budget)
        assert best == replace(setting, width=best.width, height=best.height)
        assert best.width / best.height == pytest.approx(setting.width / setting.height, rel=0.01)
        for short in LADDER.values():
            scale = short / min(setting.width, setting.height)
            larger = replace(setting, width=round(setting.width * scale), height=round(setting.height * scale))
            assert short <= min(best.width, best.height) or not within(make_plan(larger), budget)
    sizes = [(setting.width, setting.height), *(rung_size(setting, rung) for rung in LADDER)]
    sized = [make_plan(replace(setting, width=width, height=height)) for width, height in sizes]
    assert (advice.resolution is not None) == any(within(plan, budget) for plan in sized)
    kinds = ({"precision": "bf16"}, {"precision": "fp8"}, {"networks": NANO})
    kept = [make_plan(replace(setting, **kind)) for kind in kinds]
    assert (advice.precision is not None) == any(within(plan, budget) for plan in kept)
    if advice.precision is not None:
        assert within(advice.precision, budget)
    if advice.nearest is not None:
        assert within(advice.nearest, budget)
        assert (advice.nearest.setting == setting) == advice.fits
    else:
        assert not within(advice.least, budget)


def test_nearest_gives_up_precision_before_size_and_size_before_length() -> None:
    whole = make_plan(Setting(stage1_steps=0))
    text = whole.phases[0]
    assert text.memory > 8 * GIB  # T5-XXL in bf16 is beyond a card of 9 GiB, in fp8 it isn't
    changed = ask(Setting(640, 352, 49, 0), Budget(8 * GIB)).nearest.setting
    assert (changed.precision, changed.frames, changed.width) == ("fp8", 49, 640)
    seconds = CARD.seconds(make_plan(Setting(1280, 720, stage1_steps=0)).flops)
    changed = ask(Setting(stage1_steps=0), Budget(seconds=seconds)).nearest.setting
    assert (changed.precision, changed.frames, changed.width) == ("bf16", 49, 1280)
    seconds = CARD.seconds(make_plan(Setting(960, 540, 25, stage1_steps=0)).flops)
    changed = ask(Setting(stage1_steps=0), Budget(seconds=seconds)).nearest.setting
    assert (changed.precision, changed.frames, changed.width) == ("bf16", 25, 960)


def test_an_impossible_budget_is_answered_in_a_sentence() -> None:
    for budget, limit in ((Budget(0.5 * GIB), "0.5 GiB"), (Budget(seconds=1e-6), "0.1 s")):
        advice = ask(Setting(), budget)
        assert advice.nearest is None
        text = advice_report(make_plan(Setting()), advice, budget, lambda _: CARD)
        assert text.startswith(f"This is beyond a budget of {limit}.\nNo setting is: even 540p (960x540), 1 frame, ")
        assert "Nano models" in text


@pytest.mark.parametrize("wrong", [{"memory": 0.0}, {"seconds": -1.0}, {"memory": math.nan}])
def test_a_budget_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        Budget(**wrong)


def test_report_names_the_card_the_peak_and_where_the_time_goes() -> None:
    plan = make_plan(Setting(960, 540, stage1_steps=0))
    text = report(plan, CARD)
    for phase in plan.phases:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{phase.name} ")]
        assert size(phase.memory) in line and duration(CARD.seconds(phase.flops)) in line
    (card,) = [int(line.split()[4]) for line in text.splitlines() if line.startswith("Fits a card with")]
    assert make_plan(on_card(plan.setting, card * GIB)).memory + RESERVED <= card * GIB < plan.memory + RESERVED
    assert plan.peak.name in text
    assert "a fast card" in text


def test_numbers_for_people() -> None:
    sizes = (5.2 * GIB, GIB, 0.5 * GIB, 3 * 2**20)
    assert [size(count) for count in sizes] == ["5.2 GiB", "1.0 GiB", "512 MiB", "3 MiB"]
    times = (0.01, 9.4, 59.6, 125, 12_000, 300_000)
    assert [duration(time) for time in times] == ["0.1 s", "9.4 s", "1 min 0 s", "2 min 5 s", "3 h 20 min", "3 days"]
    assert describe(Setting(640, 360, 1, 0)) == "640x360, 1 frame, 4 steps, official models in bf16"


def test_calibration_foretells_a_run() -> None:
    rates = calibrate("cpu", torch.float32, NANO_STAGE2, NANO_VAE, seconds=0.6)
    network, shape = FlashVideoDiT(NANO_STAGE2), (3, 32, 32)
    latent, text, nothing = torch.zeros(1, 16, *shape), torch.zeros(1, 226, NANO_STAGE2.text_dim), torch.zeros(1)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode():
            network(latent, nothing, text, degradation_step=675)
        taken.append(time.perf_counter() - started)
    # A busy machine is ten times slower at one moment than at the next; wrong units are off by a thousand.
    assert 0.05 < rates.seconds(dit_flops(NANO_STAGE2, shape)) / min(taken) < 20


def test_time_is_each_kind_of_work_at_its_own_rate() -> None:
    assert Rates("", 2.0, 4.0, 8.0).seconds(Flops(2.0, 4.0, 16.0)) == 1 + 1 + 2


def colours(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, found in picture.getcolors(1 << 24) if found == colour)


def test_bars_are_as_long_as_what_they_show() -> None:
    plan = make_plan(Setting(960, 540))
    picture = plot(plan, CARD, Budget(8 * GIB))
    weights, work = (sum(getattr(phase, name) for phase in plan.phases) for name in ("weights", "activations"))
    assert colours(picture, WORK) / colours(picture, WEIGHTS) == pytest.approx(work / weights, rel=0.1)
    assert colours(picture, TIME) > 0
    assert colours(picture, LIMIT) > colours(plot(plan, CARD), LIMIT)  # the line, beside its name in the legend


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_plan(parser.add_subparsers())
    options = parser.parse_args(["plan", *arguments])
    options.run(options)


SMALL = ("--model", "nano", "--width", "320", "--height", "176", "--frames", "5", "--dtype", "fp32", "--device", "cpu")


def test_command_writes_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(*SMALL, "--memory", "4", "--plot", str(tmp_path / "plan.png"))
    text = capsys.readouterr().out
    assert text.startswith("FlashVideo plan: 320x176, 5 frames, 50 + 4 steps, Nano models in fp32\n")
    assert "This is within a budget of 4 GiB." in text
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG"


def test_command_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    command(*SMALL, "--seconds", "1000000", "--stage1-steps", "0", "--json")
    result = json.loads(capsys.readouterr().out)
    plan = make_plan(Setting(320, 176, 5, 0, precision="fp32", networks=NANO))
    assert result["memory_bytes"] == round(plan.memory)
    assert [phase["name"] for phase in result["phases"]] == [phase.name for phase in plan.phases]
    assert result["budget"]["fits"] is True
    assert result["seconds"] == pytest.approx(sum(phase["seconds"] for phase in result["phases"]))


def test_command_plans_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file(build_nano(0)["stage2"], tmp_path / "any name.safetensors")
    command(*SMALL[2:], "--model", "nano", str(tmp_path / "any name.safetensors"), "--stage1-steps", "0", "--json")
    stage2 = next(phase for phase in json.loads(capsys.readouterr().out)["phases"] if phase["name"] == "stage II")
    assert sum(stage2["flops"].values()) == (dit_flops(NANO_STAGE2, (2, 22, 40)) * 8).total


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--width", "0"), "width must be 1 to 16384; got 0."),
        (("--memory", "-1"), "the budget's memory must be more than 0"),
        (("--device", "nonsense"), "There is no device 'nonsense' here"),
        (("--plot", "plan.jpg"), "must end in .png"),
        (("--plot", "no folder/plan.png"), "There is no folder no folder to write to."),
    ],
)
def test_command_refuses_before_it_measures(wrong: tuple[str, ...], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        command(*SMALL, *wrong)


def test_official_networks_are_the_default() -> None:
    assert Setting().networks is OFFICIAL
