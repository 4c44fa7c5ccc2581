"""What is known of an adapter file, and by what names the models it may be for are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .adapter_types import Role
from .errors import AdapterError

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


def title(report: Report) -> str:
    """What the model is called for people."""
    name = report.yardstick or report.family
    return next(called for key, (family, called) in YARDSTICKS.items() if name in (key, family))
