"""What a training recipe is. A recipe is one file in `recipes/` that defines `RECIPE`; no heavy imports at its top."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..pipelines.adapter_types import Role
from ..pipelines.options import Options
from ..pipelines.plugins import discover
from ..pipelines.requests import TrainingPicture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..pipelines.adapter_types import LowRank

O_contra = TypeVar("O_contra", bound=Options, contravariant=True)


class TrainingRecipe(Protocol[O_contra]):
    """A way to train adapters.

    `options` is the frozen `Options` class of the recipe; everything it declares becomes form fields and flags.
    """

    name: str
    title: str
    paper: str
    families: tuple[str, ...]
    options: type[Any]

    def check(self, pictures: tuple[TrainingPicture, ...], options: O_contra) -> None:
        """Refuse pictures or options this recipe cannot work with (InputError)."""
        ...

    def targets(self, family: str, linear_layers: tuple[str, ...], options: O_contra) -> Mapping[str, int]:
        """Choose the layers to train: module path (as in the denoiser, no component prefix) to rank."""
        ...

    def loss(self, prediction: Tensor, target: Tensor, snr: Tensor, options: O_contra, rng: torch.Generator) -> Tensor:
        """Reduce `(batch, ...)` prediction and target to a scalar; `snr` is `(batch,)`."""
        ...

    def parts(self, layers: Mapping[str, LowRank]) -> Mapping[Role, Mapping[str, LowRank]]:
        """Split the trained layers into the adapters that enter the library, by role."""
        ...


@cache
def recipes() -> dict[str, TrainingRecipe[Any]]:
    """Every recipe by name."""
    from . import recipes as folder

    return discover(folder, "RECIPE")
