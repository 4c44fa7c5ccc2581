"""Decide whether an adapter that was identified can be used, and what a person should know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .architectures import ModuleIndex
from .dora import magnitude_of
from .header_table import shorten
from .headers import READABLE, STORE, Header, scan
from .layers import Collected, LayerNames, misfits
from .report import ATTACHED, CONVERT_PLAIN, Report, title

SD2_WIDTH = 1024  # of its text encoder; SD 1.x has 768


def broken(name: str, found: Collected) -> dict[str, str]:
    """Refusal and hint for a file that is no whole adapter."""
    if not found.modules and not found.incomplete:
        return {"refusal": f"{name} holds no adapter layers that are known here.", "hint": CONVERT_PLAIN}
    odd = found.strange or found.incomplete
    what = "tensors that are no part of an adapter" if found.strange else "layers that lack some of their tensors"
    return {"refusal": f"{name} holds {len(odd)} {what}: {first(odd)}.", "hint": CONVERT_PLAIN}


def judge(
    report: Report, header: Header, found: Collected, values: Mapping[str, float], index: ModuleIndex | None, mixed: str
) -> Report:
    """Look at the values, and decide whether what was found can be used.

    Args:
        report: What is known so far.
        header: Of the file.
        found: Its layers.
        values: Alphas by layer.
        index: The model it is meant for, None if it is not known.
        mixed: The models whose layers it mixes, in words; "" if it does not.
    """
    seen = scan(header)
    refused = _unsound(report.path.name, header, found, seen.not_finite)
    if refused:
        return replace(report, **refused)
    if index is not None and report.matched < report.modules:
        hint = f"It was made for {_made_for(report)}: choose such a model, or another adapter."
        return replace(report, refusal=_misfit_sentence(report), hint=hint)
    if _is_sd2(header, found):
        text = f"{report.path.name} is an adapter for Stable Diffusion 2; it cannot be used here."
        return replace(report, family="sd2", refusal=text, hint=CONVERT_PLAIN)
    if not found.layers:
        text = f"{report.path.name}: 0 of {report.modules} layers are known in any model: {first(report.unmatched)}."
        return replace(report, family="", refusal=text, hint=CONVERT_PLAIN)
    if mixed:
        text = f"{report.path.name} mixes layers of {mixed}, which no model has together."
        return replace(report, refusal=text, hint="Ask its author for a file made for one model.")
    dead = all(_dead(names, values.get(path), seen.zeros) for path, names in found.layers.items())
    return replace(report, warnings=(*report.warnings, *_warnings(report, dead, index is None)))


def _unsound(name: str, header: Header, found: Collected, not_finite: str | None) -> dict[str, str]:
    """Refusal and hint for what no model could use, else nothing."""
    if not_finite:
        text = f"{name} holds NaN or infinity, first in {shorten(not_finite)}."
        return {"refusal": text, "hint": "Its training failed; use another file or an earlier checkpoint."}
    used = [part for names in found.layers.values() for part in names.parts.values()]
    if unread := next((part for part in used if header.tensors[part].dtype not in READABLE), None):
        text = f"{name} stores {shorten(unread)} as {header.tensors[unread].dtype}, which is not read here."
        return {"refusal": text, "hint": STORE}
    if torn := misfits(header, found, alone=True):
        text = f"{name} holds {len(torn)} of {found.modules} layers whose tensors do not fit together: {first(torn)}."
        return {"refusal": text, "hint": "It is damaged: download it again, or use another file."}
    return {}


def _warnings(report: Report, dead: bool, alone: bool) -> list[str]:
    warnings: list[str] = []
    if dead:
        warnings.append("This adapter does nothing: every layer's change is zero.")
    if alone and report.misfits and report.family:
        made = f"Made for {report.base}: " if report.base else ""
        some = f"{len(report.misfits)} of {report.modules} layers do not fit {title(report)} itself"
        warnings.append(f"{made}{some}, first {report.misfits[0]}.")
    if report.unmatched:
        some = f"{len(report.unmatched)} of {report.modules} layers are not in {title(report)}"
        warnings.append(f"{some}: {first(report.unmatched)}.")
    return warnings


def _dead(names: LayerNames, alpha: float | None, zeros: frozenset[str]) -> bool:
    """Whether a layer's change is zero, as far as zero tensors tell."""
    if magnitude_of(names.parts):
        return False
    zero = [name in zeros for part, name in names.own.items() if part != "on_input"]
    return (any(zero) or alpha == 0) if names.kind.product else all(zero)


def _misfit_sentence(report: Report) -> str:
    """Say with counts and the first three names why a file does not fit a model."""
    odd = first([*report.misfits, *(f"no module {name}" for name in report.unmatched)])
    return f"{report.path.name} fits {report.matched} of {report.modules} modules of this model. First: {odd}."


def _made_for(report: Report) -> str:
    return report.base or (title(report) if report.family in ATTACHED else "another model")


def _is_sd2(header: Header, found: Collected) -> bool:
    cross = [names for path, names in found.layers.items() if path.endswith(("attn2.to_k", "attn2.to_v"))]
    down = [shapes["down"] for names in cross if "down" in (shapes := names.shapes(header))]
    return bool(down) and all(shape[1:2] == (SD2_WIDTH,) for shape in down)


def first(names: tuple[str, ...] | list[str]) -> str:
    """The first three of a list, as much of them as a sentence can hold."""
    return "; ".join(shorten(name, 160) for name in names[:3]) + ("; ..." if len(names) > 3 else "")
