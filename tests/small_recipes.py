"""Training recipes that end in seconds: config files for every network."""

from __future__ import annotations

from pathlib import Path

LOOP = """
[loop]
steps = 3
bf16_cpu = false
learning_rate = 1e-3
warmup = 1
log_every = 1
validate_every = 3
checkpoint_every = 2
"""
CLIPS = "height = 32\nwidth = 48\nframes = 5\nclips = 2\nvalidation_clips = 1\n"
SMALL_VAE = """
[model]
base_channels = 8
channel_multipliers = [1, 1, 1, 1]
encoder_blocks = 1
decoder_blocks = 1
"""
CROPS = """
[[crops]]
render = [16, 24]
size = [16, 16]
frames = 5
clips = 2
"""
VALIDATION = """
[[validation]]
name = "small"
size = [16, 24]
frames = 5
clips = 2
"""
VAE = f"{SMALL_VAE}{LOOP}\n[loss]{CROPS}{VALIDATION}"
TEXT = f"batch = 2\nvocabulary_captions = 300\nvalidation_captions = 4\n{LOOP}"
STAGE1 = f"batch = 2\n[clips]\n{CLIPS}{LOOP}[sheet]\ncount = 1\nsteps = 3\n"
STAGE2 = (
    f"{LOOP}[network]\ncheckpoint_blocks = true\n[degradation]\ncoded_probability = 0.5\n"
    "[pixels]\nweight = 0.5\nwindow = 1\nedge = 0\n[pixels.terms]\nmotion = 1.0\n"
    "[[phases]]\nuntil = 1\nbatch = 1\nwindow = [1, 3]\nlengths = [1, 2]\n"
    f"[phases.clips]\n{CLIPS.replace('32', '16')}scene = [32, 64]\n"
    f"[[phases]]\nuntil = 3\nbatch = 2\n[phases.clips]\n{CLIPS}"
)


def head(out: Path | str, **values: Path | str) -> str:
    """The first lines of a config: its run's folder, and more."""
    values = {"out": out, **values}
    return "seed = 1\n" + "".join(f'{name} = "{Path(value).as_posix()}"\n' for name, value in values.items())


def write_nano_recipes(folder: Path, runs: Path, fetched: Path) -> None:
    """Write the ten configs of `train nano`, whose runs are folders of `runs`; `fetched`: a library of real clips."""
    folder.mkdir(parents=True)
    text, vae = runs / "text" / "text_encoder.safetensors", runs / "vae" / "vae.safetensors"
    shared = {"cache": runs / "latents", "text": text}
    refiner = {"vae": runs / "vae_decoder" / "vae.safetensors", **shared}
    calm = STAGE2.replace("[network]", f'[network]\nweights = "{(runs / "stage2" / "stage2.safetensors").as_posix()}"')
    recipes = {
        "text": head(runs / "text") + TEXT,
        "vae": head(runs / "vae") + VAE,
        "vae_decoder": head(runs / "vae_decoder", start=vae) + "decoder_only = true\nlatent_noise = 0.1\n" + VAE,
        "stage1": head(runs / "stage1", vae=vae, **shared) + STAGE1,
        "stage2": head(runs / "stage2", **refiner) + STAGE2,
        "stage2_calm": head(runs / "stage2_calm", **refiner) + calm,
        **_footage_recipes(runs, shared, f'source = "real"\nreal = "{fetched.as_posix()}"\n'),
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.toml").write_text(recipe, encoding="utf-8")


def _footage_recipes(runs: Path, shared: dict[str, Path], source: str) -> dict[str, str]:
    """The recipes for real footage; `source`: lines of `[clips]`."""
    drawn, whole = runs / "vae_decoder" / "vae.safetensors", runs / "vae_footage" / "vae.safetensors"
    sizes = {"base_channels = 8": "base_channels = 16", "[16, 16]": "[16, 32]", "[16, 24]": "[16, 32]"}
    wide = VAE
    for name, value in sizes.items():
        wide = wide.replace(name, value)
    vae = f"[clips]\n{source}{wide}".replace("[loss]", "[loss]\nsquare = 6.0")
    refiner, text = runs / "stage2_footage" / "stage2.safetensors", shared["text"]
    refined = f'[refined]\nshare = 1.0\nfactor = 2\nsteps = 1\nstage2 = "{refiner.as_posix()}"\n'

    def stage2(name: str, start: Path, vae: Path) -> str:
        network = f'[network]\nblocks = 5\nweights = "{start.as_posix()}"'
        recipe = STAGE2.replace("[network]", network).replace("[phases.clips]\n", f"[phases.clips]\n{source}")
        return head(runs / name, vae=vae, **shared) + recipe

    return {
        "vae_footage": head(runs / "vae_footage", start=drawn, latents_like=drawn) + vae,
        "stage2_footage": stage2("stage2_footage", runs / "stage2_calm" / "stage2.safetensors", whole),
        "vae_footage_decoder": head(runs / "vae_footage_decoder", start=whole)
        + f'decoder_only = true\n{refined}text = "{text.as_posix()}"\n{vae}',
        "stage2_footage_refined": stage2(
            "stage2_footage_refined", refiner, runs / "vae_footage_decoder" / "vae.safetensors"
        ),
    }
