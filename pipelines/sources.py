"""Where a model comes from: Mini, a diffusers folder, a single file, a hub id. Looks, loads nothing. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from .errors import AdapterError, WeightsError
from .families import FAMILIES, SINGLE_FILES, SUPPORTED, family_of_index
from .headers import PICKLES, read_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
INDEX = "model_index.json"
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Args:
        name: As the person gave it.
        kind: "folder", "single_file" or "hub".
        path: Folder or file on this machine; None for a hub model that was not downloaded yet.
        family: Key of FAMILIES.
    """

    name: str
    kind: Literal["folder", "single_file", "hub"]
    path: Path | None
    family: str


def mini_folder() -> Path:
    """The folder of the embedded model."""
    return Path(str(files("intarsia.assets").joinpath("mini")))


def resolve(text: str) -> ModelSource:
    """Find a model by what a person typed.

    Args:
        text: "mini", a folder with `model_index.json`, a `.safetensors` checkpoint, or a hub id `owner/name`.

    Raises:
        WeightsError: It is not there, is incomplete, or is of a family that is not supported.
    """
    name = text.strip()
    if name == "mini":
        folder = mini_folder()
        if not (folder / INDEX).is_file():
            raise WeightsError(f"Mini is not installed: {folder} is missing.", "Install Intarsia again.")
        return _folder(name, folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _single_file(name, path)
    if path.suffix.lower() in (".safetensors", *PICKLES) or path.is_absolute() or name.startswith((".", "~")):
        raise WeightsError(f"There is no model at {path}.", "Check the path.")
    if HUB_ID.fullmatch(name):
        return _hub(name)
    raise WeightsError(
        f"There is no model called {name!r}.",
        "Give mini, a folder, a .safetensors file or a hub id such as owner/name.",
    )


def _folder(name: str, path: Path) -> ModelSource:
    index = _read_json(path / INDEX, f"{path} is not a diffusers model")
    family = family_of_index(index, str(path))
    for part in family.modules:
        if index.get(part, [None])[0] is None:
            continue  # SD3 may come without its T5
        config = _read_json(path / part / "config.json", f"The model in {path} lacks its {part}")
        if part == "unet" and config.get("cross_attention_dim") == 1024 and family.name == "sd15":
            raise WeightsError(f"{path} is Stable Diffusion 2, which is not supported.", f"Supported are: {SUPPORTED}.")
        if not weight_files(path / part):
            hint = "Only .safetensors files are read." if any((path / part).glob("*.bin")) else "Copy it again."
            raise WeightsError(f"{path / part} holds no weights in .safetensors files.", hint)
    return ModelSource(name, "folder", path, family.name)


def weight_files(folder: Path) -> list[Path]:
    """Give the files that hold one component's weights: full precision if there, else the 16-bit variant."""
    for stem in WEIGHT_NAMES:
        for variant in ("", ".fp16", ".bf16"):
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                table = _read_json(index, f"{index} cannot be used")
                return [
                    folder / part for part in sorted(set(cast(dict[str, str], table.get("weight_map", {})).values()))
                ]
    return []


def variant_of(path: Path, part: str) -> str | None:
    """The variant ("fp16", "bf16") the weights of a component are kept in, None for the plain files."""
    for file in weight_files(path / part):
        for variant in ("fp16", "bf16"):
            if f".{variant}" in file.name:
                return variant
    return None


def _read_json(path: Path, trouble: str) -> dict[str, Any]:
    try:
        value: object = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{trouble}: {path} is missing.", "Check the path, or copy the model again.") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{trouble}: {path} cannot be read ({error}).", "Copy the model again.") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{trouble}: {path} is not a table.", "Copy the model again.")
    return cast(dict[str, Any], value)


def _single_file(name: str, path: Path) -> ModelSource:
    try:
        tensors = read_header(path).tensors
    except AdapterError as error:
        raise WeightsError(error.message, error.hint) from None
    for names, family, reason in SINGLE_FILES:
        if all(wanted in tensors for wanted in names):
            if family:
                return ModelSource(name, "single_file", path, family)
            raise WeightsError(
                f"{path.name} is {reason}; it cannot be loaded.",
                "Use the diffusers folder or the hub id of the model.",
            )
    if any("lora" in key or ".hada_" in key for key in tensors):
        raise WeightsError(f"{path.name} is an adapter, not a model.", "Add it to the library instead.")
    raise WeightsError(
        f"{path.name} is no checkpoint that is known here.",
        "Single files are read for Stable Diffusion 1.5 and Stable Diffusion XL; others need their diffusers folder.",
    )


def _hub(name: str) -> ModelSource:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    snapshot = hub_snapshot(name)
    if snapshot is not None:
        found = _folder(name, snapshot)
        return ModelSource(name, "hub", snapshot, found.family)
    try:
        index = Path(hf_hub_download(name, INDEX))
    except GatedRepoError:
        raise WeightsError(f"{name} asks for consent on the hub first.", "Accept its terms there and log in.") from None
    except RepositoryNotFoundError:
        raise WeightsError(f"The hub has no model {name}.", "Check its name; private models need a login.") from None
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"{name} is not in the hub cache ({hub_cache()}), and the hub cannot be reached.",
            "Connect to the network once, or give a folder on this machine.",
        ) from None
    except EntryNotFoundError:
        raise WeightsError(f"{name} has no {INDEX}: it is not a diffusers model.", "Choose another model.") from None
    family = family_of_index(_read_json(index, f"{name} cannot be used"), name)
    return ModelSource(name, "hub", None, family.name)


def hub_cache() -> Path:
    """Where the hub's files are kept on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def hub_snapshot(name: str) -> Path | None:
    """The folder of a hub model that lies complete in the cache, or None."""
    root = hub_cache() / ("models--" + name.replace("/", "--"))
    revision = root / "refs" / "main"
    if not revision.is_file():
        return None
    snapshot = root / "snapshots" / revision.read_text().strip()
    try:
        _folder(name, snapshot)
    except WeightsError:
        return None  # only a part was downloaded, such as the index
    return snapshot


def native_size(source: ModelSource) -> tuple[int, int]:
    """The (width, height) in pixels a model was trained for, as its own settings say; else its family's usual size."""
    family = FAMILIES[source.family]
    if source.kind == "single_file" or source.path is None:
        return family.default_size
    config = _read_json(source.path / family.denoiser / "config.json", f"{source.path} cannot be used")
    vae = _read_json(source.path / "vae" / "config.json", f"{source.path} cannot be used")
    size: object = config.get("sample_size")
    if isinstance(size, list):
        height, width = cast(list[int], size)[:2]
    elif isinstance(size, int):
        height = width = size
    else:
        return family.default_size  # FLUX.1 has no size of its own
    blocks: list[int] = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [0] * 4
    scale = 2 ** (len(blocks) - 1)  # pixels per latent, along one side
    return width * scale, height * scale


def check_weights(source: ModelSource) -> None:
    """Read every weight file's header, so that a damaged copy is named before anything is loaded.

    Raises:
        WeightsError: A file is missing, cut off or not a safetensors file.
    """
    for file in source_files(source):
        try:
            read_header(file)
        except AdapterError as error:
            raise WeightsError(f"The model {source.name} is damaged: {error.message}", error.hint) from None


def source_files(source: ModelSource) -> Iterator[Path]:
    """The weight files of a model that is on this machine."""
    if source.path is None:
        return
    if source.kind == "single_file":
        yield source.path
        return
    for part in FAMILIES[source.family].modules:
        yield from weight_files(source.path / part)


def unet_shapes(source: ModelSource) -> Mapping[str, tuple[int, ...]]:
    """List every weight of a model: its module's path with the component in front, and its shape.

    Text encoder paths always carry `text_model.`, as adapter files do. A single file has its family's own layers.

    Raises:
        WeightsError: A weight file cannot be read.
    """
    from .architectures import canonical, reference

    if source.kind == "single_file" or source.path is None:
        if source.family not in ("sd15", "sdxl"):
            raise WeightsError(f"{source.name} was not downloaded yet.", "Make a picture with it first.")
        return reference(source.family).shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for part in FAMILIES[source.family].modules:
        for file in weight_files(source.path / part):
            try:
                tensors = read_header(file).tensors
            except AdapterError as error:
                raise WeightsError(f"The model {source.name} is damaged: {error.message}", error.hint) from None
            for name, info in tensors.items():
                if name.endswith(".weight"):
                    path = f"{part}.{name.removesuffix('.weight')}"
                    shapes[canonical(path)] = info.shape
    return shapes
