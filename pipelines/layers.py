"""Pair the tensors of an adapter file into layers of a model, check every shape, and find each layer's alpha."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from . import dora
from .architectures import ModuleIndex, Shape, canonical
from .dialects import split_key
from .dora import magnitude_of
from .errors import AdapterError
from .header_table import shorten
from .headers import Header
from .kind import MAGNITUDES, Kind, kind_of, show
from .numbered_names import EMBEDDING
from .transformer_names import Piece

PEFT_KEY = "lora_adapter_metadata"
MAX_RANK = 65_536
MAX_ALPHA = 1e6  # of either sign: sliders have negative ones
MAX_TEXT = 2**22  # characters of a text that is parsed
Pattern = Mapping[str, tuple[int, float]]  # ending of a module's path -> its place in the list, and a number


@dataclass(frozen=True)
class LayerNames:
    """Which tensors of the file make up one layer.

    Args:
        kind: Of the layer.
        parts: Part, as its kind calls it, to tensor name; alpha and a magnitude are among them.
        piece: The layer of the model, and which rows of the file's it takes.
    """

    kind: Kind
    parts: Mapping[str, str]
    piece: Piece

    @property
    def alpha(self) -> str | None:
        return self.parts.get("alpha")

    @property
    def own(self) -> dict[str, str]:
        """The parts of the kind itself."""
        return {part: name for part, name in self.parts.items() if part not in (*MAGNITUDES, "alpha")}

    def shapes(self, header: Header) -> dict[str, Shape]:
        """Shapes of all parts."""
        return {part: header.tensors[name].shape for part, name in self.parts.items()}

    def rank(self, header: Header) -> int:
        """Rank of the factors, 0 where there is none."""
        return self.kind.rank(self.shapes(header))


@dataclass(frozen=True)
class Collected:
    """The layers of a file by canonical path.

    Args:
        layers: Those whose module exists in the model (or that a file names plainly, see `collect`).
        unmatched: Spellings, as in the file, of modules the model does not have.
        strange: Tensor names that end like no adapter tensor.
        incomplete: Modules whose tensors make up no layer of any kind.
        styles: The dialects that occur.
        words: Learned words the file carries besides its layers; see learned_words.py.
    """

    layers: dict[str, LayerNames] = field(default_factory=dict[str, LayerNames])
    unmatched: list[str] = field(default_factory=list[str])
    strange: list[str] = field(default_factory=list[str])
    incomplete: list[str] = field(default_factory=list[str])
    styles: set[str] = field(default_factory=set[str])
    words: list[str] = field(default_factory=list[str])

    @property
    def modules(self) -> int:
        return len(self.layers) + len(self.unmatched)


def collect(header: Header, index: ModuleIndex, plain: bool = False) -> Collected:
    """Pair a file's tensors and look their modules up.

    Args:
        header: Of the file.
        index: The model's modules.
        plain: Also take modules the index lacks, if the file names component and path with dots; for reading a file
            without its model at hand, which is checked again when it is attached.

    Raises:
        AdapterError: Two spellings of the file name the same layer.
    """
    found = Collected()
    groups: dict[tuple[tuple[str, ...], str], dict[str, str]] = {}
    for name in header.tensors:
        key = split_key(name, header.tensors)
        if key is None:
            (found.words if EMBEDDING.fullmatch(name) else found.strange).append(name)
            continue
        if key.style:
            found.styles.add(key.style)
        groups.setdefault((key.components, key.module), {})[key.part] = name
    for (components, module), parts in groups.items():
        kind = kind_of(frozenset(parts))
        if kind is None:
            found.incomplete.append(module)
            continue
        pieces = find_pieces(index, components, module)
        if not pieces and plain and (path := plain_path(components, module)):
            pieces = (Piece(path, (), ()),)
        if not pieces:
            found.unmatched.append(module)
        for piece in pieces:
            if piece.path in found.layers:
                raise AdapterError(
                    f"{header.path.name} holds the layer {piece.path} twice, in two spellings.",
                    "Ask its author for a file that holds it once.",
                )
            found.layers[piece.path] = LayerNames(kind, parts, piece)
    return found


def find_pieces(index: ModuleIndex, components: tuple[str, ...], module: str) -> tuple[Piece, ...]:
    """Look a spelling up in each component it may belong to."""
    return next((pieces for name in components if (pieces := index.pieces(name, module))), ())


def plain_path(components: tuple[str, ...], module: str) -> str | None:
    """Give the path of a module that is spelled with dots under one component, so that no list is needed to read it."""
    return canonical(f"{components[0]}.{module}") if len(components) == 1 and "." in module else None


def misfit(header: Header, path: str, names: LayerNames, alone: bool = False) -> str | None:
    """Say in words why a layer's tensors do not fit together or (unless `alone`) onto their module, or give None."""
    shapes, target = names.shapes(header), None if alone else names.piece.whole or None
    own = {part: shapes[part] for part in names.own}
    empty = next((part for part, shape in shapes.items() if 0 in shape), None)
    wrong = f"its {empty} {show(shapes[empty])} is empty" if empty else names.kind.fit(own, target)
    part = magnitude_of(shapes)
    if wrong is None and part is not None:
        wrong = dora.misfit(part, shapes[part], target)
        if wrong is None and names.piece.rows and not dora.per_output(part, shapes[part], target):
            wrong = "its magnitude per input belongs to a fused layer, which is several here"
    return f"{path}: {wrong}" if wrong else None


def misfits(header: Header, found: Collected, alone: bool = False) -> list[str]:
    """List what does not fit, layer by layer, in words; `alone`, what does not even fit together."""
    words = (misfit(header, path, names, alone) for path, names in found.layers.items())
    return [text for text in words if text]


@dataclass(frozen=True)
class PeftScale:
    """What is believed of an untrusted PEFT configuration: numbers only, never a list of modules to touch."""

    r: int
    alpha: float
    rank_pattern: Pattern
    alpha_pattern: Pattern
    rank_stabilised: bool


def peft_scales(metadata: Mapping[str, str]) -> tuple[dict[str, PeftScale], list[str]]:
    """Read `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern` (and `use_rslora`) per component from the header text.

    Returns:
        Scales by component, and warnings about what was ignored.
    """
    raw = metadata.get(PEFT_KEY)
    if raw is None:
        return {}, []
    try:
        parsed = json.loads(raw) if len(raw) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        return {}, [f"{PEFT_KEY} in the file cannot be read and was ignored: every layer gets alpha = rank."]
    values = cast(dict[str, Any], parsed)
    scales: dict[str, PeftScale] = {}
    warnings: list[str] = []
    for component in ("unet", "text_encoder", "text_encoder_2", "transformer"):
        prefix = component + "."
        mine = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if not mine:
            continue
        scale = _peft_scale(mine)
        if scale is None:
            warnings.append(f"{PEFT_KEY} for {component} is malformed and was ignored: alpha = rank.")
        else:
            scales[component] = scale
    return scales, warnings


def _peft_scale(values: Mapping[str, Any]) -> PeftScale | None:
    r, alpha = values.get("r"), values.get("lora_alpha")
    ranks, alphas = _pattern(values.get("rank_pattern")), _pattern(values.get("alpha_pattern"))
    if not _number(r) or not _number(alpha) or not 1 <= r <= MAX_RANK or ranks is None or alphas is None:
        return None
    if any(abs(number) > MAX_ALPHA for number in (alpha, *(number for _, number in alphas.values()))):
        return None
    return PeftScale(int(r), float(alpha), ranks, alphas, values.get("use_rslora") is True)


def _number(value: object) -> TypeGuard[int | float]:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        return False


def _pattern(value: object) -> Pattern | None:
    """PEFT's patterns are regular expressions; only plain module paths are taken from a stranger's file."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return None
    pairs = cast(dict[str, Any], value)
    if not all(_number(number) for number in pairs.values()):
        return None
    found: dict[str, tuple[int, float]] = {}
    for place, (key, number) in enumerate(pairs.items()):
        found.setdefault(key.removeprefix("^").replace("\\.", "."), (place, float(number)))
    return found


def _by_pattern(pattern: Pattern, path: str, default: float) -> float:
    """The number of the first row of a pattern that a path ends with, found by the path's few endings."""
    steps = path.split(".")[1:]
    endings = (".".join(steps[start:]) for start in range(len(steps)))
    rows = [pattern[ending] for ending in endings if ending in pattern]
    return min(rows)[1] if rows else default


def alphas(header: Header, found: Collected) -> tuple[dict[str, float], list[str]]:
    """Give the alpha of every layer that has a rank: its own tensor first, then the PEFT configuration, else its rank.

    Raises:
        AdapterError: An alpha tensor is not one number, or an absurd one.
    """
    scales, warnings = peft_scales(header.metadata)
    given = _given(header, found)
    result: dict[str, float] = {}
    disagree: list[str] = []
    for path, names in found.layers.items():
        rank = names.rank(header)
        if not rank:
            continue
        result[path] = float(rank)
        scale = scales.get(path.split(".", 1)[0])
        if names.alpha:
            result[path] = given[names.alpha]
        elif scale:
            if _by_pattern(scale.rank_pattern, path, scale.r) != rank:
                disagree.append(path)
                continue
            alpha = _by_pattern(scale.alpha_pattern, path, scale.alpha)
            result[path] = alpha * math.sqrt(rank) if scale.rank_stabilised else alpha
    if disagree:
        warnings.append(
            f"{PEFT_KEY} gives {len(disagree)} layers another rank than their tensors have; "
            f"it was ignored there (alpha = rank). First: {disagree[0]}."
        )
    return result, warnings


def _given(header: Header, found: Collected) -> dict[str, float]:
    """Every alpha tensor's number, read in one go."""
    names = [names.alpha for names in found.layers.values() if names.alpha and names.rank(header)]
    single = {name for name in names if math.prod(header.tensors[name].shape) == 1}
    values = header.numbers(single)
    for name in names:
        if name not in single or not abs(values[name]) <= MAX_ALPHA:
            raise AdapterError(
                f"{header.path.name}: {shorten(name)} is not one number that an alpha can be.",
                "It is damaged: use another file, or an earlier checkpoint.",
            )
    return values
