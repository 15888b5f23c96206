"""Refine Long Video on a Ray cluster: a real one, Cancel in the middle, and what can't be carried there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import psutil
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from ray_head import PATIENCE, Head, started_head

COUNT, SIDE = 41, 32
STEPS = 20  # many: there is time to press Cancel, also on a fast machine
CHOICES = {
    "size": "keep", "short_side": 1080, "scale": 4.0, "width": 64, "height": 48, "resample": "bilinear",
    "strength": 675, "steps": STEPS, "cfg": 4.0, "shift": 2.5, "window": 9, "overlap": 4, "seed": 5,
    "color_match": "wavelet", "detail_size": 70,
}  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    yield from started_head(2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A clip as a VIDEO from a file."""
    path = tmp_path_factory.mktemp("source") / "clip.mp4"
    t, y, x = torch.meshgrid(torch.arange(COUNT), torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = torch.stack([((x + y * k + 3 * t) / 9 + k).sin() * 0.3 + 0.5 for k in range(3)], dim=-1)
    InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(24))).save_to(
        str(path)
    )
    return InputImpl.VideoFromFile(str(path))


@pytest.fixture(scope="module")
def networks(comfy_nodes: dict[str, Any]) -> dict[str, Any]:
    """What the loaders give, and the prompt's CONDITIONINGs."""
    model = comfy_nodes["FlashVideoModelLoader"].execute("FlashVideo-Nano Stage II (built-in)", "default").result[0]
    vae = comfy_nodes["FlashVideoVAELoader"].execute("FlashVideo-Nano (built-in)").result[0]
    width = model.model.diffusion_model.config.text_dim
    context = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    conditionings = {"positive": [[context, {}]], "negative": [[torch.zeros_like(context), {}]]}
    return {"model": model, "vae": vae, **conditionings}


@pytest.fixture()
def refine(comfy_nodes: dict[str, Any], networks: dict[str, Any], video: Any) -> Callable[..., Path]:
    """Run the node; returns the file behind its VIDEO."""

    def run(**changes: Any) -> Path:
        given = {**networks, "video": video, **CHOICES, **changes}
        with torch.inference_mode():
            output = comfy_nodes["FlashVideoRefineLongVideo"].execute(**given)
        return Path(output.result[0].get_stream_source())

    return run


def alone(job: Any, submodule: Callable[[str], ModuleType], target: Path) -> bytes:
    """What the library makes of the same job in this process, on one thread as the workers."""
    jobs = submodule("flashvideo.commands.jobs")
    options = replace(job.options(), farm=None, target=target)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        networks = jobs.refiner_networks(options)
        jobs.refine_job(jobs.Job(job.source, target), networks, None, options, lambda *_: None, lambda _: None)
    finally:
        torch.set_num_threads(threads)
    return target.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts a cluster as Linux does")
def test_a_cluster_refines_the_video_and_can_be_cancelled(
    head: Head,
    refine: Callable[..., Path],
    submodule: Callable[[str], ModuleType],
    progress: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    cluster, handed = submodule("nodes.native.cluster"), []
    hand_over = cluster.hand_over
    monkeypatch.setattr(cluster, "hand_over", lambda job, *rest: (handed.append(job), hand_over(job, *rest)))

    progress["stop"] = 0.25  # the first evaluations are done
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        refine(cluster=head.address)
    unfinished = Path(folder_paths.get_output_directory()) / "flashvideo-unfinished"
    assert [path.suffix for path in unfinished.iterdir()] == [".unfinished"]
    assert not [each for each in psutil.Process().children() if "handed_over" in str(each.cmdline())]

    progress["stop"], progress["values"] = float("inf"), []
    path = refine(cluster=head.address)
    assert path.parent == Path(folder_paths.get_temp_directory())
    assert progress["values"][-1] == 1
    assert list(unfinished.iterdir()) == []
    assert path.read_bytes() == alone(handed[-1], submodule, tmp_path / "alone.mp4")
    assert handed[-1].settings == handed[0].settings
    assert refine(cluster=head.address) == path  # made before: nothing to do
    assert len(handed) == 2


def test_what_is_handed_over_is_what_arrives(submodule: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module, run = submodule("flashvideo.commands.handed_over"), submodule("flashvideo.refiner.run")
    strength = submodule("flashvideo.degradation").AutoStrength(500)
    settings = run.RefineSettings(submodule("flashvideo.frames").TargetSize("scale", scale=2.0), strength=strength)
    job = module.HandedOver(
        None, tmp_path / "ä.mp4", tmp_path / "b.mp4", tmp_path, None, tmp_path / "v.pt", False, 1e9, settings,
        torch.randn(1, 3, 5), "hevc", 10,
    )  # fmt: skip
    read = module.HandedOver.read(job.written())
    assert torch.equal(read.context, job.context)
    assert replace(read, context=job.context) == job


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ("ray://head:10001", r"cluster takes the address of a Ray cluster's head, such as 10\.0\.0\.1:6379"),
        ("x" * 5000, "cluster takes the address.{,300}$"),
        ("closed", r"No Ray cluster answers at 127\.0\.0\.1:[0-9]+: ray start --head starts one there\."),
    ],
)
def test_an_address_that_is_none_is_refused(refine: Callable[..., Path], cluster: str, words: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken, pytest.raises(ValueError, match=f"^FlashVideo Refine Long Video: {words}"):
        taken.bind(("127.0.0.1", 0))  # nobody listens
        refine(cluster=f"127.0.0.1:{taken.getsockname()[1]}" if cluster == "closed" else cluster)


def test_without_ray_one_sentence_says_what_to_install(
    refine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it weren't installed
    with pytest.raises(ValueError, match=r"needs the package ray: pip install 'comfyui-flashvideo\[ray\]'\.$"):
        refine(cluster="local")


def test_what_cannot_be_carried_is_refused_before_work_starts(
    comfy_nodes: dict[str, Any], refine: Callable[..., Path], networks: dict[str, Any],
    submodule: Callable[[str], ModuleType],
) -> None:  # fmt: skip
    pytest.importorskip("ray")
    model, positive = networks["model"], networks["positive"]
    patched = model.clone()
    name = "diffusion_model.blocks.0.q.weight"
    patched.add_patches({name: ("diff", (torch.ones(model.model.state_dict()[name].shape),))}, 0.5)
    wrapped = model.clone()
    wrapped.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    own = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage2"))
    small = comfy_nodes["FlashVideoModelLoader"].execute("FlashVideo-Nano Stage II (built-in)", "fp8_e4m3fn").result[0]
    footage = comfy_nodes["FlashVideoVAELoader"].execute("FlashVideo-Nano for real footage (built-in)").result[0]
    for changes, words in (
        ({"model": patched}, "nothing but FlashVideo Spatial Tiles may be patched into model"),
        ({"model": wrapped}, "nothing but FlashVideo Spatial Tiles may be patched into model"),
        ({"model": own}, "model must come from Load FlashVideo Model"),
        ({"model": small}, "weight_dtype of Load FlashVideo Model must be default"),
        ({"vae": footage}, "model and vae don't go together"),
        ({"negative": positive}, "negative must be FlashVideo Prompt's second output"),
        (
            {"positive": [[positive[0][0], {"area": (1, 1, 0, 0)}]]},
            "positive and negative must come straight from FlashVideo Prompt",
        ),
    ):
        with pytest.raises(ValueError, match=f"^FlashVideo Refine Long Video: (with cluster, )?{words}"):
            refine(cluster="local", **changes)


def test_tiles_are_carried(
    comfy_nodes: dict[str, Any], networks: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    tiled = comfy_nodes["FlashVideoSpatialTiles"].execute(networks["model"], 256).result[0]
    carried = submodule("nodes.native.cluster").carried
    texts = {name: networks[name] for name in ("vae", "positive", "negative")}
    assert carried(tiled, **texts)["tile"] == 256
    assert carried(networks["model"], **texts)["tile"] == 0


def test_a_job_ends_with_the_program_that_gave_it(
    submodule: Callable[[str], ModuleType], video: Any, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    module, run = submodule("flashvideo.commands.handed_over"), submodule("flashvideo.refiner.run")
    source = Path(video.get_stream_source())
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        job = module.HandedOver(
            f"127.0.0.1:{silent.getsockname()[1]}", source, tmp_path / "out.mp4", tmp_path, None, None, False, None,
            run.RefineSettings(), torch.zeros(1, 3, 5), "h264", 8,
        )  # fmt: skip
        python, *command = submodule("nodes.native.cluster").COMMAND
        process = subprocess.Popen(
            [python, "-I", *command], cwd=tmp_path,  # as isolated as the Python of ComfyUI's portable build
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdin.write(job.written() + "\n")
        process.stdin.flush()
        output, _ = process.communicate(timeout=PATIENCE)  # closes its input
    assert process.returncode != 0
    assert not [line for line in output.splitlines() if "done" in json.loads(line)]
    assert not list(tmp_path.iterdir())
