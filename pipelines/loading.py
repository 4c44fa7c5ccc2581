"""Load a model's components from a diffusers folder, a single checkpoint file or the hub. Never reaches out by itself.

Single files hold no settings and no tokenizer, so those of SD1.5 and SDXL lie in assets/configs: the published
configurations, and CLIP's merge list from which its vocabulary follows.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from .errors import AdapterError, WeightsError
from .families import FAMILIES, Family
from .headers import read_header
from .sources import ModelSource, check_weights, variant_of, weight_files

D: Any = diffusers  # its lazy names are invisible to type checkers
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def load_components(source: ModelSource, dtype: torch.dtype) -> dict[str, Any]:
    """Load everything a model consists of, on the CPU, ready for inference (no gradients, no dropout).

    Args:
        source: Where it is; a hub model that is not in the cache is downloaded.
        dtype: Of denoiser and text encoders; the autoencoder is always float32 (SDXL's overflows in float16).

    Returns:
        Component name, as in `model_index.json`, to component; `settings` holds the pipeline's own settings.

    Raises:
        WeightsError: Something is missing, damaged or does not fit.
    """
    _quiet()
    if source.path is None:
        source = download(source)
    check_weights(source)
    family = FAMILIES[source.family]
    try:
        pipeline = (
            _single_file(source, family, dtype) if source.kind == "single_file" else _folder(source, family, dtype)
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "alloc" in str(error).lower():
            raise
        first = str(error).strip().split("\n")[0][:300]
        raise WeightsError(
            f"The model {source.name} cannot be loaded: {first}", "Copy or download it again."
        ) from error
    components = {name: part for name, part in pipeline.components.items() if part is not None}
    for name in family.modules:
        module = components.get(name)
        if module is not None:
            _ready(source, name, module, torch.float32 if name == "vae" else dtype)
    _complete(source, family, components)
    components["settings"] = dict(pipeline.config)
    return components


def _quiet() -> None:
    """The libraries' progress bars and advice to programmers do not belong into a person's terminal."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _folder(source: ModelSource, family: Family, dtype: torch.dtype) -> Any:  # noqa: ANN401
    assert source.path is not None
    kind = getattr(D, family.pipeline_class)
    index: dict[str, Any] = kind.load_config(source.path, local_files_only=True)
    parts = (*family.text_encoders, *family.tokenizers)
    absent: dict[str, Any] = {name: None for name in parts if index.get(name, [None])[0] is None}
    if family.name == "sd15":
        absent |= {name: None for name in UNUSED} | {"requires_safety_checker": False}
    variant = variant_of(source.path, family.denoiser)
    return kind.from_pretrained(
        source.path, dtype=dtype, local_files_only=True, use_safetensors=True, variant=variant, **absent
    )


def config_folder(family: str) -> Path:
    """The published settings of a family whose models come in single files."""
    return Path(str(files("intarsia.assets").joinpath("configs", family)))


def _single_file(source: ModelSource, family: Family, dtype: torch.dtype) -> Any:  # noqa: ANN401
    assert source.path is not None
    config = config_folder(family.name)
    tokenizers = {name: clip_tokenizer("!" if name == "tokenizer_2" else "<|endoftext|>") for name in family.tokenizers}
    return getattr(D, family.pipeline_class).from_single_file(
        str(source.path),
        config=str(config),
        local_files_only=True,
        dtype=dtype,
        scheduler=_scheduler(config, family, source.path),
        **tokenizers,
    )


def _scheduler(config: Path, family: Family, checkpoint: Path) -> Any:  # noqa: ANN401
    """The family's scheduler, told what the checkpoint's marker tensors say of its training."""
    found = read_header(checkpoint).tensors
    changes: dict[str, Any] = {}
    if "v_pred" in found:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in found:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = D.PNDMScheduler if family.name == "sd15" else D.EulerDiscreteScheduler
    if "ztsnr" in found and kind is D.PNDMScheduler:
        kind = D.DDIMScheduler  # PNDM cannot start from pure noise
    return kind.from_config(kind.load_config(config, subfolder="scheduler"), **changes)


@cache
def clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """CLIP's vocabulary and merges, from the merge list OpenAI published (MIT licence)."""
    raw = files("intarsia.assets").joinpath("configs/clip_vocabulary.txt.gz").read_bytes()
    lines = gzip.decompress(raw).decode("utf-8").splitlines()
    merges = tuple((left, right) for left, right in (line.split() for line in lines))
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [chr(256 + index) for index in range(256 - len(plain))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def clip_tokenizer(pad: str) -> Any:  # noqa: ANN401
    """CLIP's tokenizer; SD1.5 and SDXL's first pad with the end token, SDXL's second with "!"."""
    vocabulary, merges = clip_vocabulary()
    kind: Any = CLIPTokenizer
    return kind(vocab=vocabulary, merges=list(merges), pad_token=pad, model_max_length=77)


def download(source: ModelSource) -> ModelSource:
    """Fetch a hub model into the hub's cache: only the files that are used, never pickles.

    Raises:
        WeightsError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from .sources import resolve

    patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
    try:
        snapshot_download(source.name, allow_patterns=patterns, ignore_patterns=["safety_checker/*", "*.fp16.*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise WeightsError(
            f"{source.name} could not be downloaded: {first}", "Check the network, then try again."
        ) from error
    found = resolve(source.name)
    if found.path is None:
        raise WeightsError(f"{source.name} lacks files that are needed.", "Choose another model.")
    return found


def _ready(source: ModelSource, name: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
    missing = [key for key, weight in module.named_parameters() if weight.is_meta]
    if missing:
        raise WeightsError(
            f"{source.name} lacks {len(missing)} tensors of its {name}: {', '.join(missing[:3])}.", "Use another copy."
        )
    module.requires_grad_(False).eval().to(dtype)


def _complete(source: ModelSource, family: Family, components: dict[str, Any]) -> None:
    """Refuse a denoiser some of whose tensors came from no file: the library would leave them random."""
    if source.kind == "single_file" or source.path is None:
        return
    try:
        stored = {key for file in weight_files(source.path / family.denoiser) for key in read_header(file).tensors}
    except AdapterError as error:
        raise WeightsError(error.message, error.hint) from None
    missing = [key for key, _ in components[family.denoiser].named_parameters() if key not in stored]
    if missing:
        raise WeightsError(
            f"{source.name} lacks {len(missing)} tensors of its {family.denoiser}: {', '.join(missing[:3])}.",
            "Copy it again.",
        )
