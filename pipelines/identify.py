"""Say what a dropped adapter file is: family, algorithm, rank, role, trigger words; or what it is not, by name.

Evidence in this order: tensor names and shapes, then metadata, never the file name. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .adapter_types import Role
from .architectures import ModuleIndex, Shape, reference
from .dialects import (
    ALGORITHMS,
    ENTRANCE,
    FAMILIES,
    MODELS,
    TEXT_WIDTHS,
    WIDTHS,
    Foreign,
    claimed_family,
    recognise,
    split_key,
)
from .dora import magnitude_of
from .headers import Header, hashes, read_header
from .kind import flat, kinds
from .layers import Collected, alphas, collect, misfit, misfits
from .report import ATTACHED, YARDSTICKS, Confidence, Report
from .sources import mini_folder, resolve, unet_shapes
from .trigger_words import CAPTIONS, MAX_CAPTIONS, text_of, trigger_words
from .verdict import broken, first, judge

__all__ = ["HALVES", "Report", "inspect"]

# B-LoRA: the SDXL attention blocks that hold content and style (arXiv:2403.14572).
HALVES: dict[Role, str] = {"content": "unet.up_blocks.0.attentions.0.", "style": "unet.up_blocks.0.attentions.1."}


def inspect(path: Path, shapes: Mapping[str, Shape] | None = None) -> Report:
    """Read a file's header and values and say what it is.

    Args:
        path: A .safetensors file.
        shapes: The weights of the model it is meant for (`sources.unet_shapes`); without it, the real SD 1.5 and SDXL
            are the yardstick.

    Raises:
        AdapterError: The file is no sound safetensors file; what is sound but not usable has a `refusal` instead.
    """
    header = read_header(path)
    whole, buffer = hashes(header)
    dtypes = tuple(sorted({info.dtype for info in header.tensors.values()}))
    trigger, triggers = trigger_words(header.metadata)
    bare = Report(
        path=path,
        size=header.size,
        sha256=whole,
        tensor_sha256=buffer,
        metadata=header.metadata,
        dtypes=dtypes,
        trigger=trigger,
        triggers=triggers,
        base=text_of(header.metadata, "intarsia.base", "ss_sd_model_name", "ss_base_model_version"),
        base_hash=text_of(header.metadata, "intarsia.base_hash", "ss_new_sd_model_hash", "ss_sd_model_hash"),
    )
    foreign = _foreign(bare, header)
    if foreign:
        return foreign
    return _plain_lora(bare, header, shapes)


def _foreign(bare: Report, header: Header) -> Report | None:
    """Recognise what is refused: other algorithms, other families, things that are no adapters."""
    name = bare.path.name
    names = header.tensors
    if not names:
        return replace(bare, refusal=f"{name} holds no tensors.", hint="Download it again.")
    algorithm = recognise(names, ALGORITHMS)
    if algorithm is None and not any("lora" in key or split_key(key, names) for key in names):
        model = recognise(names, MODELS) or (MODELS[0] if _is_embedding(header) else None)
        if model:
            text = f"{name} is {model.title}, not an adapter."
            return replace(bare, algorithm=model.name, refusal=text, hint=model.hint)
    family = recognise(names, FAMILIES)
    if algorithm:
        where = f" for {family.title}" if family else ""
        known = family.name if family else _named_family(header)
        text = f"{name} is {algorithm.title}{where}; it cannot be used here."
        return replace(bare, family=known, algorithm=algorithm.name, refusal=text, hint=algorithm.hint)
    if family is None:
        return None
    other = _other_width(header, family)
    shared = family.name == "transformer" and choose_family(header, None).family  # diffusers' own names, of several
    if other is None and (shared or family.name in ATTACHED):
        return None
    known, title = other or (family.name, family.title)
    what = title if family.itself else f"an adapter for {title}"
    text = f"{name} is {what}; it cannot be used here."
    return replace(bare, family=known, algorithm=_kinds_named(names), refusal=text, hint=family.hint)


def _other_width(header: Header, family: Foreign) -> tuple[str, str] | None:
    """Tell a relative that has the same names by the width of what its attention takes in."""
    entrances = (info.shape for name, info in header.tensors.items() if ENTRANCE.search(name))
    return WIDTHS.get(family.name, {}).get(next((shape[1] for shape in entrances if len(shape) == 2), 0))


def _is_embedding(header: Header) -> bool:
    """Whether a file holds a few rows as wide as a text encoder and nothing else."""
    return len(header.tensors) <= 3 and all(
        "." not in name and len(info.shape) in (1, 2) and info.shape[-1] in TEXT_WIDTHS
        for name, info in header.tensors.items()
    )


def _kinds_named(names: Iterable[str]) -> str:
    """Name the kinds whose parts occur among tensor names, in a file whose modules are not known."""
    known = frozenset(names)
    parts = {key.part for name in known if (key := split_key(name, known))} - {"alpha"}
    found = [kind.name for kind in kinds().values() if parts & frozenset().union(*kind.required)]
    return ", ".join(found) or ("lora" if any("lora" in name for name in known) else "")


def _named_family(header: Header) -> str:
    """A foreign algorithm on a known model: tell the family by module names alone."""
    for marker, family in (("lora_te2_", "sdxl"), ("text_encoder_2.", "sdxl"), ("put_blocks_", "sdxl")):
        if any(marker in name for name in header.tensors):
            return family
    return claimed_family(dict(header.metadata))


def _plain_lora(bare: Report, header: Header, shapes: Mapping[str, Shape] | None) -> Report:
    index = ModuleIndex(shapes) if shapes is not None else None
    choice = choose_family(header, index)
    against = index or yardstick(choice.yardstick)
    found = collect(header, against)
    if found.strange or found.incomplete or not found.modules:
        return replace(bare, family=choice.family, **broken(bare.path.name, found))
    wrong = misfits(header, found)
    values, warnings = alphas(header, found)
    ranks = Counter(rank for names in found.layers.values() if (rank := names.rank(header)))
    report = replace(
        bare,
        family=choice.family,
        algorithm=_algorithm(header, found),
        rank=ranks.most_common(1)[0][0] if ranks else 0,
        ranks=dict(sorted(ranks.items())),
        alpha=(min(values.values(), default=0.0), max(values.values(), default=0.0)),
        modules=found.modules,
        matched=len(found.layers) - (len(wrong) if index else 0),
        unmatched=tuple(found.unmatched),
        misfits=tuple(wrong),
        components=dict(Counter(path.split(".", 1)[0] for path in found.layers)),
        yardstick="" if index else choice.yardstick,
        dialect=", ".join(sorted(found.styles)),
        base=bare.base or ("mini" if choice.yardstick == "mini" and not wrong else ""),
        halves=find_halves(choice.family, found),
        confidence=choice.confidence,
        reason=choice.reason,
        warnings=(*warnings, *choice.warnings, *_words(header, found)),
    )
    report = replace(report, role=find_role(report))
    mixed = "" if index else _mixture(header, found, choice)
    return judge(report, header, found, values, index, mixed)


def _mixture(header: Header, found: Collected, choice: Choice) -> str:
    """Name the models whose layers a file mixes: some fit one exactly, and of the others some fit another."""
    fitting = _fitting(header, found)
    strays = frozenset(header.tensors) - fitting
    if not fitting or not strays:
        return ""
    for name in present_yardsticks():
        family, called = YARDSTICKS[name]
        if family != choice.family and strays & _fitting(header, collect(header, yardstick(name))):
            return f"{YARDSTICKS[choice.yardstick][1]} and of {called}"
    return ""


def _fitting(header: Header, found: Collected) -> frozenset[str]:
    """The tensors of layers that fit their module."""
    layers = (names for path, names in found.layers.items() if not misfit(header, path, names))
    return frozenset(tensor for names in layers for tensor in names.parts.values())


def _algorithm(header: Header, found: Collected) -> str:
    """Name what the file holds: its kinds, LoRA with convolutions as "locon", with magnitudes "dora"."""
    names: set[str] = set()
    for layer in found.layers.values():
        shapes = layer.shapes(header)
        conv = "mid" in shapes or len(flat(shapes.get("down", ()))) == 4
        name = "locon" if layer.kind.name == "lora" and conv else layer.kind.name
        names.add({"lora": "dora", "locon": "dora"}.get(name, f"{name}, dora") if magnitude_of(shapes) else name)
    if "locon" in names:
        names.discard("lora")
    return ", ".join(sorted(names))


def _words(header: Header, found: Collected) -> list[str]:
    """Warn of learned words, without which a prompt that holds them means little, and of words that were not read."""
    warnings: list[str] = []
    if found.words:
        warnings.append(f"It brings words of its own, which belong in the prompt: {first(found.words)}.")
    if len(header.metadata.get(CAPTIONS, "")) > MAX_CAPTIONS:
        warnings.append("Its table of captions is too long to be read, so frequent words are not known.")
    return warnings


@dataclass(frozen=True)
class Choice:
    """Which family a file is for, how sure that is and from what, and which yardstick its layers fit best."""

    family: str
    yardstick: str
    confidence: Confidence
    reason: str
    warnings: tuple[str, ...] = ()


@cache
def yardstick(name: str) -> ModuleIndex:
    """The layers of a model that is known without being given.

    Raises:
        WeightsError: Mini is asked for and not installed.
    """
    return ModuleIndex(unet_shapes(resolve("mini"))) if name == "mini" else reference(name)


def present_yardsticks() -> list[str]:
    """All of them, Mini only where it is installed."""
    return [name for name in YARDSTICKS if name != "mini" or (mini_folder() / "model_index.json").is_file()]


def choose_family(header: Header, index: ModuleIndex | None) -> Choice:
    """Tell the family. Shapes decide; where they fit several or none, names; then what the file claims."""
    if index is not None:
        found = collect(header, index)
        if found.layers and not found.unmatched and not misfits(header, found) and index.family:
            return Choice(index.family, index.family, "certain", f"all {found.modules} layers fit the model")
    claim = claimed_family(dict(header.metadata))
    present = present_yardsticks()
    scores = {name: _score(header, yardstick(name)) for name in present}
    best = max(scores.values())
    if best == (0, 0):
        return Choice("", "sdxl", "guess", "no layer is known")
    leading = [name for name in present if scores[name] == best]
    leading = [name for name in leading if name != "mini"] or leading
    if len(leading) == 1:
        family = YARDSTICKS[leading[0]][0]
        what = f"shapes of {best[0]} layers" if best[0] else f"names of {best[1]} layers"
        lie = f"The file claims to be for {claim}; its tensors say {family}."
        warnings = (lie,) if claim and claim != family else ()
        return Choice(family, leading[0], "certain" if best[0] else "likely", what, warnings)
    if claim in leading:
        return Choice(claim, claim, "likely", "what the file says of itself; the layers exist in several families")
    if any(name.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for name in header.tensors):
        return Choice("sdxl", "sdxl", "likely", "the names of its text encoder layers")
    unsure = ("It may be for SD 1.5 or for SDXL.",)
    return Choice(leading[0], leading[0], "guess", "its layers exist in several families", unsure)


def _score(header: Header, index: ModuleIndex) -> tuple[int, int]:
    found = collect(header, index)
    return len(found.layers) - len(misfits(header, found)), len(found.layers)


def find_halves(family: str, found: Collected) -> tuple[Role, ...]:
    """Give the B-LoRA halves of a file whose layers all lie in the content and style blocks, else nothing."""
    prefixes = tuple(HALVES.values())
    if family != "sdxl" or found.unmatched or not all(path.startswith(prefixes) for path in found.layers):
        return ()
    return tuple(role for role, prefix in HALVES.items() if any(path.startswith(prefix) for path in found.layers))


def find_role(report: Report) -> Role:
    """One half says its role by its block; otherwise the file may say it."""
    if len(report.halves) == 1:
        return report.halves[0]
    said = report.metadata.get("intarsia.role", "")
    return said if said in ("content", "style", "concept") else "concept"


def half_tensors(header: Header, role: Role) -> list[str]:
    """Name the tensors of an SDXL adapter that make up its content or style half."""
    found = collect(header, reference("sdxl"))
    parts = [names.parts for path, names in found.layers.items() if path.startswith(HALVES[role])]
    return [name for names in parts for name in names.values()]
