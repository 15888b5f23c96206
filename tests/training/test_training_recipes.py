"""Every training recipe from nothing to files that load, and its pieces: latents on disk, LoRA, text, export."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small_recipes import CLIPS, LOOP, STAGE1, STAGE2, TEXT, VAE, head
from torch import Tensor, nn

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.commands.main import main
from flashvideo.config import NANO_STAGE1, NANO_TEXT_ENCODER, VAEConfig
from flashvideo.dit import FlashVideoDiT, attention_sdpa
from flashvideo.errors import CommandError
from flashvideo.t5 import T5Tokens, load_encoder
from flashvideo.training.config import LoopSettings
from flashvideo.training.data.clip_library import ClipLibrary, Sizes
from flashvideo.training.data.decoding import Decoded
from flashvideo.training.data.latents import SHARD, ClipSettings, LatentCache
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.checkpointing import BEST, LAST, load_state
from flashvideo.training.loop.metrics import MetricsFile
from flashvideo.training.randomness import generator_for
from flashvideo.training.rows import Rows
from flashvideo.training.tasks.latent_scale import fold_latent_scale, scale_towards
from flashvideo.training.tasks.lora import add_lora, lora_state, merged_state
from flashvideo.training.tasks.losses import Network, stage1_loss
from flashvideo.training.tasks.networks import NetworkSettings, as_called, attention_products, make_network
from flashvideo.training.tasks.stage1 import Layout, ShortClips, Stage1Settings, _spread_timesteps
from flashvideo.training.tasks.text import TextSettings, TextTask, fresh_encoder, text_metadata
from flashvideo.training.tasks.vae import initialise
from flashvideo.vae import VideoVAE


def train(kind: str, recipe: str, folder: Path, *options: str) -> None:
    """Run the command line on a config of this text, in a run's folder named after its kind."""
    config = folder / f"{kind}.toml"
    config.write_text(recipe)
    out = str(folder / kind)
    assert main(["train", kind, "--config", str(config), "--out", out, "--device", "cpu", *options]) == 0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with an untrained VAE and text encoder."""
    folder = tmp_path / "models"
    folder.mkdir()
    vae = VideoVAE(VAEConfig(8, (1, 1, 1, 1), 1, 1, norm_groups=8))
    initialise(vae, seed=1)
    save_file(vae.state_dict(), folder / "vae.safetensors")
    save_file(fresh_encoder(1).weights(), folder / "text_encoder.safetensors")
    return folder


@torch.no_grad()
def test_folding_the_latent_scale_changes_latents_and_nothing_else() -> None:
    vae = VideoVAE(VAEConfig(8, (1, 1, 1, 1), 1, 1, norm_groups=8))
    initialise(vae, seed=1)
    video = torch.randn(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0))
    before = vae.encode(video)
    decoded = vae.decode(before.mean)
    deviation = torch.linspace(0.1, 5, 16)
    fold_latent_scale(vae, deviation)
    after, scale = vae.encode(video), deviation[None, :, None, None, None]
    assert torch.allclose(after.mean * scale, before.mean, atol=1e-5)
    assert torch.allclose((after.logvar / 2).exp() * scale, (before.logvar / 2).exp(), rtol=1e-4)
    assert (vae.decode(after.mean) - decoded).abs().max() <= 1e-4
    with pytest.raises(TrainingError, match="constant"):
        fold_latent_scale(vae, torch.zeros(16))


@torch.no_grad()
def test_latents_are_scaled_to_those_that_stage_2_knows() -> None:
    known, vae = (VideoVAE(VAEConfig(8, (1, 1, 1, 1), 1, 1, norm_groups=8)) for _ in range(2))
    initialise(known, seed=1)
    vae.load_state_dict(known.state_dict())
    deviation = torch.linspace(0.1, 5, 16)
    fold_latent_scale(vae, deviation)
    clips = [torch.randn(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    torch.testing.assert_close(scale_towards(vae, known, clips), 1 / deviation)
    last = vae.encoder.conv_out.conv
    last.weight[0], last.bias[0] = -last.weight[0], -last.bias[0]
    with pytest.raises(TrainingError, match="a latent channel has nothing in common"):
        scale_towards(vae, known, clips)


@torch.no_grad()
def test_lora_starts_as_the_network_and_merges_into_one() -> None:
    dit = make_network(NetworkSettings(), 1, 1, torch.device("cpu"))
    nn.init.normal_(dit.proj_out.weight, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 7, NANO_STAGE1.text_dim, generator=generator)
    inputs = torch.randn(1, 16, 1, 4, 4, generator=generator), torch.tensor([500.0]), text
    plain = dit(*inputs)
    names = set(dit.state_dict())
    add_lora(dit, 4, seed=1)
    assert torch.equal(dit(*inputs), plain)
    learning = [name for name, parameter in dit.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 6 * NANO_STAGE1.num_layers
    for name, parameter in dit.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.3, generator=generator)
    merged = merged_state(dit)
    assert set(merged) == names
    adapted = dit(*inputs)
    assert (adapted - plain).abs().max() > 1e-2
    assert (load_dit(merged)(*inputs) - adapted).abs().max() <= 1e-4
    assert lora_state(dit)["diffusion_model.blocks.0.norm1.linear.lora_A.weight"].shape == (4, 64)


def test_a_latent_cache_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made: list[int] = []

    def make(index: int) -> tuple[dict[str, Tensor], str]:
        if index == SHARD + 2 and len(made) < SHARD + 3:
            made.append(-1)
            raise KeyboardInterrupt
        made.append(index)
        return {"latent": torch.full((2, 3), float(index))}, f"clip {index}"

    cache = LatentCache(tmp_path / "latents", SHARD + 5, make)
    with pytest.raises(KeyboardInterrupt):
        cache.fill()
    cache.fill()
    assert made == [*range(SHARD + 2), -1, *range(SHARD, SHARD + 5)]
    assert cache.batch([0, SHARD + 4])["latent"][:, 0, 0].tolist() == [0, SHARD + 4]
    assert cache.caption(SHARD + 1) == f"clip {SHARD + 1}"
    cache.fill()
    assert len(made) == SHARD + 8


def test_tokens_are_padded_and_cut_to_226(tokenizer: Path) -> None:
    tokens = T5Tokens(str(tokenizer))(["a red circle", "red " * 300])
    assert tokens.shape == (2, 226)
    assert tokens[0, :5].tolist() == [3, 5, 7, 1, 0]
    assert tokens[1, -2:].tolist() == [5, 1]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(CommandError, match="There is no tokenizer"):
        T5Tokens(str(tmp_path / "nowhere.json"))


def test_a_text_encoder_is_read_as_it_was_written(tmp_path: Path) -> None:
    encoder = fresh_encoder(3)
    save_file(encoder.weights(), tmp_path / "t5.safetensors")
    again = load_encoder(tmp_path / "t5.safetensors")
    tokens = torch.randint(0, 32128, (2, 226), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(tokens), again(tokens))
    assert again(tokens).shape[2] == NANO_TEXT_ENCODER.d_model
    assert text_metadata(5)["flashvideo.step"] == "5"


def test_the_text_encoder_must_tell_each_token_and_its_neighbours_within_the_text(
    tokenizer: Path, tmp_path: Path
) -> None:
    loop = LoopSettings(steps=1, learning_rate=1e-3)
    settings = TextSettings(1, tmp_path, loop, 2, vocabulary_captions=300, tokenizer=str(tokenizer))
    task = TextTask(settings, torch.device("cpu"))
    tokens = task.data.tokens(["red circle"])  # red 5, circle 7, </s> 1, padding 0
    guesses, targets = task._read(tokens)
    known = sorted({int(token) for token in torch.unique(task.data[0]["tokens"])} | {0, 1, 5, 7})
    assert guesses.shape == (3 * 6, task.description["tokens"])
    place = {token: int(task._places[token]) for token in known}
    outside = -100
    assert targets.tolist() == [
        place.get(token, outside) for token in (-1, -1, -1, 5, 7, 1, -1, -1, 5, 7, 1, 0, -1, 5, 7, 1, 0, 0)
    ]
    loss = task.loss({"tokens": tokens}, Rows.whole(0, 1))["loss"]
    assert loss.item() == pytest.approx(math.log(task.description["tokens"]))


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_timesteps_are_spread_over_a_batch_and_a_step_by_their_power(power: float) -> None:
    drawn = torch.stack([_spread_timesteps(16, torch.Generator().manual_seed(seed), power) for seed in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert (drawn[:, :-1] <= drawn[:, 1:]).all()  # one from each part
    for part in (250, 650):
        wanted = (part / 1000) ** (1 / power)  # of a uniform number to that power
        assert float((drawn < part).float().mean()) == pytest.approx(wanted, abs=0.01)
    batches = [_spread_timesteps(4, torch.Generator().manual_seed(part), 1.0, part, 3) for part in range(3)]
    assert all((batch // 250).tolist() == [0, 1, 2, 3] for batch in batches)
    assert sorted((torch.cat(batches) / 1000 * 12).int().tolist()) == list(range(12))  # even in the step as well


def test_all_four_recipes_run_one_after_the_other(tokenizer: Path, tmp_path: Path) -> None:
    models, extra = tmp_path / "models", ("--tokenizer", str(tokenizer))
    vae, text = models / "vae.safetensors", models / "text_encoder.safetensors"
    shown = {"vae": vae, "text": text, "cache": tmp_path / "cache"}
    recipes = {
        "vae": head("unused") + VAE,
        "text": head("unused") + TEXT,
        "stage1": head("unused", **shown) + "train_text = true\n" + STAGE1,
        "stage2": head("unused", **shown) + STAGE2,
    }
    for kind, recipe in recipes.items():
        train(kind, recipe, tmp_path, "--steps", "2", *extra)
        train(kind, recipe, tmp_path, "--resume", *extra)
        train(kind, recipe, tmp_path, "--export", str(models), *extra)
        run = tmp_path / kind
        assert {LAST, BEST, "metrics.jsonl", "metrics.png"} <= {path.name for path in run.iterdir()}
        assert Image.open(run / "sheets" / "000003.png").size[0] > 0
        rows = MetricsFile(run / "metrics.jsonl").rows()
        assert rows[-1]["step"] == 3
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert any("pixels" in row for row in rows) == (kind == "stage2")
    assert load_vae(models / "vae.safetensors").config.norm_groups == 8
    for stage in (1, 2):
        assert load_dit(models / f"stage{stage}.safetensors", stage=stage).config.stage == stage
    with safe_open(models / "vae.safetensors", framework="pt") as file:
        assert file.metadata()["flashvideo.stage"] == "vae"
        assert file.metadata()["flashvideo.trained"] == "true"
        assert float(file.metadata()["flashvideo.psnr"]) > 0


def test_stage_two_with_lora_learns_and_writes_adapters_alone(models: Path, tokenizer: Path, tmp_path: Path) -> None:
    recipe = (
        f'seed = 1\nout = "unused"\ncache = "{tmp_path}/cache"\nvae = "{models}/vae.safetensors"\n'
        f'text = "{models}/text_encoder.safetensors"\n{LOOP}[network]\nlora_rank = 4\n'
        f"[[phases]]\nuntil = 3\nbatch = 2\n[phases.clips]\n{CLIPS}"
    )
    train("stage2", recipe, tmp_path, "--tokenizer", str(tokenizer))
    train("stage2", recipe, tmp_path, "--tokenizer", str(tokenizer), "--export", str(models))
    with safe_open(models / "stage2_lora.safetensors", framework="pt") as file:
        assert "diffusion_model.blocks.0.q.lora_B.weight" in file.keys()  # noqa: SIM118
    assert all("lora_" in name for name in load_state(tmp_path / "stage2" / LAST)["model"])


def test_stage_one_learns_with_a_frozen_text_encoder_and_short_contexts_and_stills_first(
    models: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(dit: Network, latent: Tensor, context: Tensor, *rest: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((context.shape[1], latent.shape[2]))
        return stage1_loss(dit, latent, context, *rest)

    monkeypatch.setattr("flashvideo.training.tasks.stage1.stage1_loss", noted)
    recipe = (
        f'seed = 1\nout = "unused"\ncache = "{tmp_path}/cache"\nvae = "{models}/vae.safetensors"\n'
        f'text = "{models}/text_encoder.safetensors"\nbatch = 2\n[clips]\n{CLIPS}{LOOP}[sheet]\ncount = 1\nsteps = 3\n'
        "[short_text]\ntokens = 9\nuntil = 2\n[short_clips]\nlengths = [1]\nuntil = 1\n"
    )
    train("stage1", recipe, tmp_path, "--tokenizer", str(tokenizer))
    assert seen == [(9, 1), (9, 2), (226, 2)]
    learnt = load_state(tmp_path / "stage1" / LAST)["model"]
    assert all(name.startswith("dit.") for name in learnt)


def test_stage_one_learns_layouts_that_no_file_keeps(models: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Stopped and gone on with, it learns the same to the bit."""
    states = []
    for name, goes in (("straight", [[]]), ("resumed", [["--steps", "2"], ["--resume"]])):
        (tmp_path / name).mkdir()
        recipe = (
            f'seed = 1\nout = "unused"\ncache = "{tmp_path}/cache"\nvae = "{models}/vae.safetensors"\n'
            f'text = "{models}/text_encoder.safetensors"\nbatch = 2\nlayout_weight = 0.5\n'
            f"[clips]\n{CLIPS}{LOOP}[sheet]\ncount = 1\nsteps = 3\n[short_clips]\nlengths = [1, 2]\nuntil = 3\n"
        )
        for options in goes:
            train("stage1", recipe, tmp_path / name, "--tokenizer", str(tokenizer), *options)
        states.append(load_state(tmp_path / name / "stage1" / LAST)["model"])
    straight, resumed = states
    assert "layout.read.weight" in straight
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    rows = MetricsFile(tmp_path / "straight" / "stage1" / "metrics.jsonl").rows()
    assert rows[0]["layout"] == pytest.approx(math.log(2))  # it starts knowing nothing
    assert all(row["loss"] == pytest.approx(row["v"] + 0.5 * row["layout"]) for row in rows if "layout" in row)

    shutil.rmtree(tmp_path / "cache")
    train("stage1", recipe, tmp_path / "straight", "--tokenizer", str(tokenizer), "--export", str(models))
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the held-out clips: an export judges, and learns nothing
    assert load_dit(models / "stage1.safetensors", stage=1).config.stage == 1


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A library of three clips and three photographs, of which i.mp4 and i.png are held out."""
    library = ClipLibrary.create(tmp_path / "real", Sizes(384, 1024, 300))
    for number, name in enumerate(("a.mp4", "b.mp4", "i.mp4", "a.png", "b.png", "i.png")):
        shape = (7 if name.endswith("mp4") else 1, 80, 120, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_for(number)).numpy()
        library.add(name, str(number), Decoded(frames, 15.0), source="test", licence="MIT")
    library.caption([{"a.mp4": "a red circle moves left"}])
    return library.folder


def test_stages_learn_from_drawn_scenes_real_clips_and_moving_photographs_at_once(
    models: Path, real: Path, tokenizer: Path, tmp_path: Path
) -> None:
    mixed = f'{CLIPS.replace("clips = 2", "clips = 12", 1)}source = "mixed"\nreal = "{real.as_posix()}"\n'
    shown = {
        "vae": models / "vae.safetensors",
        "text": models / "text_encoder.safetensors",
        "cache": tmp_path / "cache",
    }
    recipes = {
        "stage1": head("unused", **shown) + "layout_weight = 0.5\n" + STAGE1.replace(CLIPS, mixed),
        "stage2": head("unused", **shown) + STAGE2.replace(CLIPS, mixed),
    }
    for kind, recipe in recipes.items():
        train(kind, recipe, tmp_path, "--steps", "2", "--tokenizer", str(tokenizer))
        train(kind, recipe, tmp_path, "--resume", "--tokenizer", str(tokenizer))
        rows = MetricsFile(tmp_path / kind / "metrics.jsonl").rows()
        assert rows[-1]["step"] == 3
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert any("layout" in row for row in rows) == (kind == "stage1")


@pytest.mark.parametrize(("patch", "seen"), [(1, 3), (2, 3), (2, 1)])
def test_a_layouts_cells_are_those_under_its_tokens(patch: int, seen: int) -> None:
    rows, columns, cells = 2, 3, 2 * patch
    layout = torch.rand(1, 9, rows * cells, columns * cells, generator=torch.Generator().manual_seed(0))
    frames = [layout[0, :1], layout[0, 1:5], layout[0, 5:]][:seen]  # that share a latent frame
    tokens = torch.stack(
        [
            frame[:, cells * row : cells * (row + 1), cells * column : cells * (column + 1)].mean(0).flatten()
            for frame in frames
            for row in range(rows)
            for column in range(columns)
        ]
    )
    head = Layout(cells**2, patch)
    nn.init.eye_(head.read.weight)
    least = -(tokens * tokens.log() + (1 - tokens) * (1 - tokens).log()).mean()
    assert head(tokens.logit()[None], layout).item() == pytest.approx(least.item(), rel=1e-5)
    assert head(tokens.logit()[None].roll(1, dims=1), layout).item() > 1.1 * least.item()
    # A clip whose layout isn't known changes nothing, and alone gives nothing to learn.
    unknown = torch.full_like(layout, torch.nan)
    both = tokens.logit()[None].repeat(2, 1, 1)
    assert head(both, torch.cat((unknown, layout))).item() == pytest.approx(least.item(), rel=1e-5)
    nothing = head(both[:1], unknown)
    nothing.backward()
    assert nothing.item() == 0
    assert not head.read.weight.grad.any()


@pytest.mark.parametrize("clips", [{"scene": (64, 96)}, {"folder": "videos"}])
def test_layouts_are_of_whole_procedural_scenes(clips: dict, tmp_path: Path) -> None:
    settings = ClipSettings(height=32, width=48, frames=5, clips=2, **clips)
    with pytest.raises(TrainingError, match="layout_weight must be 0 for clips that aren't whole procedural scenes"):
        Stage1Settings(1, tmp_path, tmp_path, tmp_path, settings, LoopSettings(1, 1e-3), 1, layout_weight=0.1)


def test_steps_see_beginnings_of_clips_of_every_length_and_whole_ones_in_the_end() -> None:
    short = ShortClips((1, 3, 9), until=50)
    drawn = [short.length(5, step, torch.Generator().manual_seed(step)) for step in range(100)]
    assert set(drawn[:50]) == {1, 3, 5}
    assert set(drawn[50:]) == {5}
    with pytest.raises(TrainingError, match=r"lengths must be 1 or more; got \[2, 0\]"):
        ShortClips((2, 0))


def test_learning_attention_is_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(3))
    torch.testing.assert_close(attention_products(q, k, v, 3), attention_sdpa(q, k, v, 3), rtol=0, atol=1e-5)


def test_a_network_that_learns_says_what_it_says_in_use() -> None:
    torch.manual_seed(0)
    dit = FlashVideoDiT(NANO_STAGE1)
    inputs = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 7, NANO_STAGE1.text_dim)
    seen: list[int] = []
    learning = as_called(dit, watch=lambda index, tokens: seen.append(index))(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(learning, dit(*inputs), rtol=0, atol=1e-5)
    assert seen == list(range(NANO_STAGE1.num_layers))


def test_a_missing_vae_is_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "stage1.toml"
    config.write_text(
        f'seed = 1\nout = "{tmp_path}/run"\ncache = "c"\nvae = "none.safetensors"\ntrain_text = true\nbatch = 1\n'
        f"[clips]\n{CLIPS}{LOOP}"
    )
    assert main(["train", "stage1", "--config", str(config), "--tokenizer", str(tokenizer), "--device", "cpu"]) == 1
    assert "none.safetensors: there is no such file." in capsys.readouterr().err
