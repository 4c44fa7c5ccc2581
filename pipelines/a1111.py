"""The settings text of A1111 and its relatives: prompt, `Negative prompt:`, one last line of `Key: value` pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .requests import AdapterUse, GenerateRequest

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LORA = re.compile(r"<lora:([^:<>]+):(-?[\d.]+)[^<>]*>")
NEGATIVE = "Negative prompt:"
EMPTY_HASH = "e3b0c44298fc"  # SHA-256 of nothing: some tools wrote it for every adapter
SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "ddim": "DDIM",
    "heun": "Heun",
    "unipc": "UniPC",
    "lcm": "LCM",
}
KNOWN = {
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Lora hashes",
    "Version",
    "Model",
    "Model hash",
}


@dataclass(frozen=True)
class Restored:
    """Settings read from a picture, what could not be restored, in sentences, and the layout of a composed one."""

    request: GenerateRequest
    notes: tuple[str, ...] = ()
    composition: Mapping[str, Any] | None = None


def write(request: GenerateRequest, size: tuple[int, int]) -> str:
    """Write the settings text of one picture.

    Args:
        request: Its request.
        size: (width, height) in pixels.
    """
    tags = "".join(f" <lora:{use.adapter}:{use.weight:g}>" for use in request.adapters)
    lines = [request.prompt + tags]
    if request.negative:
        lines.append(f"{NEGATIVE} {request.negative}")
    pairs = [("Steps", str(request.steps))]
    if request.scheduler in SAMPLERS:
        pairs.append(("Sampler", SAMPLERS[request.scheduler]))
    pairs += [("CFG scale", f"{request.guidance:g}"), ("Seed", str(request.seed)), ("Size", f"{size[0]}x{size[1]}")]
    pairs.append(("Model", request.model))
    hashes = ", ".join(f"{use.adapter}: {use.sha256[:12]}" for use in request.adapters if use.sha256)
    if hashes:
        pairs.append(("Lora hashes", hashes))
    pairs.append(("Version", "Intarsia"))
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def read(text: str) -> Restored:
    """Read a settings text; what it does not say keeps its default.

    Raises:
        InputError: The text holds neither a prompt nor settings.
    """
    *body, last = text.strip().split("\n")
    pairs: dict[str, str] = {key: _unquoted(value) for key, value in PAIR.findall(last)}
    if len(pairs) < 3:  # it is the end of a prompt, not a line of settings
        body, pairs = [*body, last], {}
    prompt, negative = _prompts(body)
    if not prompt and not pairs:
        raise InputError("The picture carries a settings text with nothing in it.", "Type the settings.")
    notes: list[str] = []
    values: dict[str, Any] = {"negative": _cut(negative, "negative prompt", notes)}
    values["prompt"], values["adapters"] = _adapters(prompt, pairs.get("Lora hashes", ""), notes)
    values["prompt"] = _cut(values["prompt"], "prompt", notes)
    _number(values, "steps", pairs.get("Steps"), notes)
    _number(values, "guidance", pairs.get("CFG scale"), notes)
    _number(values, "seed", pairs.get("Seed"), notes)
    _size(values, pairs.get("Size"), notes)
    _sampler(values, pairs, notes)
    _model(values, pairs, notes)
    rest = [key for key in pairs if key not in KNOWN]
    if rest:
        notes.append(f"Not restored: {', '.join(rest)}.")
    return Restored(GenerateRequest.parse(values), tuple(notes))


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value.strip()


def _prompts(lines: list[str]) -> tuple[str, str]:
    for index, line in enumerate(lines):
        if line.startswith(NEGATIVE):
            negative = "\n".join([line.removeprefix(NEGATIVE).strip(), *lines[index + 1 :]])
            return "\n".join(lines[:index]).strip(), negative.strip()
    return "\n".join(lines).strip(), ""


def _cut(text: str, what: str, notes: list[str]) -> str:
    if len(text) > 2000:
        notes.append(f"The {what} has {len(text):,} characters; the first 2,000 were restored.")
    return text[:2000]


def _adapters(prompt: str, hashes: str, notes: list[str]) -> tuple[str, tuple[AdapterUse, ...]]:
    """Take the `<lora:name:weight>` tags out of a prompt."""
    known = dict(re.findall(r"([^,:]+):\s*([0-9a-fA-F]+)", hashes))
    known = {name.strip(): value.lower() for name, value in known.items()}
    uses: list[AdapterUse] = []
    for name, weight in LORA.findall(prompt):
        try:
            uses.append(AdapterUse.parse({"adapter": name, "weight": float(weight)}))
        except (ValueError, InputError):
            notes.append(f"The adapter {name} has the weight {weight}, which is not possible here; it was left out.")
            continue
        found = known.get(name, "")
        if found.startswith(EMPTY_HASH):
            notes.append(f"The picture does not really tell which file {name} was: its hash is that of an empty file.")
        elif found:
            notes.append(f"The adapter {name} had the hash {found[:12]}; yours may be another file of that name.")
    return re.sub(r"\s{2,}", " ", LORA.sub("", prompt)).strip() if uses else LORA.sub("", prompt).strip(), tuple(uses)


def _number(values: dict[str, Any], field: str, text: str | None, notes: list[str]) -> None:
    if text is None:
        return
    try:
        number = float(text) if field == "guidance" else int(text)
        GenerateRequest.parse({field: number})
    except (ValueError, InputError):
        notes.append(f"{field.capitalize()} {text} is not possible here and was not restored.")
    else:
        values[field] = number


def _size(values: dict[str, Any], text: str | None, notes: list[str]) -> None:
    found = re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", text or "")
    if not found:
        return
    size = {"width": int(found[1]), "height": int(found[2])}
    try:
        GenerateRequest.parse(size)
    except InputError:
        notes.append(f"The size {text} is not possible here and was not restored.")
    else:
        values.update(size)


def _sampler(values: dict[str, Any], pairs: dict[str, str], notes: list[str]) -> None:
    name = pairs.get("Sampler")
    if name is None:
        return
    schedule = pairs.get("Schedule type", "Automatic")
    wanted = name if schedule in ("Automatic", "Normal", "Uniform") else f"{name} {schedule}"
    ours = {title.lower(): key for key, title in SAMPLERS.items()}
    if wanted.lower() in ours:
        values["scheduler"] = ours[wanted.lower()]
    else:
        notes.append(f"The sampler {wanted} is not known here; the model's own is used.")


def _model(values: dict[str, Any], pairs: dict[str, str], notes: list[str]) -> None:
    if pairs.get("Version") == "Intarsia" and pairs.get("Model"):
        values["model"] = pairs["Model"]
        return
    model = pairs.get("Model") or pairs.get("Model hash")
    if model:
        notes.append(f"The picture was made with the model {model}; choose a model yourself.")
