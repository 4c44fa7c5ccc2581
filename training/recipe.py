"""What a training recipe is. A recipe is one file in `recipes/` that defines `RECIPE`; no heavy imports at its top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from ..pipelines.adapter_types import Role
from ..pipelines.options import Options, option
from ..pipelines.plugins import discover
from ..pipelines.requests import TrainingPicture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..pipelines.adapter_types import LowRank
    from .schedule import NoiseSchedule

Prediction = Literal["epsilon", "v_prediction", "sample"]


class TrainingOptions(Options):
    """Options every recipe has. What is left empty is chosen for the model by `TrainingRecipe.settings`."""

    steps: int | None = option(
        None, label="Steps", help="Empty: chosen for the model and the pictures.", low=1, high=100_000, unit="steps"
    )
    learning_rate: float | None = option(
        None, label="Learning rate", help="Empty: chosen by the model's width.", low=1e-8, high=1
    )
    resolution: int | None = option(
        None,
        label="Resolution",
        help="Side of a square picture; other shapes get the same area. Empty: the model's own.",
        low=32,
        high=2048,
        multiple_of=8,
        unit="pixels",
    )
    sample_every: int = option(
        100, label="Sample every", help="Draw the sample prompt every so often; 0 is never.", low=0, high=100_000
    )
    sample_prompt: str = option(
        "", label="Sample prompt", help="Empty: the caption of the first picture.", low=0, high=2000
    )
    checkpoint_every: int = option(
        100, label="Checkpoint every", help="Steps between states to resume from; 0 keeps one on Stop only.", low=0,
        high=100_000, unit="steps",
    )  # fmt: skip
    save_memory: bool = option(
        False, label="Save memory", help="Compute activations twice instead of keeping them: slower, far smaller."
    )


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe may know of the model and the pictures when it chooses defaults.

    Args:
        family: Key of FAMILIES.
        layers: Every layer of the denoiser that can learn, path (no component prefix) to its shape `(out, in)`; a
            convolution counts as its matrix `(out, in x kernel x kernel)`.
        width: Channels of the denoiser's widest block; 1280 in SDXL and SD1.5.
        size: Side of the square picture the model was made for, in pixels.
        pictures: How many pictures there are to learn from.
    """

    family: str
    layers: Mapping[str, tuple[int, ...]]
    width: int
    size: int
    pictures: int


@dataclass(frozen=True)
class Drawing:
    """How pictures are best drawn with a result; sample pictures are drawn so, and its file says it."""

    steps: int = 20
    guidance: float = 5.0
    scheduler: str = "default"


@dataclass(frozen=True)
class Settings:
    """Everything the training loop relies on; nothing here is left open.

    Args:
        ranks: Layer path to rank.
        scale: alpha / rank of every layer.
        warmup: Steps in which the learning rate rises from 0.
        flip: Also learn from mirrored pictures.
        crop: Which part is cut away when a picture does not have the shape of its bucket.
        enlarge: Small pictures are enlarged to the resolution; otherwise they train at their own size.
        caption_dropout: Share of the pictures, 0..1, that are shown without their caption.
        drawing: How to draw with the result.
        notices: What was chosen and why, in sentences.
    """

    steps: int
    learning_rate: float
    resolution: int
    ranks: Mapping[str, int]
    scale: float = 1.0
    batch: int = 1
    warmup: int = 0
    weight_decay: float = 1e-4
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    enlarge: bool = True
    caption_dropout: float = 0.0
    drawing: Drawing = Drawing()
    notices: tuple[str, ...] = ()


O_contra = TypeVar("O_contra", bound=TrainingOptions, contravariant=True)


class TrainingRecipe(Protocol[O_contra]):
    """A way to train adapters.

    `options` is the frozen `TrainingOptions` class of the recipe; everything it declares becomes form fields and flags.
    """

    name: str
    title: str
    paper: str
    families: tuple[str, ...]
    options: type[Any]

    def check(self, pictures: tuple[TrainingPicture, ...], options: O_contra) -> None:
        """Refuse pictures or options this recipe cannot work with (InputError)."""
        ...

    def targets(self, family: str, layers: Mapping[str, tuple[int, ...]], options: O_contra) -> Mapping[str, int]:
        """Choose the layers to train.

        Args:
            family: Key of FAMILIES.
            layers: As in `ModelFacts.layers`.
            options: The recipe's options.

        Returns:
            Layer path to rank; never empty.

        Raises:
            InputError: The family, or this model, does not have such layers.
        """
        ...

    def settings(self, facts: ModelFacts, options: O_contra) -> Settings:
        """Fill in what the person left empty, and say so in `notices`."""
        ...

    def trigger(self, name: str, options: O_contra) -> str:
        """Give the words a prompt must hold to call the result, "" if none."""
        ...

    def prompts(self, name: str, pictures: tuple[TrainingPicture, ...], options: O_contra) -> tuple[str, ...]:
        """Give the prompt each picture is trained with, from its caption and the trigger."""
        ...

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        snr: Tensor,
        options: O_contra,
        rng: torch.Generator,
        kind: Prediction = "epsilon",
    ) -> Tensor:
        """Reduce `(batch, ...)` prediction and target to a scalar.

        Args:
            prediction: What the network gave, `(batch, channels, height, width)`, float32.
            target: Same shape.
            snr: Signal-to-noise ratio of each item, `(batch,)`; 0 at a zero-terminal-SNR schedule's end.
            options: The recipe's options.
            rng: For recipes that draw; seeded per step.
            kind: What the network predicts; weightings differ by it.
        """
        ...

    def parts(self, layers: Mapping[str, LowRank]) -> Mapping[Role, Mapping[str, LowRank]]:
        """Split the trained layers (canonical paths, `unet.` in front) into the adapters of the library, by role."""
        ...


class Ask(Protocol):
    """The network of one step, with the captions of its batch."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        """Predict.

        Args:
            noisy: `(batch, channels, height, width)`, float32, as is the answer.
            timesteps: `(batch,)` integers.
            taught: With the layers that are being trained; without them nothing is recorded for a gradient.
            captions: With the captions; otherwise with the empty prompt.
        """
        ...


@dataclass(frozen=True)
class Moment:
    """What one step offers to a recipe that asks the network more than once.

    Args:
        clean: Latents `(batch, channels, height, width)`, float32.
        noise: Same shape, normal.
        schedule: Noise levels and kind of prediction.
        ask: The network.
    """

    clean: Tensor
    noise: Tensor
    schedule: NoiseSchedule
    ask: Ask


@dataclass(frozen=True)
class Compared:
    """What `TrainingRecipe.loss` is given: prediction and target of one shape, and their timesteps `(batch,)`."""

    prediction: Tensor
    target: Tensor
    timesteps: Tensor


@runtime_checkable
class Comparing(Protocol[O_contra]):
    """A recipe that does not learn the noise in a picture but says itself what its loss compares."""

    def compare(self, moment: Moment, options: O_contra, rng: torch.Generator) -> Compared:
        """Make prediction and target with as many calls of the network as it takes.

        Raises:
            InputError: The model's schedule does not allow it.
        """
        ...


def narrowed(ranks: Mapping[str, int], wanted: int) -> list[str]:
    """Say how many layers get a smaller rank than was asked for, if any."""
    narrow = sum(rank < wanted for rank in ranks.values())
    if not narrow:
        return []
    least = min(ranks.values())
    return [f"{narrow} of {len(ranks)} layers get rank {least} and up instead of {wanted}: a quarter of their width."]


def capped(rank: int, shape: tuple[int, ...]) -> int:
    """Limit a rank to a quarter of the layer's smaller side: beyond, the factors outgrow what they can change."""
    return max(1, min(rank, min(shape[0], shape[1]) // 4))


def scaled_rate(rate: float, width: int) -> float:
    """Scale a published learning rate to another width, in proportion to 1 / width.

    Published rates hold for denoisers 1280 channels wide (SDXL, SD1.5). Adam moves every entry of the factors by
    about the rate; the change this makes in a layer's output is a sum over its inputs and so grows with the width
    (Yang et al., Tensor Programs V, arXiv:2203.03466). Narrow models therefore want larger rates.
    """
    return float(f"{rate * 1280 / width:.3g}")


@cache
def recipes() -> dict[str, TrainingRecipe[Any]]:
    """Every recipe by name."""
    from . import recipes as folder

    return discover(folder, "RECIPE")
