"""What a person asks for: the requests that form, CLI, API, job store and picture metadata share."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from .errors import InputError
from .options import Options, option

SCHEDULERS = Literal[
    "default", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "heun", "unipc", "lcm"
]
MAX_SEED = 2**32 - 1
NUMBER = r"\d*\.?\d+(?:e-?\d+)?"
RANGE = re.compile(rf"(.*)@({NUMBER})-({NUMBER})", re.DOTALL)
PARTS = re.compile(r"(.*)@([\w.]+=[^@/\\]*)", re.DOTALL)
WRITTEN = "Write such as NAME:0.8@unet.up_blocks.0=0.5,text_encoder=0@0-0.6."


class AdapterUse(Options):
    """One adapter at one weight; `adapter` is a library name or a file.

    `blocks` gives parts of it factors of their own, by how a layer's path starts (`unet.up_blocks.0`, `text_encoder`).
    """

    adapter: str
    weight: float = option(1.0, label="Weight", help="Multiplies the adapter's change once.", low=-7, high=7)
    blocks: dict[str, float] = Field(default_factory=dict[str, float])
    first: float = option(0.0, label="From", help="Part of the denoising after which it acts.", low=0, high=1)
    last: float = option(1.0, label="Until", help="Part of the denoising after which it acts no more.", low=0, high=1)
    sha256: str = ""  # filled in when the job runs, so that a picture says exactly what made it

    @classmethod
    def read(cls, text: str) -> AdapterUse:
        """Read `NAME_OR_FILE[:weight][@part=factor,...][@first-last]`.

        Raises:
            InputError: A number is none or out of bounds.
        """
        values: dict[str, Any] = {}
        if found := RANGE.fullmatch(text):
            text, values["first"], values["last"] = found[1], float(found[2]), float(found[3])
        if found := PARTS.fullmatch(text):
            text, values["blocks"] = found[1], dict(_factor(part) for part in found[2].split(","))
        name, colon, tail = text.rpartition(":")
        try:
            values |= {"weight": float(tail)} if colon else {}
        except ValueError:
            name = text
        return cls.parse({"adapter": name if colon else text, **values})

    @property
    def spelled(self) -> str:
        """What `read` reads, with nothing in it that is as usual."""
        parts = ",".join(f"{start}={_written(factor)}" for start, factor in self.blocks.items())
        span = (self.first, self.last)
        return (
            self.adapter
            + (f":{_written(self.weight)}" if self.weight != 1 or ":" in self.adapter else "")
            + (f"@{parts}" if parts else "")
            + (f"@{_written(span[0])}-{_written(span[1])}" if span != (0, 1) else "")
        )


def _written(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


def _factor(text: str) -> tuple[str, float]:
    start, _, number = text.partition("=")
    try:
        return start, float(number)
    except ValueError:
        raise InputError(f"{text!r} is no part of an adapter with its factor.", WRITTEN) from None


class GenerateRequest(Options):
    """Make pictures from a prompt."""

    kind: Literal["generate"] = "generate"
    model: str = option("mini", label="Model", help="Mini, a folder, a .safetensors checkpoint or a hub id.", low=1)
    prompt: str = option("", label="Prompt", help="What the picture shows.", high=2000)
    negative: str = option("", label="Negative prompt", help="What the picture must not show.", high=2000)
    seed: int = option(-1, label="Seed", help="-1 draws one; it is written into the picture.", low=-1, high=MAX_SEED)
    steps: int = option(20, label="Steps", help="Denoising steps.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    width: int | None = option(
        None, label="Width", help="Empty: the model's own size.", low=16, high=4096, multiple_of=8, unit="pixels"
    )
    height: int | None = option(
        None, label="Height", help="Empty: the model's own size.", low=16, high=4096, multiple_of=8, unit="pixels"
    )
    count: int = option(1, label="Pictures", help="How many, with seeds counted up.", low=1, high=64)
    scheduler: SCHEDULERS = option("default", label="Scheduler", help="Sampler; default is the model's own.")
    merge: bool = option(
        False,
        label="Merge adapters",
        help="Add adapters to the weights while drawing: quicker steps, more memory, the same but for rounding.",
    )
    adapters: tuple[AdapterUse, ...] = ()


class TrainingPicture(Options):
    """A picture to learn from, and its caption (may be empty)."""

    path: str
    caption: str = ""


class TrainRequest(Options):
    """Train one or more adapters with a recipe; `options` are those of the recipe's own class."""

    kind: Literal["train"] = "train"
    recipe: str
    model: str = option("mini", label="Model", help="Mini, a folder, a .safetensors checkpoint or a hub id.", low=1)
    name: str = option("", label="Name", help="Name of the result in the library.", low=1, high=80)
    pictures: tuple[TrainingPicture, ...] = ()
    seed: int = option(0, label="Seed", help="Everything random in the run follows from it.", low=0, high=MAX_SEED)
    licence: str = option("", label="Licence", help="Written into the result, such as CC-BY-4.0.", high=200)
    options: dict[str, Any] = Field(default_factory=dict)
    resume_from: str = ""  # folder of the checkpoint of an earlier run


class ToolRequest(Options):
    """Do something with adapter files; `options` are those of the tool's own class."""

    kind: Literal["tool"] = "tool"
    tool: str
    adapters: tuple[AdapterUse, ...] = ()
    name: str = option("", label="Name", help="Name of the result in the library.", high=80)
    out: str = ""  # file or folder to write to, instead of the library
    dry: bool = option(False, label="Only look", help="Show the error it would introduce and write nothing.")
    seed: int = option(0, label="Seed", help="Everything random follows from it.", low=0, high=MAX_SEED)
    options: dict[str, Any] = Field(default_factory=dict)


class EffectRequest(Options):
    """Measure how an adapter changes pictures: the same seeds with and without it."""

    kind: Literal["effect"] = "effect"
    adapter: AdapterUse
    model: str = option("mini", label="Model", help="Mini, a folder, a .safetensors checkpoint or a hub id.", low=1)
    prompt: str = option("", label="Prompt", help="What the pictures show.", high=2000)
    negative: str = option("", label="Negative prompt", help="What they must not show.", high=2000)
    seed: int = option(0, label="Seed", help="Of the first picture; the others count up.", low=0, high=MAX_SEED)
    count: int = option(3, label="Pictures", help="With the adapter, and as many without it.", low=1, high=16)
    steps: int = option(12, label="Steps", help="Denoising steps.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    bands: int = option(16, label="Bands", help="From the lowest spatial frequency to the highest.", low=2, high=64)

    @property
    def picture(self) -> GenerateRequest:
        """The same as a request for pictures with the adapter."""
        shared = self.model_dump(include={"model", "prompt", "negative", "seed", "count", "steps", "guidance"})
        return GenerateRequest(**shared, adapters=(self.adapter,))
