"""Other packs around our nodes: VideoHelperSuite, KJNodes, rgthree, GGUF and MultiGPU, a graph each.

They aren't part of this repository. FLASHVIDEO_OTHER_PACKS names a folder with their checkouts, and with what they need
of PyPI in its folder `packages`; CONTRIBUTING.md has the commands. Without it nothing here runs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from harness.bed import Bed
from harness.comfy_server import ComfyServer
from harness.workflow_api import WorkflowError
from harness.workflow_files import WORKFLOWS
from harness.workflow_runs import Run, api_prompt, run_prompt
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get("FLASHVIDEO_OTHER_PACKS", "")
STAGE2 = "flashvideo_stage2"  # a small file of stage II among the server's models, in two formats
LORA = "flashvideo_stage2_lora.safetensors"

pytestmark = pytest.mark.skipif(not FOLDER, reason="FLASHVIDEO_OTHER_PACKS names no folder of other packs")

Prompt = dict[str, Any]


@pytest.fixture(scope="module")
def server(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI with our pack and all the others, and with files of stage II as users have them."""
    base = tmp_path_factory.mktemp("others")
    (base / "custom_nodes").mkdir()
    for pack in sorted(Path(FOLDER).resolve().iterdir()):
        if (pack / "__init__.py").is_file():
            (base / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)
    models = base / "models"
    for name in ("diffusion_models", "loras"):
        (models / name).mkdir(parents=True)
    source = ROOT / "models" / "nano" / "footage_stage2.safetensors"
    for options in ([f"{STAGE2}.safetensors"], [f"{STAGE2}.gguf", "--to", "gguf_q8_0"]):
        target = models / "diffusion_models" / options[0]
        subprocess.run(
            [sys.executable, "-m", "flashvideo", "convert", source, target, *options[1:]], cwd=ROOT, check=True
        )
    generator = torch.Generator().manual_seed(5)
    layer = "diffusion_model.blocks.0.q.lora_{}.weight"
    down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((4, 128), (128, 4)))
    save_file({layer.format("A"): down, layer.format("B"): up}, models / "loras" / LORA)
    packages = Path(FOLDER).resolve() / "packages"
    with ComfyServer(bed, base, device_options=["--cpu"], packages=packages) as running:
        yield running


@pytest.fixture(scope="module")
def classes(server: ComfyServer) -> set[str]:
    """The names of all nodes that the server has."""
    with server.client() as client:
        return set(client.object_info())


@pytest.fixture(scope="module")
def graph(server: ComfyServer) -> Prompt:
    """The graph that refines any video, small and without its comparison."""
    prompt = api_prompt(server, WORKFLOWS / "FlashVideo 03 Refine Any Video.json")
    comparison = node(prompt, "FlashVideoCompare")
    doomed = {comparison}
    while more := {key for key, each in prompt.items() if links(each) & doomed} - doomed:
        doomed |= more
    prompt = {key: each for key, each in prompt.items() if key not in doomed}
    change(prompt, "FlashVideoPrepareFrames", size="short side", short_side=64)
    change(prompt, "FlashVideoStage2Refiner", steps=1, cfg=1.0)
    return prompt


@pytest.fixture(scope="module")
def plain(server: ComfyServer, graph: Prompt) -> np.ndarray:
    """What the graph gives without a node of others: [T, H, W, 3]."""
    return frames(result(run(server, graph)))


@pytest.fixture()
def edited(graph: Prompt, classes: set[str]) -> Callable[..., tuple[Prompt, str]]:
    """A copy of the graph with one more node, and that node's id. Skips what this ComfyUI can't load."""

    def add(class_type: str, prompt: Prompt | None = None, **inputs: Any) -> tuple[Prompt, str]:
        if class_type not in classes:
            pytest.skip(f"{class_type}: its pack isn't there, or doesn't load in this ComfyUI.")
        prompt = copy.deepcopy(graph) if prompt is None else prompt
        prompt[key := f"added {len(prompt)}"] = {"class_type": class_type, "inputs": inputs}
        return prompt, key

    return add


def links(each: dict[str, Any]) -> set[str]:
    """The nodes that a node takes something from."""
    return {value[0] for value in each["inputs"].values() if isinstance(value, list)}


def node(prompt: Prompt, class_type: str) -> str:
    """The id of the only node of a class."""
    (key,) = (key for key, each in prompt.items() if each["class_type"] == class_type)
    return key


def change(prompt: Prompt, class_type: str, **inputs: Any) -> None:
    """Set inputs of the only node of a class."""
    known = prompt[node(prompt, class_type)]["inputs"]
    assert known.keys() >= inputs.keys()
    known.update(inputs)


def run(server: ComfyServer, prompt: Prompt) -> Run:
    """Run a graph to its end."""
    return run_prompt(server, prompt, lambda _line: None)


def result(done: Run) -> Path:
    """The only file that a run saved."""
    ((path,),) = done.files.values()
    return path


def frames(path: Path) -> np.ndarray:
    """All frames of a video file: [T, H, W, 3]."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(np.float32)


def test_video_helper_suite_loads_and_saves(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], clip: Path
) -> None:
    whole = {"force_rate": 0, "custom_width": 0, "custom_height": 0, "select_every_nth": 1}
    prompt, load = edited("VHS_LoadVideo", video=clip.name, frame_load_cap=9, skip_first_frames=2, **whole)
    _, about = edited("VHS_VideoInfo", prompt, video_info=[load, 3])
    finished = [node(prompt, "FlashVideoFinishFrames"), 0]
    edited(
        "VHS_VideoCombine", prompt, images=finished, frame_rate=[about, 0], audio=[load, 2], loop_count=0,
        filename_prefix="vhs", format="video/h264-mp4", pingpong=False, save_output=True, pix_fmt="yuv420p", crf=19,
        save_metadata=True, trim_to_audio=False,
    )  # fmt: skip
    change(prompt, "FlashVideoPrepareFrames", images=[load, 0])
    for class_type in ("SaveVideo", "CreateVideo", "GetVideoComponents", "FlashVideoExampleClip"):
        del prompt[node(prompt, class_type)]
    paths = [path for paths in run(server, prompt).files.values() for path in paths if path.suffix == ".mp4"]
    with av.open(str(paths[-1])) as file:
        video = file.streams.video[0]
        assert (video.height, video.average_rate, len(file.streams.audio)) == (64, Fraction(12), 1)
        assert sum(1 for _ in file.decode(video=0)) == 9


def test_a_range_of_latents_by_kjnodes_is_still_degraded_once(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], graph: Prompt, plain: np.ndarray
) -> None:
    degraded = [node(graph, "FlashVideoLatentDegradation"), 0]
    prompt, cut = edited("GetLatentRangeFromBatch", latents=degraded, start_index=0, num_frames=-1)
    change(prompt, "FlashVideoStage2Refiner", latent=[cut, 0])
    np.testing.assert_array_equal(frames(result(run(server, prompt))), plain)


def test_pictures_of_kjnodes_go_in_and_come_out(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], graph: Prompt
) -> None:
    images = graph[node(graph, "FlashVideoPrepareFrames")]["inputs"]["images"]
    prompt, cut = edited("GetImageRangeFromBatch", images=images, start_index=3, num_frames=9)
    size = {"width": 62, "height": 34, "upscale_method": "lanczos", "keep_proportion": "crop", "divisible_by": 2}
    _, resized = edited(
        "ImageResizeKJv2", prompt, image=[cut, 0], pad_color="0, 0, 0", crop_position="center", device="cpu", **size
    )
    change(prompt, "FlashVideoPrepareFrames", images=[resized, 0])
    finished, draft = [node(prompt, "FlashVideoFinishFrames"), 0], [node(prompt, "FlashVideoPrepareFrames"), 1]
    _, matched = edited(
        "ColorMatch", prompt, image_ref=draft, image_target=finished, method="mkl", strength=1.0, multithread=False
    )
    change(prompt, "CreateVideo", images=[matched, 0])
    assert frames(result(run(server, prompt))).shape == (9, 64, 116, 3)


def test_everything_through_a_context_of_rgthree(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], plain: np.ndarray
) -> None:
    """Its seed, and its LoRA loader, which only counts when it is on."""

    def through(switch: bool) -> np.ndarray:
        prompt, seed = edited("Seed (rgthree)", seed=1)
        model, text = [node(prompt, "FlashVideoModelLoader"), 0], node(prompt, "FlashVideoTextEncode")
        lora = {"on": switch, "lora": LORA, "strength": 1.0}
        _, loras = edited("Power Lora Loader (rgthree)", prompt, model=model, lora_1=lora)
        vae = [node(prompt, "FlashVideoVAELoader"), 0]
        words = {"positive": [text, 0], "negative": [text, 1]}
        _, context = edited("Context (rgthree)", prompt, model=[loras, 0], vae=vae, seed=[seed, 0], **words)
        change(prompt, "FlashVideoStage2Refiner", model=[context, 1], positive=[context, 4], negative=[context, 5])
        change(prompt, "VAEDecode", vae=[context, 3])
        change(prompt, "FlashVideoLatentDegradation", seed=[context, 8])
        return frames(result(run(server, prompt)))

    np.testing.assert_array_equal(through(False), plain)
    assert np.abs(through(True) - plain).mean() > 0.1


def test_a_gguf_file_is_for_our_loader(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], graph: Prompt, plain: np.ndarray
) -> None:
    ours = copy.deepcopy(graph)
    change(ours, "FlashVideoModelLoader", model_name=f"{STAGE2}.gguf")
    assert 0 < np.abs(frames(result(run(server, ours))) - plain).mean() < 4
    theirs, loader = edited("UnetLoaderGGUF", unet_name=f"{STAGE2}.gguf")
    change(theirs, "FlashVideoStage2Refiner", model=[loader, 0])
    with pytest.raises(WorkflowError, match="'flashvideo'"):
        run(server, theirs)


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("UNETLoaderMultiGPU", {"unet_name": f"{STAGE2}.safetensors", "device": "cpu"}),
        (
            "DiffusionModelLoaderKJ",
            {
                "model_name": f"{STAGE2}.safetensors", "compute_dtype": "default", "patch_cublaslinear": False,
                "sage_attention": "disabled", "enable_fp16_accumulation": False,
            },
        ),
    ],
    ids=["MultiGPU", "KJNodes"],
)  # fmt: skip
def test_a_converted_file_is_nothing_that_another_loader_knows(
    server: ComfyServer, edited: Callable[..., tuple[Prompt, str]], class_type: str, inputs: dict[str, Any]
) -> None:
    prompt, loader = edited(class_type, weight_dtype="default", **inputs)
    change(prompt, "FlashVideoStage2Refiner", model=[loader, 0])
    with pytest.raises(WorkflowError, match=f"^{class_type}: "):  # the loader itself, in words of its own
        run(server, prompt)


def test_our_loader_beside_multigpu_gives_the_same(
    server: ComfyServer, classes: set[str], graph: Prompt, plain: np.ndarray
) -> None:
    """That pack replaces ComfyUI's functions for devices and memory."""
    if "UNETLoaderMultiGPU" not in classes:
        pytest.skip("MultiGPU isn't there, or doesn't load in this ComfyUI.")
    prompt = copy.deepcopy(graph)
    change(prompt, "FlashVideoModelLoader", model_name=f"{STAGE2}.safetensors")
    np.testing.assert_array_equal(frames(result(run(server, prompt))), plain)
