"""Say what a dropped adapter file is: family, algorithm, rank, role, trigger words; or what it is not, by name.

Evidence in this order: tensor names and shapes, then metadata, never the file name. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .adapter_types import Role
from .architectures import ModuleIndex, Shape, reference
from .dialects import ALGORITHMS, FAMILIES, MODELS, Foreign, claimed_family, recognise, split_key
from .dora import magnitude_of
from .errors import AdapterError
from .headers import Header, hashes, read_header, scan
from .kind import flat, kinds
from .layers import Collected, LayerNames, alphas, collect, misfits
from .sources import mini_folder, resolve, unet_shapes
from .trigger_words import text_of, trigger_words

Confidence = Literal["certain", "likely", "guess"]
# What a file without its model is held against: name, family and title. Mini has SDXL's blocks, and widths of its own.
YARDSTICKS: dict[str, tuple[str, str]] = {
    "sd15": ("sd15", "SD 1.5"),
    "sdxl": ("sdxl", "SDXL"),
    "mini": ("sdxl", "Mini"),
    "flux1": ("flux1", "FLUX.1"),
    "sd3": ("sd3", "SD 3 medium"),
    "sd35-large": ("sd3", "SD 3.5 large"),
    "wan-1.3b": ("wan", "Wan 1.3B"),
    "wan-14b": ("wan", "Wan 14B"),
}
ATTACHED = frozenset(family for family, _ in YARDSTICKS.values())
# B-LoRA: the SDXL attention blocks that hold content and style (arXiv:2403.14572).
HALVES: dict[Role, str] = {"content": "unet.up_blocks.0.attentions.0.", "style": "unet.up_blocks.0.attentions.1."}
SD2_WIDTH = 1024  # of its text encoder; SD 1.x has 768
CONVERT_PLAIN = "Use an adapter made for SD 1.5, SDXL, SD 3, FLUX.1, Wan or Mini."


@dataclass(frozen=True)
class Report:
    """What is known of an adapter file.

    Args:
        path: The file.
        family: Key of FAMILIES or the name of a foreign family; "" if unknown.
        algorithm: "lora", "locon" (with convolutions), or the name of a foreign algorithm; "" if unknown.
        refusal: One sentence if the file cannot be used, else "".
        hint: What to do about a refusal.
        rank: The most common rank; 0 if there are no layers.
        ranks: How many layers have which rank.
        alpha: Smallest and largest alpha.
        modules: Layers in the file.
        matched: Of them, those whose module exists in the model and has the right shape; without a model, those the
            family has by name.
        unmatched: Layers without a module, as the file spells them.
        misfits: Layers of another shape than their module, in words.
        yardstick: The model without weights its layers were held against: "sd15", "sdxl", "mini"; "" if a model was
            given.
        dialect: How the names are spelled.
        trigger: Words the prompt should hold, "" if none are known.
        triggers: More words from the captions, most frequent first.
        base: Name of the model it was made for, "" if the file does not say.
        base_hash: Its hash as other tools write it.
        role: What it depicts.
        halves: B-LoRA halves it can be cut into.
        sha256: Of the file. `tensor_sha256`: of the tensors alone.
        confidence: How sure the family is; `reason` says from what.
        warnings: What a person should know before using it.
    """

    path: Path
    size: int
    sha256: str
    tensor_sha256: str
    metadata: Mapping[str, str]
    family: str = ""
    algorithm: str = ""
    refusal: str = ""
    hint: str = ""
    rank: int = 0
    ranks: Mapping[int, int] = field(default_factory=dict[int, int])
    alpha: tuple[float, float] = (0.0, 0.0)
    dtypes: tuple[str, ...] = ()
    modules: int = 0
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    components: Mapping[str, int] = field(default_factory=dict[str, int])
    yardstick: str = ""
    dialect: str = ""
    trigger: str = ""
    triggers: tuple[str, ...] = ()
    base: str = ""
    base_hash: str = ""
    role: Role = "concept"
    halves: tuple[Role, ...] = ()
    confidence: Confidence = "guess"
    reason: str = ""
    warnings: tuple[str, ...] = ()

    def require_usable(self) -> None:
        """Raise the refusal as an AdapterError, if there is one."""
        if self.refusal:
            raise AdapterError(self.refusal, self.hint)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the raw metadata, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "metadata"}
        return {**values, "path": str(self.path), "ranks": {str(rank): n for rank, n in self.ranks.items()}}


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
    algorithm, family = recognise(names, ALGORITHMS), recognise(names, FAMILIES)
    if algorithm:
        where = f" for {family.title}" if family else ""
        known = family.name if family else _named_family(header)
        text = f"{name} is {algorithm.title}{where}; it cannot be used here."
        return replace(bare, family=known, algorithm=algorithm.name, refusal=text, hint=algorithm.hint)
    if family and family.name == "transformer" and choose_family(header, None).family:
        family = None  # diffusers' own names, which several models share
    if family and family.name not in ATTACHED:
        text = f"{name} is an adapter for {family.title}; it cannot be used here."
        return replace(bare, family=family.name, algorithm=_kinds_named(names), refusal=text, hint=family.hint)
    adapter = any("lora" in key or split_key(key, names) for key in names)
    model: Foreign | None = None if adapter else recognise(names, MODELS)
    if model:
        return replace(bare, algorithm=model.name, refusal=f"{name} is {model.title}, not an adapter.", hint=model.hint)
    return None


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
        return replace(bare, family=choice.family, **_broken(bare.path.name, found))
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
        warnings=(*warnings, *choice.warnings, *_words(found)),
    )
    report = replace(report, role=find_role(report))
    return _judge(report, header, found, values, index)


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


def _words(found: Collected) -> tuple[str, ...]:
    """Warn of learned words, without which a prompt that holds them means little."""
    if not found.words:
        return ()
    return (f"It carries learned words, which are not used: {', '.join(found.words)}.",)


def _broken(name: str, found: Collected) -> dict[str, str]:
    if not found.modules and not found.incomplete:
        return {"refusal": f"{name} holds no adapter layers that are known here.", "hint": CONVERT_PLAIN}
    odd = found.strange or found.incomplete
    what = "tensors that are no part of an adapter" if found.strange else "layers that lack some of their tensors"
    return {"refusal": f"{name} holds {len(odd)} {what}: {_first(odd)}.", "hint": CONVERT_PLAIN}


def _judge(
    report: Report, header: Header, found: Collected, values: Mapping[str, float], index: ModuleIndex | None
) -> Report:
    """Look at the values, and decide whether what was found can be used."""
    name, warnings = report.path.name, list(report.warnings)
    seen = scan(header)
    if seen.not_finite:
        text = f"{name} holds NaN or infinity, first in {seen.not_finite}."
        return replace(report, refusal=text, hint="Its training failed; use another file or an earlier checkpoint.")
    if found.layers and all(_dead(names, values.get(path), seen.zeros) for path, names in found.layers.items()):
        warnings.append("This adapter does nothing: every layer's change is zero.")
    if index is None and report.misfits and report.family:
        made = f"Made for {report.base}: " if report.base else ""
        some = f"{len(report.misfits)} of {report.modules} layers do not fit {_title(report)} itself"
        warnings.append(f"{made}{some}, first {report.misfits[0]}.")
    report = replace(report, warnings=tuple(warnings))
    if index is not None and report.matched < report.modules:
        return replace(
            report,
            refusal=misfit_sentence(report),
            hint=f"It was made for {_made_for(report)}: choose such a model, or another adapter.",
        )
    if _is_sd2(header, found):
        return replace(
            report,
            family="sd2",
            refusal=f"{name} is an adapter for Stable Diffusion 2; it cannot be used here.",
            hint=CONVERT_PLAIN,
        )
    if not found.layers:
        text = f"{name}: 0 of {report.modules} layers are known in any model: {_first(report.unmatched)}."
        return replace(report, family="", refusal=text, hint=CONVERT_PLAIN)
    if report.unmatched:
        some = f"{len(report.unmatched)} of {report.modules} layers are not in {_title(report)}"
        report = replace(report, warnings=(*report.warnings, f"{some}: {_first(report.unmatched)}."))
    return report


def _dead(names: LayerNames, alpha: float | None, zeros: frozenset[str]) -> bool:
    """Whether a layer's change is zero, as far as zero tensors tell."""
    if magnitude_of(names.parts):
        return False
    zero = [name in zeros for part, name in names.own.items() if part != "on_input"]
    return (any(zero) or alpha == 0) if names.kind.product else all(zero)


def misfit_sentence(report: Report) -> str:
    """Say with counts and the first three names why a file does not fit a model."""
    first = _first([*report.misfits, *(f"no module {name}" for name in report.unmatched)])
    return f"{report.path.name} fits {report.matched} of {report.modules} modules of this model. First: {first}."


def _made_for(report: Report) -> str:
    return report.base or (_title(report) if report.family in ATTACHED else "another model")


def _title(report: Report) -> str:
    name = report.yardstick or report.family
    return next(title for key, (family, title) in YARDSTICKS.items() if name in (key, family))


def _first(names: tuple[str, ...] | list[str]) -> str:
    return "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")


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


def choose_family(header: Header, index: ModuleIndex | None) -> Choice:
    """Tell the family. Shapes decide; where they fit several or none, names; then what the file claims."""
    if index is not None:
        found = collect(header, index)
        if found.layers and not found.unmatched and not misfits(header, found) and index.family:
            return Choice(index.family, index.family, "certain", f"all {found.modules} layers fit the model")
    claim = claimed_family(dict(header.metadata))
    present = [name for name in YARDSTICKS if name != "mini" or (mini_folder() / "model_index.json").is_file()]
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


def _is_sd2(header: Header, found: Collected) -> bool:
    cross = [names for path, names in found.layers.items() if path.endswith(("attn2.to_k", "attn2.to_v"))]
    down = [shapes["down"] for names in cross if "down" in (shapes := names.shapes(header))]
    return bool(down) and all(shape[1:2] == (SD2_WIDTH,) for shape in down)


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
