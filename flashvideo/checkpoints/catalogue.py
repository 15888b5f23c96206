"""Which of the files that FlashVideo runs with are in a ComfyUI's model folders.

What a file is shows in its contents, so a converted or renamed one counts as well. Only files that can be mapped are
looked into (safetensors, PyTorch archives): a header each, however large the file is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from ..model_files import DOWNLOADS, ROLES, Role
from .archives import is_archive
from .reading import describe, open_checkpoint
from .weights import CheckpointError, Weights, open_weights

EXTRA_PATHS = "extra_model_paths.yaml"
SUFFIXES = (".safetensors", ".sft", ".pt", ".pt2", ".pth", ".ckpt", ".bin", ".pkl")  # what ComfyUI's loaders list
# ComfyUI's kinds of model folders, each with its places below models/: the first is where a new file goes.
PLACES = {
    "diffusion_models": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"),
}
OLD_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}  # names that old extra_model_paths.yaml files use
SOURCE_SHA256 = "flashvideo.source_sha256"  # in a converted file's metadata
T5_XXL_WIDTH = 4096
T5_XXL_LAYERS = 24


_STAGE_ROLES = {"1": ROLES[0], "2": ROLES[1], "vae": ROLES[2]}
_KNOWN_NAMES = {file.file: role for role, file in DOWNLOADS.values()}


@dataclass(frozen=True)
class FoundFile:
    """A file in a model folder that is FlashVideo's, or that has one of its names and can't be used.

    `source_sha256` is the checksum of the file that a converted one was made of.
    """

    path: Path
    role: Role
    description: str
    trouble: str | None = None
    source_sha256: str | None = None


def comfyui_folder(named: Path | None) -> Path:
    """The ComfyUI to look into: the named one, COMFYUI_PATH, or the one whose custom_nodes holds this pack.

    ComfyUI's own folder, the one above it in a portable build, or what ComfyUI was given as --base-directory; they
    have a `models` folder in common. Raises CommandError.
    """
    place = named or (Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None)
    pack = Path(__file__).absolute().parents[2]  # not resolved: a linked pack belongs to the ComfyUI with the link
    if place is None and pack.parent.name == "custom_nodes":
        place = pack.parents[1]
    if place is None:
        raise CommandError("Which ComfyUI? Name its folder with --comfyui PATH, or in COMFYUI_PATH.")
    for folder in (place.expanduser().absolute(), place.expanduser().absolute() / "ComfyUI"):
        if (folder / "models").is_dir():
            return folder
    raise CommandError(f"{place} is not a ComfyUI folder: it has no folder `models`.")


def model_folders(comfyui: Path, extra_paths: Path | None = None) -> dict[str, list[Path]]:
    """Where ComfyUI looks for each kind of PLACES; the first is where a new file goes. They need not exist.

    `extra_paths` is a file like ComfyUI's extra_model_paths.yaml, which is read if it is there. Raises CommandError.
    """
    folders = {kind: [comfyui / "models" / place for place in places] for kind, places in PLACES.items()}
    configs = [comfyui / EXTRA_PATHS] if (comfyui / EXTRA_PATHS).is_file() else []
    for config in configs + ([extra_paths] if extra_paths else []):
        for kind, folder, first in _extra_folders(config):
            if kind in folders and folder not in folders[kind]:
                folders[kind].insert(0 if first else len(folders[kind]), folder)
    return folders


def _extra_folders(config: Path) -> Iterator[tuple[str, Path, bool]]:
    """Kind, folder and whether it comes first, of every line that a file like extra_model_paths.yaml has."""
    try:
        import yaml
    except ImportError:
        raise CommandError(
            f"{config} can't be read without PyYAML: use ComfyUI's Python, or `pip install pyyaml`."
        ) from None
    try:
        sections = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            entries = dict(section or {})
            base = os.path.expandvars(entries.pop("base_path", None) or "")
            first = bool(entries.pop("is_default", False))
            # As in ComfyUI: relative to base_path, and that to the file itself.
            root = config.absolute().parent / Path(base).expanduser()
            for kind, lines in entries.items():
                for line in filter(None, map(str.strip, lines.split("\n"))):
                    yield OLD_KINDS.get(kind, kind), Path(os.path.normpath(root / line)), first
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"{config} is not what ComfyUI expects of such a file: {error}") from error


def find_files(folders: dict[str, list[Path]]) -> list[FoundFile]:
    """The files in these folders that FlashVideo can use, and those that have one of its names but can't be used."""
    found = (look_into(path) for path in _weight_files(folders))
    return [file for file in found if file is not None]


def _weight_files(folders: dict[str, list[Path]]) -> Iterator[Path]:
    seen: set[str] = set()  # real paths of files and folders: links may lead in circles
    for folder in dict.fromkeys(folder for kind in PLACES for folder in folders[kind]):
        for place, below, names in os.walk(folder, followlinks=True):
            below[:] = [name for name in sorted(below) if _is_new(Path(place) / name, seen)]
            paths = (Path(place) / name for name in sorted(names) if name.lower().endswith(SUFFIXES))
            yield from (path for path in paths if _is_new(path, seen))


def _is_new(path: Path, seen: set[str]) -> bool:
    real = os.path.realpath(path)  # unlike Path.resolve, it raises nothing for a circle
    new = real not in seen
    seen.add(real)
    return new


def look_into(path: Path) -> FoundFile | None:
    """What a file is to FlashVideo, by its contents; None if it is another model's."""
    by_name = _KNOWN_NAMES.get(path.name)
    if not path.is_file():  # a pipe would be waited for
        return None if by_name is None else FoundFile(path, by_name, "", trouble=_not_a_file(path))
    try:
        if by_name is None and not _can_be_mapped(path):
            return None
        weights = open_weights(path)
        if _is_t5_xxl(weights):
            return FoundFile(path, ROLES[3], f"T5-XXL ({weights.container})")
        checkpoint = open_checkpoint(path)
    except (CheckpointError, OSError) as error:
        reason = f"it can't be read: {error.strerror}." if isinstance(error, OSError) else str(error)
        return None if by_name is None else FoundFile(path, by_name, "", trouble=reason)
    role = _STAGE_ROLES[checkpoint.stage]
    return FoundFile(path, role, describe(checkpoint), source_sha256=weights.metadata.get(SOURCE_SHA256))


def _not_a_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}, which isn't there."
    return "it is a folder, a pipe, a socket or a device, not a file."


def _can_be_mapped(path: Path) -> bool:
    """Whether opening costs next to nothing; a PyTorch file of the old kind would be read as a whole."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" or (head.startswith(b"PK") and is_archive(path))


def _is_t5_xxl(weights: Weights) -> bool:
    norm = weights.shapes.get("encoder.final_layer_norm.weight")
    last = f"encoder.block.{T5_XXL_LAYERS - 1}.layer.0.SelfAttention.q.weight"
    return norm == (T5_XXL_WIDTH,) and last in weights.shapes
