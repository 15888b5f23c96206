"""Stage II's training data and losses: pieces of clips, references, and the pixels that latents show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_tokenizer
from torch import Tensor

from flashvideo.checkpoints import load_dit
from flashvideo.config import STAGE2_LATENT_SCALE
from flashvideo.nano import NANO_FOLDER
from flashvideo.training.config import LoopSettings
from flashvideo.training.data.latents import ClipSettings, ScenePieces
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.checkpointing import LARGE
from flashvideo.training.loop.metrics import psnr
from flashvideo.training.rows import Rows
from flashvideo.training.tasks import stage2 as stage2_module
from flashvideo.training.tasks.losses import FlowStep, Network, flow_step, own_flow_step
from flashvideo.training.tasks.networks import NetworkSettings, export_network, make_network, round_as_stored
from flashvideo.training.tasks.pixels import PixelSettings, visible_loss
from flashvideo.training.tasks.stage2 import (
    DegradationSettings,
    PairData,
    Phase,
    Stage2Settings,
    Stage2Task,
    choose_reference,
)


def test_a_phase_sees_pieces_of_its_clips_everywhere_in_them() -> None:
    """References and clean clips are cut alike: a latent pixel's number says where it was."""
    clips = ClipSettings(height=48, width=64, frames=9, clips=2)
    phase = Phase(10, 2, clips, window=(4, 5), lengths=(1, 3))
    latent = torch.arange(3 * 6 * 8).view(1, 1, 3, 6, 8).expand(2, 16, 3, 6, 8)
    pieces = [latent[phase.piece(latent, torch.Generator().manual_seed(seed))] for seed in range(600)]
    assert {piece.shape for piece in pieces} == {(2, 16, 1, 4, 5), (2, 16, 3, 4, 5)}
    corners = {8 * row + column for row in range(3) for column in range(4)}
    begins = {frames: {int(p[0, 0, 0, 0, 0]) for p in pieces if p.shape[2] == frames} for frames in (1, 3)}
    assert begins[3] == corners
    assert begins[1] == {48 * frame + corner for frame in range(3) for corner in corners}
    whole = dataclasses.replace(phase, window=(0, 0), lengths=())
    assert latent[whole.piece(latent, torch.Generator())].shape == latent.shape
    for share in (0.5, 1.0):
        often = dataclasses.replace(phase, lengths=(1,), from_start=share)
        firsts = [often.piece(latent, torch.Generator().manual_seed(seed))[1].start == 0 for seed in range(600)]
        assert sum(firsts) / 600 == pytest.approx(share + (1 - share) / 3, abs=0.06)
    with pytest.raises(TrainingError, match="from_start must be 0 to 1; got 2"):
        dataclasses.replace(phase, from_start=2)
    with pytest.raises(TrainingError, match=r"window must be 1 to 6 by 1 to 8 latent pixels; got \[7, 5\]"):
        Phase(10, 2, clips, window=(7, 5))
    with pytest.raises(TrainingError, match=r"lengths must be 1 or more; got \[0\]"):
        Phase(10, 2, clips, lengths=(0,))


def test_references_are_chosen_by_their_probabilities() -> None:
    entries = {
        name: torch.full((4, 1, 1, 1, 1), value)
        for name, value in (("clean", 0.0), ("weak", 1.0), ("strong", 2.0), ("coded", 3.0))
    } | {"context": torch.zeros(4, 1, 1)}
    chance = torch.tensor([0.1, 0.29, 0.31, 0.71])
    settings = DegradationSettings(strong_probability=0.3, coded_probability=0.4)

    def chosen(settings: DegradationSettings) -> list[float]:
        return choose_reference(entries, settings, chance)["reference"].flatten().tolist()

    assert chosen(settings) == [2, 2, 3, 1]
    assert chosen(dataclasses.replace(settings, coded_probability=0.0)) == [2, 2, 1, 1]
    assert chosen(dataclasses.replace(settings, pixel=False)) == [0, 0, 0, 0]
    with pytest.raises(TrainingError, match="at most 1 together"):
        DegradationSettings(strong_probability=0.7, coded_probability=0.4)
    with pytest.raises(TrainingError, match=r"must be 0 or more, .* got -0\.1 and 0\.4"):
        DegradationSettings(strong_probability=-0.1, coded_probability=0.4)
    with pytest.raises(TrainingError, match="latent_power must be above 0; got 0"):
        DegradationSettings(latent_power=0)
    for steps in ((750, 600), (600, 1000), (-1, 600)):
        with pytest.raises(TrainingError, match="latent_steps must be two of 0 to 999, the smaller first"):
            DegradationSettings(latent_steps=steps)
    for factor in ((0.5, 4.0), (4.0, 2.0)):
        with pytest.raises(TrainingError, match="factor must be two numbers of 1 or more"):
            DegradationSettings(factor=factor)


def test_a_piece_is_cut_where_a_degraded_whole_is() -> None:
    pieces = ClipSettings(32, 48, 5, clips=2, scene=(64, 96)).open("train", 1)
    assert isinstance(pieces, ScenePieces)
    whole, _ = pieces.scenes.sample(3)
    piece, _ = pieces.sample(3)
    assert torch.equal(pieces.cut(whole, 3), piece)


def on_nano(tokenizer: Path, folder: Path, phase: Phase, **settings: Any) -> Stage2Settings:
    """Settings of a stage II that learns with Nano's VAE and text encoder."""
    return Stage2Settings(
        seed=1,
        out=folder,
        cache=folder / "cache",
        vae=NANO_FOLDER / "vae.safetensors",
        text=str(NANO_FOLDER / "text_encoder.safetensors"),
        tokenizer=str(tokenizer),
        loop=LoopSettings(1, 1e-3),
        phases=(phase,),
        **settings,
    )


@torch.no_grad()
def test_a_coded_draft_is_of_the_piece_that_is_learnt(tokenizer: Path, tmp_path: Path) -> None:
    """Blurred as a draft is, and at its place: nearer to its own clean piece than to any other."""
    phase = Phase(1, 1, ClipSettings(64, 64, 5, clips=4, validation_clips=1, scene=(128, 192)))
    settings = on_nano(tokenizer, tmp_path, phase, degradation=DegradationSettings(coded_probability=0.5))
    task = Stage2Task(settings, torch.device("cpu"))
    clips = task.clips[0]
    clips.fill()
    entries = clips.batch(range(4))
    clean, weak, coded = (task.vae.decode(entries[name]) for name in ("clean", "weak", "coded"))
    for index in range(4):
        own = psnr(coded[index], clean[index])
        others = [psnr(coded[index], clean[other]) for other in range(4) if other != index]
        assert own > max(others) + 2
        assert psnr(coded[index], weak[index]) > own  # what it lacks is what the weak degradation takes
        moved = psnr(coded[index][..., 8:, 8:], clean[index][..., :-8, :-8])
        assert moved < own


@pytest.fixture(scope="module")
def pixel_task(tmp_path_factory: pytest.TempPathFactory) -> Stage2Task:
    """Stage II on pieces of two clips, with Nano's VAE."""
    folder = tmp_path_factory.mktemp("pixels")
    write_tokenizer(folder / "tokenizer.json")
    phase = Phase(1, 2, ClipSettings(64, 80, 9, clips=2, validation_clips=1), window=(7, 8), lengths=(2, 3))
    settings = on_nano(folder / "tokenizer.json", folder, phase, pixels=PixelSettings(1.0, window=6, edge=1))
    task = Stage2Task(settings, torch.device("cpu"))
    task.clips[0].fill()
    return task


def test_pixels_are_of_the_place_that_their_latents_show(pixel_task: Stage2Task) -> None:
    """Only where a piece begins with its clip: the VAE's first latent frame is one frame, all others are four."""
    found = set()
    for index in range(30):
        batch = pixel_task.data[index]
        frames = batch["clean"].shape[2]
        begins = any(
            torch.equal(batch["clean"][0], entry["clean"][:, :frames, row : row + 7, column : column + 8].float())
            for entry in (pixel_task.clips[0][clip] for clip in range(2))
            for row in range(2)
            for column in range(3)
        )
        assert ("video" in batch) == begins
        found.add((frames, begins))
    assert found == {(3, True), (2, True), (2, False)}
    later = dataclasses.replace(pixel_task.settings, pixels=dataclasses.replace(pixel_task.settings.pixels, since=10))
    data = PairData(later, pixel_task.clips)
    assert not any("video" in data[index] for index in range(10))
    assert any("video" in data[index] for index in range(10, 30))
    batch = next(batch for batch in map(pixel_task.data.__getitem__, range(30)) if "video" in batch)
    row, column = batch["place"].tolist()
    shown = pixel_task.vae.decode(batch["clean"])[..., 8 * row :, 8 * column :][..., :48, :48]
    assert shown.shape == batch["video"].shape
    assert psnr(shown, batch["video"]) > psnr(shown[..., 8:, 8:], batch["video"][..., :-8, :-8]) + 3


def test_what_pixels_say_of_a_latent_reaches_it_and_is_best_for_the_clean_one(pixel_task: Stage2Task) -> None:
    batch = next(batch for batch in map(pixel_task.data.__getitem__, range(30)) if "video" in batch)
    clean, reference = (batch[name] * STAGE2_LATENT_SCALE for name in ("clean", "reference"))
    shown = batch["video"], batch["place"], pixel_task.settings.pixels
    guess = reference.clone().requires_grad_()
    worse = visible_loss(pixel_task.vae.network.decode, guess / STAGE2_LATENT_SCALE, *shown)
    assert visible_loss(pixel_task.vae.network.decode, clean / STAGE2_LATENT_SCALE, *shown).item() < worse.item()
    worse.backward()
    row, column = batch["place"].tolist()
    touched = guess.grad.abs().sum((0, 1, 2)) > 0
    assert touched[row : row + 6, column : column + 6].all()
    assert int(touched.sum()) == 36
    terms = pixel_task.loss(batch, Rows.whole(0, 2))
    assert terms["loss"].item() == pytest.approx((terms["velocity"] + terms["pixels"]).item())
    assert "score" in pixel_task.validate()


def test_with_a_detail_size_only_finer_errors_count(pixel_task: Stage2Task) -> None:
    """A cast of the whole picture costs much, and nothing where Finish Frames takes the cast's size from the draft."""
    batch = next(batch for batch in map(pixel_task.data.__getitem__, range(30)) if "video" in batch)
    network, place, all_sizes = pixel_task.vae.network, batch["place"], pixel_task.settings.pixels
    fine = dataclasses.replace(all_sizes, detail_size=9)
    row, column = place.tolist()
    with torch.no_grad():
        exact = network.decode(batch["clean"][..., row : row + 6, column : column + 6])
        stripes = 0.2 * (torch.arange(48) % 4 < 2)
        cast = {
            settings: visible_loss(network.decode, batch["clean"], exact + 0.2, place, settings)
            for settings in (all_sizes, fine)
        }
        detail = visible_loss(network.decode, batch["clean"], exact + stripes, place, fine)
    assert cast[all_sizes].item() == pytest.approx(0.2, abs=1e-4)
    assert cast[fine].item() < 1e-5
    assert detail.item() > 0.05
    with pytest.raises(TrainingError, match=r"\[pixels\] detail_size must be 5 to 1000 pixels; got 2"):
        dataclasses.replace(fine, detail_size=2)


def test_some_batches_learn_where_the_network_has_come_to(
    pixel_task: Stage2Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []

    def spy(own: bool) -> Callable[..., FlowStep]:
        step = own_flow_step if own else flow_step
        return lambda *arguments, **options: called.append(own) or step(*arguments, **options)

    monkeypatch.setattr(stage2_module, "flow_step", spy(False))
    monkeypatch.setattr(stage2_module, "own_flow_step", spy(True))
    batch = pixel_task.data[0]
    monkeypatch.setattr(pixel_task, "settings", dataclasses.replace(pixel_task.settings, own_steps=0.5))
    with torch.no_grad():
        losses = [pixel_task.loss(batch, Rows.whole(index, 2))["loss"] for index in range(12)]
    assert 2 <= sum(called) <= 10
    assert len(called) == 12
    assert all(loss.isfinite() for loss in losses)
    with pytest.raises(TrainingError, match="own_steps must be 0 to 1; got 2"):
        dataclasses.replace(pixel_task.settings, own_steps=2)


def test_a_deeper_network_begins_as_the_one_that_it_deepens() -> None:
    nano = make_network(NetworkSettings(str(NANO_FOLDER / "stage2.safetensors")), 2, 1, torch.device("cpu"))
    deep = make_network(NetworkSettings(str(NANO_FOLDER / "stage2.safetensors"), blocks=6), 2, 1, torch.device("cpu"))
    assert (nano.config.num_layers, deep.config.num_layers) == (4, 6)
    noise = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 16, 2, 6, 8, generator=noise), torch.randn(1, 226, 48, generator=noise)
    with torch.no_grad():
        shown = [dit(latent, torch.tensor([500.0]), text, degradation_step=torch.tensor([60])) for dit in (nano, deep)]
    assert torch.equal(*shown)
    deep(latent, torch.tensor([500.0]), text, degradation_step=torch.tensor([60])).square().mean().backward()
    new = [deep.blocks[index].ff_out.weight.grad.abs().max() > 0 for index in range(6)]
    assert all(new)
    with pytest.raises(TrainingError, match="blocks must be 4 or more, as many as the weights have; got 3"):
        make_network(NetworkSettings(str(NANO_FOLDER / "stage2.safetensors"), blocks=3), 2, 1, torch.device("cpu"))


def test_times_and_strengths_are_even_over_a_step_whoever_learns_its_rows(
    pixel_task: Stage2Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each sixth for the six rows of three batches, in a new order of strengths in each step."""
    drawn: list[list[float]] = []

    def noted(_: Network, degraded: Tensor, *rest: Tensor, shift: float) -> FlowStep:
        drawn.extend(zip(*(each.tolist() for each in rest[2:]), strict=True))
        return FlowStep(torch.zeros(()) * shift, degraded)

    settings = dataclasses.replace(
        pixel_task.settings,
        loop=LoopSettings(1, 1e-3, accumulate=3),
        degradation=DegradationSettings(latent_steps=(0, 599)),
    )
    monkeypatch.setattr(stage2_module, "flow_step", noted)
    monkeypatch.setattr(pixel_task, "settings", settings)
    batch = {name: value for name, value in pixel_task.data[0].items() if name in ("clean", "reference", "context")}
    orders = set()
    for step in range(5):
        for index in range(3 * step, 3 * step + 3):
            pixel_task.loss(batch, Rows.whole(index, 2))
        whole, drawn[:] = list(drawn), []
        times, strengths = (list(column) for column in zip(*whole, strict=True))
        assert sorted(int(6 * time) for time in times) == list(range(6))
        assert [int(2 * time) for time in times] == [0, 1] * 3
        order = [int(strength / 100) for strength in strengths]
        assert sorted(order) == list(range(6))
        orders.add(tuple(order))
        for index in range(3 * step, 3 * step + 3):
            for row in range(2):
                part = {name: value[row : row + 1] for name, value in batch.items()}
                pixel_task.loss(part, Rows(index, row, row + 1, 2))
        assert drawn == whole
        drawn.clear()
    assert len(orders) > 1


def test_pixels_beyond_a_piece_are_refused() -> None:
    phases = (Phase(1, 1, ClipSettings(64, 80, 9, clips=2), window=(7, 8)),)
    loop = LoopSettings(1, 1e-3)
    with pytest.raises(TrainingError, match="window must be at most 7, .* got 8"):
        Stage2Settings(1, Path(), Path(), Path(), "", loop, phases, pixels=PixelSettings(1.0, window=8))
    Stage2Settings(1, Path(), Path(), Path(), "", loop, phases, pixels=PixelSettings(1.0, since=1, window=8))
    with pytest.raises(TrainingError, match="leave something of a window of 4; got 2"):
        PixelSettings(1.0, window=4, edge=2)


def test_what_is_measured_is_what_a_file_of_8_bits_gives_back(tmp_path: Path) -> None:
    settings = NetworkSettings(eight_bits=True)
    network = make_network(settings, 2, 1, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    round_as_stored(network, settings)
    file = load_dit(export_network(tmp_path, network, settings, 1, {}), dtype=torch.float32, stage=2)
    measured = network.state_dict()
    assert all(torch.equal(weight, measured[name]) for name, weight in file.state_dict().items())
    changed = {name for name, weight in measured.items() if not torch.allclose(weight, before[name], rtol=2**-10)}
    assert changed == {name for name, weight in before.items() if weight.numel() >= LARGE}
    with pytest.raises(TrainingError, match="eight_bits is for whole networks, not for adapters"):
        NetworkSettings(eight_bits=True, lora_rank=4)
