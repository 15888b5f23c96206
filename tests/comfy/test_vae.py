"""FlashVideo's VAE in the stock encode and decode nodes of the real ComfyUI."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
BUILT_IN = "FlashVideo-Nano (built-in)"
LOADER = {"class_type": "FlashVideoVAELoader", "inputs": {"vae_name": BUILT_IN}}
TILES = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
NETWORK_TOLERANCE = 1e-4  # of latents
VIDEO_TOLERANCE = 2e-2  # of 0..255
ROUNDING = 1e-6  # of [0, 1], between two orders of the same float32 sums


@pytest.fixture()
def apply(run_prompt: Callable, values: dict, captured: dict) -> Callable[..., Any]:
    """The output of one node with a VAE from the loader, in the executor."""

    def run(node: str, inputs: dict[str, Any], vae_name: str = BUILT_IN) -> Any:
        graph = {"vae": {**LOADER, "inputs": {"vae_name": vae_name}}}
        wired: dict[str, Any] = {"vae": ["vae", 0]}
        for name, value in inputs.items():
            if isinstance(value, int):
                wired[name] = value
                continue
            stored = f"{name} {len(values)}"  # another name each time, or ComfyUI would take the last run's result
            values[stored] = value
            graph[name] = {"class_type": "TestValue", "inputs": {"name": stored}}
            wired[name] = [name, 0]
        graph["node"] = {"class_type": node, "inputs": wired}
        graph["end"] = {"class_type": "TestCapture", "inputs": {"value": ["node", 0], "name": node}}
        run_prompt(graph)
        return captured[node]

    return run


def clip_of(frames: int, height: int = 64, width: int = 96) -> Tensor:
    """A smooth moving pattern [T, H, W, 3]."""
    time, row, column = torch.meshgrid(
        torch.arange(frames) / 8, torch.linspace(0, 6, height), torch.linspace(0, 6, width), indexing="ij"
    )
    waves = torch.stack((row + time, column - time, row + column), dim=-1)
    return waves.sin() / 2 + 0.5


def latent_of(latents: int, rows: int = 8, columns: int = 12) -> dict[str, Tensor]:
    noise = torch.randn(1, 16, latents, rows, columns, generator=torch.Generator().manual_seed(latents))
    return {"samples": noise}


# The same numbers as the library and the official code


def test_stock_nodes_encode_and_decode_what_the_library_does(apply: Callable, submodule: Callable) -> None:
    network = submodule("flashvideo.checkpoints").load_vae(
        submodule("flashvideo.nano").nano_state("vae"), dtype=torch.float32
    )
    pixels = clip_of(21, 32, 48)
    latent = apply("VAEEncode", {"pixels": pixels})["samples"]
    frames = apply("VAEDecode", {"samples": {"samples": latent}})
    with torch.inference_mode():
        mean = network.encode(pixels.permute(3, 0, 1, 2)[None] * 2 - 1).mean
        video = network.decode(mean)[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1)
    assert torch.equal(latent, mean)
    assert frames.shape == pixels.shape
    assert (frames - video).abs().max() <= ROUNDING


@torch.inference_mode()
def test_the_official_file_gives_the_official_numbers(apply: Callable, vae_folder: Path) -> None:
    halves = [load_file(GOLDEN / f"vae_stored_weights_{half}.safetensors") for half in ("encoder", "decoder")]
    torch.save({"state_dict": {**halves[0], **halves[1], "loss.logvar": torch.zeros(1)}}, vae_folder / "3d-vae.pt")
    golden = load_file(GOLDEN / "vae_stored_io.safetensors")
    pixels = (golden["enc49.x"][0].permute(1, 2, 3, 0) + 1) / 2
    latent = apply("VAEEncode", {"pixels": pixels}, "3d-vae.pt")["samples"]
    assert (latent - golden["enc49.chunked.mean"]).abs().max() <= NETWORK_TOLERANCE
    for case, key in (("dec5", "dec5.chunked.video"), ("dec13", "dec13.video")):
        frames = apply("VAEDecode", {"samples": {"samples": golden[f"{case}.z"]}}, "3d-vae.pt")
        assert (frames * 255 - golden[key]).abs().max() <= VIDEO_TOLERANCE


@pytest.mark.parametrize("frames", [1, 5, 13, 17, 21])
def test_any_4n_plus_1_frames_keep_their_number_and_size(apply: Callable, frames: int) -> None:
    latent = apply("VAEEncode", {"pixels": clip_of(frames, 16, 8)})
    assert latent["samples"].shape == (1, 16, (frames + 3) // 4, 2, 1)
    assert apply("VAEDecode", {"samples": latent}).shape == (frames, 16, 8, 3)


# Tiles


@torch.inference_mode()
def test_tiles_cut_space_and_never_time(apply: Callable) -> None:
    latent, pixels = latent_of(4, 12, 4), clip_of(13, 96, 32)
    others = {**TILES, "temporal_size": 4096, "temporal_overlap": 8}
    decoded = apply("VAEDecodeTiled", {"samples": latent, **TILES})
    assert decoded.shape == (13, 96, 32, 3)
    assert torch.equal(decoded, apply("VAEDecodeTiled", {"samples": latent, **others}))
    encoded = apply("VAEEncodeTiled", {"pixels": pixels, **TILES})["samples"]
    assert encoded.shape == (1, 16, 4, 12, 4)
    assert torch.equal(encoded, apply("VAEEncodeTiled", {"pixels": pixels, **others})["samples"])


@torch.inference_mode()
def test_one_tile_that_holds_everything_equals_untiled(apply: Callable) -> None:
    latent, pixels, one = latent_of(4, 4, 6), clip_of(21, 32, 48), {**TILES, "tile_size": 512}
    whole = apply("VAEDecode", {"samples": latent})
    assert torch.equal(apply("VAEDecodeTiled", {"samples": latent, **one}), whole)
    whole = apply("VAEEncode", {"pixels": pixels})["samples"]
    assert torch.equal(apply("VAEEncodeTiled", {"pixels": pixels, **one})["samples"], whole)


@torch.inference_mode()
@pytest.mark.parametrize("node", ["VAEEncodeTiled", "VAEDecodeTiled"])
def test_tiles_give_what_the_whole_picture_gives(apply: Callable, node: str) -> None:
    if node == "VAEEncodeTiled":
        pixels = clip_of(21, 64, 104)
        whole = apply("VAEEncode", {"pixels": pixels})["samples"]
        tiled = apply(node, {"pixels": pixels, **TILES})["samples"]
    else:
        latent = latent_of(4, 6, 12)
        whole, tiled = apply("VAEDecode", {"samples": latent}), apply(node, {"samples": latent, **TILES})
    assert (tiled - whole).abs().max() <= NETWORK_TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_out_of_memory_falls_back_to_smaller_tiles_with_the_same_result(
    vae: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A residual block of latent pixels runs out of memory with more than 200 of them."""
    import comfy.model_management

    given = latent_of(1, 24, 20)["samples"] if way == "decode" else clip_of(1, 192, 160)
    whole = getattr(vae, way)(given)
    layer = getattr(vae.first_stage_model, f"{way}r").mid_block.resnets[0].conv1
    sizes = []

    def full(_module: object, args: tuple) -> None:
        sizes.append(tuple(args[0].shape[3:]))
        if args[0][0, 0, 0].numel() > 200:
            raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    handle = layer.register_forward_pre_hook(full)
    try:
        smaller = getattr(vae, way)(given)
    finally:
        handle.remove()
    assert sizes[0] == (24, 20) and 200 >= sizes[-1][0] * sizes[-1][1] > 100
    assert (smaller - whole).abs().max() <= NETWORK_TOLERANCE


@torch.inference_mode()
def test_a_picture_beyond_the_budget_runs_in_tiles_with_the_same_result(vae: Any, submodule: Callable) -> None:
    pixels, latent = clip_of(9, 64, 96), latent_of(3, 8, 12)["samples"]
    mean, frames = vae.encode(pixels), vae.decode(latent)
    memory = submodule("flashvideo.vae.memory")
    small = submodule("nodes.native.vae").load_vae_native("vae", 8 * 2**20)
    network = small.first_stage_model
    assert memory.decode_bytes(network, latent.shape, torch.float32) > network.budget
    assert memory.encode_bytes(network, (1, 3, 9, 64, 96), torch.float32) > network.budget
    assert (small.encode(pixels) - mean).abs().max() <= NETWORK_TOLERANCE
    assert (small.decode(latent) - frames).abs().max() <= NETWORK_TOLERANCE


@torch.inference_mode()
def test_a_budget_holds_for_batches(vae: Any, submodule: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, latent = vae.first_stage_model, latent_of(2, 4, 6)["samples"].repeat(3, 1, 1, 1, 1)
    video = clip_of(5, 32, 48).movedim(-1, 0).repeat(3, 1, 1, 1, 1)
    mean, frames = whole.encode(video), vae.decode(latent)
    memory = submodule("flashvideo.vae.memory")
    needed = (
        memory.decode_bytes(whole, latent.shape, torch.float32),
        memory.encode_bytes(whole, video.shape, torch.float32),
    )
    small = submodule("nodes.native.vae").load_vae_native("vae", int(2 * min(needed)))  # of three that each half takes
    for half in ("encode", "decode"):
        monkeypatch.setattr(submodule("flashvideo.vae").VideoVAE, half, lambda *_, **__: pytest.fail("all at once"))
    assert (small.first_stage_model.encode(video) - mean).abs().max() <= NETWORK_TOLERANCE
    assert (small.decode(latent) - frames).abs().max() <= NETWORK_TOLERANCE


class OnOneDevice(torch.overrides.TorchFunctionMode):
    """Fails where an operation meets tensors of several devices, as a graphics card would."""

    MOVES = ("to", "copy_", "__get__", "__set__")

    def __torch_function__(self, call: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        devices = {each.device.type for each in args if isinstance(each, Tensor) and each.dim()}
        assert len(devices) < 2 or call.__name__ in self.MOVES, call.__name__
        return call(*args, **(kwargs or {}))


@torch.no_grad()
def test_layers_whose_weights_wait_in_main_memory_fetch_them(vae: Any) -> None:
    """As with --novram. The meta device stands for a card: only where results are is looked at."""
    network, card = vae.first_stage_model, torch.device("meta")
    vae.patcher.partially_load(torch.device("cpu"), 0.1)
    layers = [module for module in network.modules() if hasattr(module, "comfy_cast_weights")]
    assert layers
    assert all(layer.comfy_cast_weights for layer in layers)
    with OnOneDevice():
        latent = type(network).__base__.encode(network, torch.empty(1, 3, 9, 64, 96, device=card)).mode()
        video = type(network).__base__.decode(network, torch.empty(1, 16, 3, 8, 12, device=card))
    assert (latent.device, video.device) == (card, card)


def test_weights_go_to_the_card_though_the_whole_picture_would_not_fit_it(
    vae: Any, submodule: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's own loading, with a pretended card (meta) of 22 GB and its rules for NVIDIA's."""
    import comfy.model_management as management

    module, planner, card = submodule("nodes.native.vae"), submodule("flashvideo.planner"), torch.device("meta")
    free_elsewhere, room = management.get_free_memory, 22 * 2**30

    def free(device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        if device == card:
            return (room, room) if torch_free_too else room
        return free_elsewhere(device, torch_free_too)

    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "lowvram_available", True)
    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    monkeypatch.setattr(management, "current_loaded_models", [])
    with card:
        network = type(vae.first_stage_model)(planner.OFFICIAL.vae, device=card, budget=None, dtype=torch.float16)
    official = module.FlashVideoVAE(network.to_empty(device="cpu").requires_grad_(False), torch.float16, card)
    needed = official.memory_used_decode((1, 16, 13, 136, 240), torch.float16)
    assert needed > room
    management.load_models_gpu([official.patcher], memory_required=needed, force_full_load=official.disable_offload)
    assert official.patcher.loaded_size() == official.model_size()


# What a user can wire wrongly


@pytest.mark.parametrize("node", ["VAEEncode", "VAEEncodeTiled"])
@pytest.mark.parametrize(("frames", "needed"), [(20, 21), (2, 5), (16, 17)])
def test_other_lengths_are_refused_and_lose_nothing_silently(
    apply: Callable, run_prompt: Any, node: str, frames: int, needed: int
) -> None:
    with pytest.raises(run_prompt.Failed) as failed:
        apply(node, {"pixels": clip_of(frames, 16, 16), **(TILES if "Tiled" in node else {})})
    assert f"got {frames}. Put FlashVideo Prepare Frames before it" in failed.value.message
    assert f"pads the clip to {needed} frames" in failed.value.message


def test_cropping_is_told(apply: Callable, caplog: pytest.LogCaptureFixture) -> None:
    assert apply("VAEEncode", {"pixels": clip_of(1, 30, 44)})["samples"].shape == (1, 16, 1, 3, 5)
    assert "44x30 was cropped to 40x24" in caplog.text


def test_latents_of_another_model_are_refused(apply: Callable, run_prompt: Any) -> None:
    with pytest.raises(run_prompt.Failed, match=r"must be \[batch, 16, frames, height, width\]; got \[1, 4, 1, 8, 8\]"):
        apply("VAEDecode", {"samples": {"samples": torch.zeros(1, 4, 1, 8, 8)}})


def test_a_stage_file_in_the_vae_slot_is_named(apply: Callable, run_prompt: Any, vae_folder: Path) -> None:
    (vae_folder / "stage1.safetensors").write_bytes((GOLDEN / "dit_stage1_weights.safetensors").read_bytes())
    with pytest.raises(run_prompt.Failed) as failed:
        apply("VAEEncode", {"pixels": clip_of(1)}, "stage1.safetensors")
    assert failed.value.message.startswith("Load FlashVideo VAE: stage1.safetensors is a FlashVideo or CogVideoX")


def test_a_file_that_is_gone_is_named(submodule: Callable) -> None:
    with pytest.raises(ValueError, match=r'"gone\.safetensors" is not in models/vae'):
        submodule("nodes.native.files").resolve("vae", "gone.safetensors")


# Progress, cancel, memory


@pytest.mark.parametrize(
    ("node", "inputs", "chunks"),
    [
        ("VAEEncode", {"pixels": clip_of(37, 16, 16)}, 3),
        ("VAEDecode", {"samples": latent_of(8, 2, 2)}, 4),
        # Two tiles of two chunks; the first and last convolution, the halves of residual blocks, the steps in size.
        ("VAEDecodeTiled", {"samples": latent_of(4, 12, 4), **TILES}, 2 * 2 * (2 + (2 + 4 * 2) * 2 + 3)),
        ("VAEEncodeTiled", {"pixels": clip_of(21, 96, 32), **TILES}, 2 * 2 * (2 + (2 + 4) * 2 + 3)),
    ],
)
def test_progress_moves_with_every_chunk(
    apply: Callable, run_prompt: Any, node: str, inputs: dict, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils

    for limit in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):  # of newer versions
        monkeypatch.setattr(comfy.utils, limit, 0.0, raising=False)
    apply(node, inputs)
    moves = [(data["value"], data["max"]) for name, data in run_prompt.events if name == "progress"]
    assert moves == [(done, chunks) for done in range(1, chunks + 1)]


@pytest.mark.parametrize(
    ("node", "inputs"),
    [("VAEEncode", {"pixels": clip_of(49, 16, 16)}), ("VAEDecodeTiled", {"samples": latent_of(6, 12, 4), **TILES})],
)
def test_cancel_answers_within_a_chunk_and_the_next_run_works(
    apply: Callable, run_prompt: Any, node: str, inputs: dict
) -> None:
    import comfy.model_management
    import comfy.utils

    chunks = []

    def cancel_after_two(*_args: Any, **_kwargs: Any) -> None:
        chunks.append(1)
        comfy.model_management.interrupt_current_processing(len(chunks) == 2)

    comfy.utils.set_progress_bar_global_hook(cancel_after_two)
    with pytest.raises(run_prompt.Failed):
        apply(node, inputs)
    assert len(chunks) == 2
    comfy.utils.set_progress_bar_global_hook(run_prompt.progress_hook)
    apply(node, inputs)


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; with fake tensors, without making them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._look_at(tensor.untyped_storage())
        return result

    def _look_at(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.seen.pop(key)


@pytest.mark.parametrize("size", [(49, 256, 480), (49, 1088, 1920), (1, 1088, 1920)], ids=str)
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_memory_asked_for_is_what_the_official_vae_takes(submodule: Callable, way: str, size: tuple) -> None:
    """Full-size network and video, as fake tensors: only their sizes are real."""
    config = submodule("flashvideo.config").VAE
    frames, height, width = size
    shape = (1, 3, *size) if way == "encode" else (1, 16, (frames + 3) // 4, height // 8, width // 8)
    with torch._subclasses.fake_tensor.FakeTensorMode(), torch.no_grad():
        network = submodule("flashvideo.vae").VideoVAE(config, dtype=torch.float16)
        start = torch.empty(shape, dtype=torch.float16)
        asked = getattr(submodule("flashvideo.vae.memory"), f"{way}_bytes")(network, shape, torch.float16)
        with PeakMemory() as memory:
            getattr(network, way)(start)
    assert 0.9 < asked / memory.peak < 1.1
