"""The pack inside a real ComfyUI, in this process: its node registry, its executor, no server.

One process holds one ComfyUI, always on the CPU, whose results are the same on every machine. All its folders are
private, and the pack is loaded as ComfyUI loads it: from a link in custom_nodes, with ComfyUI's root first on sys.path.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import io
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-FlashVideo"
HERE = ("127.0.0.1", "::1", "localhost")
STAMP = ROOT / ".bed" / "bed.json"  # of the set-up
COMFYUI = os.environ.get("FLASHVIDEO_COMFYUI")
if not COMFYUI and STAMP.is_file():  # pytest on its own, with the bed's Python
    COMFYUI = json.loads(STAMP.read_text())["comfyui"]
if not COMFYUI:
    pytest.exit("These tests run inside ComfyUI: use `make test` (or let FLASHVIDEO_COMFYUI name ComfyUI's folder).", 2)

BASE = Path(tempfile.mkdtemp(prefix="flashvideo-comfyui-")).resolve()
atexit.register(shutil.rmtree, BASE, ignore_errors=True)
for folder in ("custom_nodes", "input", "output", "temp", "models", "user"):
    (BASE / folder).mkdir()

# Before anything of ComfyUI is imported, which a test file may do at its top: ComfyUI's modules read these once.
sys.path.insert(0, COMFYUI)
sys.path.append(str(ROOT / "tests"))  # what the tests share; after ComfyUI, whose `comfy` and `server` count
from comfy.cli_args import args  # noqa: E402

args.cpu = True
args.base_directory = str(BASE)
args.disable_api_nodes = True

import utils.extra_config  # noqa: E402,F401 - as main.py does: later `utils` would be ComfyUI's comfy/utils.py
from comfy.comfy_types import IO  # noqa: E402
from comfy_executor import Executor  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first."""
    from slow_first import slow_first

    slow_first(items)


@pytest.fixture(scope="session")
def comfy_base() -> Path:
    """ComfyUI's private base folder: input, output, temp, models, user, custom_nodes."""
    return BASE


@pytest.fixture(scope="session")
def comfy_nodes(comfy_base: Path) -> dict[str, Any]:
    """ComfyUI's node registry: its own nodes, this pack's, and the two test nodes below."""
    import nodes

    link = comfy_base / "custom_nodes" / PACK_NAME
    link.symlink_to(ROOT, target_is_directory=True)

    async def load() -> bool:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        return await nodes.load_custom_node(str(link), module_parent="custom_nodes")

    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    try:
        loaded = asyncio.run(load())
    finally:
        logging.getLogger().removeHandler(handler)
    if not loaded:
        pytest.fail(f"ComfyUI could not load the pack:\n{heard.getvalue()}", pytrace=False)
    nodes.NODE_CLASS_MAPPINGS.update({"TestValue": Value, "TestCapture": Capture})
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the pack goes out: connections to other machines fail, as do questions for their addresses."""
    connect, find = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
            pytest.fail(f"a connection to {address}")
        connect(self, address)

    def find_here(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in (None, *HERE):
            pytest.fail(f"a question for the address of {host}")
        return find(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", find_here)


@pytest.fixture(scope="session")
def pack(comfy_nodes: dict[str, Any]) -> ModuleType:
    """The loaded pack; see `submodule` for what is in it."""
    return sys.modules[str(BASE / "custom_nodes" / PACK_NAME).replace(".", "_x_")]  # ComfyUI's own naming


@pytest.fixture(scope="session")
def submodule(pack: ModuleType) -> Callable[[str], ModuleType]:
    """Import a module of the pack under the name that ComfyUI gave it."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def our_nodes(comfy_nodes: dict[str, Any], pack: ModuleType) -> dict[str, Any]:
    """The pack's own nodes by id."""
    return {name: node for name, node in comfy_nodes.items() if node.__module__.startswith(f"{pack.__name__}.")}


@pytest.fixture()
def model_folder(comfy_base: Path) -> Iterator[Callable[[str], Path]]:
    """ComfyUI's folder of a kind of models, emptied after the test."""
    used: list[Path] = []

    def folder(kind: str) -> Path:
        used.append(comfy_base / "models" / kind)
        used[-1].mkdir(parents=True, exist_ok=True)
        return used[-1]

    yield folder
    for file in (file for path in used for file in path.iterdir()):
        file.unlink()


@pytest.fixture()
def vae(submodule: Callable[[str], ModuleType]) -> Any:
    """The built-in VAE."""
    return submodule("nodes.native.vae").load_vae_native("vae")


@pytest.fixture()
def vae_folder(model_folder: Callable[[str], Path]) -> Path:
    """ComfyUI's models/vae."""
    return model_folder("vae")


@pytest.fixture(scope="session")
def model(submodule: Callable[[str], ModuleType]) -> Any:
    """Nano's refiner as a MODEL."""
    return submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage2"))


@pytest.fixture(scope="session")
def other_model(submodule: Callable[[str], ModuleType]) -> Any:
    """A refiner of another form as a MODEL: Nano's with a block less."""
    state = submodule("flashvideo.nano").nano_state("stage2")
    shallow = {name: tensor for name, tensor in state.items() if "blocks.3." not in name}
    return submodule("nodes.native.model").load_model(shallow)


@pytest.fixture(scope="session")
def text(model: Any) -> dict[str, list]:
    """Both CONDITIONINGs for it: random numbers, and zeros."""
    import torch

    width = model.model.diffusion_model.config.text_dim
    context = torch.randn((1, 8, width), generator=torch.Generator().manual_seed(0))
    return {"positive": [[context, {}]], "negative": [[torch.zeros_like(context), {}]]}


@pytest.fixture(scope="session")
def degrade_and_refine(comfy_nodes: dict[str, Any], text: dict[str, list]) -> Callable[..., Any]:
    """Degrade a latent with seed 1 and refine it, with the two nodes; `choices` are the refiner's inputs."""
    import torch

    degradation, refiner = (comfy_nodes[f"FlashVideo{name}"] for name in ("LatentDegradation", "Stage2Refiner"))

    def run(model: Any, latent: torch.Tensor, strength: int, **choices: Any) -> torch.Tensor:
        with torch.inference_mode():
            degraded = degradation.execute({"samples": latent}, strength=strength, seed=1).result[0]
            choices = {"shift": 2.5, "solver": "euler", **text, **choices}
            return refiner.execute(model=model, latent=degraded, **choices).result[0]["samples"]

    return run


@pytest.fixture(scope="module")
def refined(submodule: Callable[[str], ModuleType]) -> Callable[[Any], Any]:
    """What stage II makes of one latent in four steps of ComfyUI's own sampler."""
    import comfy.sample
    import comfy.samplers
    import torch

    stages = submodule("nodes.native.stages")

    def run(model: Any) -> torch.Tensor:
        make = torch.Generator().manual_seed(3)
        latent, text = torch.randn(1, 16, 3, 8, 12, generator=make), torch.randn(1, 12, 48, generator=make)
        model = stages.refiner_settings(model, 300, 2.5)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
        texts = [[text, {}]], [[torch.zeros_like(text), {}]]
        euler = comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(
            model, latent, 1.0, euler, sigmas, *texts, torch.zeros_like(latent), disable_pbar=True
        )

    return run


@pytest.fixture()
def asked_memory(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Bytes beside the weights that ComfyUI was asked to make room for in this test, a number each time."""
    import comfy.model_management

    asked: list[float] = []
    load = comfy.model_management.load_models_gpu

    def listen(models: list[Any], memory_required: float = 0, **others: Any) -> None:
        asked.append(memory_required)
        load(models, memory_required=memory_required, **others)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", listen)
    return asked


@pytest.fixture()
def progress() -> Iterator[dict[str, Any]]:
    """What ComfyUI's progress bar has shown; it presses Cancel when it gets to `stop`."""
    import comfy.model_management
    import comfy.utils

    seen: dict[str, Any] = {"values": [], "stop": float("inf")}

    def hook(value: float, total: float, _preview: object, **_node: object) -> None:
        seen["values"].append(value / total)
        if value / total >= seen["stop"]:
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    yield seen
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture()
def run_prompt(comfy_nodes: dict[str, Any]) -> Iterator[Executor]:
    """An executor of this test's own; see `Executor`."""
    import comfy.utils

    executor = Executor()
    comfy.utils.set_progress_bar_global_hook(executor.progress_hook)
    yield executor
    comfy.utils.set_progress_bar_global_hook(None)
    executor.forget()


class Value:
    """Test node: gives a prompt any Python object, put into `Value.store` under a name."""

    store: dict[str, Any] = {}
    RETURN_TYPES = (IO.ANY,)
    FUNCTION = "give"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's declaration of inputs."""
        return {"required": {"name": ("STRING", {"default": ""})}}

    def give(self, name: str) -> tuple[Any]:
        """The stored object."""
        return (self.store[name],)


class Capture:
    """Test node: an output node that keeps what reaches it in `Capture.store` under a name."""

    store: dict[str, Any] = {}
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "keep"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's declaration of inputs."""
        return {"required": {"value": (IO.ANY,), "name": ("STRING", {"default": ""})}}

    def keep(self, value: object, name: str) -> dict[str, Any]:
        """Store the object."""
        self.store[name] = value
        return {}


@pytest.fixture()
def values() -> Iterator[dict[str, Any]]:
    """What TestValue nodes give, by name."""
    Value.store.clear()
    yield Value.store
    Value.store.clear()


@pytest.fixture()
def captured() -> Iterator[dict[str, Any]]:
    """What TestCapture nodes received, by name."""
    Capture.store.clear()
    yield Capture.store
    Capture.store.clear()
