"""What a person asks for: the requests that form, CLI, API, job store and picture metadata share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .options import Options, option

SCHEDULERS = Literal[
    "default", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "heun", "unipc", "lcm"
]
MAX_SEED = 2**32 - 1


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
        """Read `NAME_OR_FILE[:weight]`.

        Raises:
            InputError: The weight is out of bounds.
        """
        name, colon, tail = text.rpartition(":")
        try:
            weight = float(tail)
        except ValueError:
            return cls.parse({"adapter": text})
        return cls.parse({"adapter": name, "weight": weight} if colon else {"adapter": text})


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
    options: dict[str, Any] = Field(default_factory=dict)
    resume_from: str = ""  # folder of the checkpoint of an earlier run


Request = Annotated[GenerateRequest | TrainRequest, Field(discriminator="kind")]
