"""Weights: the adapters are merged into one by a rule for their weights, and that one acts everywhere.

The rules are those of the merge tools, where their papers are named; the merged adapter is the one the tool would write
in float32, made in memory. Merging is seldom exact: the figure beside the picture is how far the result is from the
sum of the adapters, as a share of it. DARE and LoRA-LEGO draw from the picture's own seed.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...pipelines.errors import AdapterError, InputError
from ...pipelines.options import Options, option
from ..layout import ComposeRequest
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from ...pipelines.adapter_types import AdapterFile
    from ...pipelines.tool import Inputs, Made, Work
    from ..composition import Composition


class WeightsOptions(Options):
    """Options of merging by weights."""

    rule: Literal["cat", "svd", "linear", "ties", "dare", "magnitude_prune", "lego"] = option(
        "svd", label="Rule", help="cat is exact; svd the nearest of a rank; the others keep, drop or join numbers."
    )
    rank: int = option(
        0, label="Rank", help="Of the result, with all but cat and linear; 0 is the largest that came in.", low=0,
        high=4096,
    )  # fmt: skip
    density: float = option(
        0.5, label="Density", help="Share of the numbers kept by ties, dare and magnitude_prune.", low=0.01, high=1
    )
    on: Literal["change", "factors"] = option(
        "change", label="Works on", help="What these three choose from: the whole change, or the two factors apart."
    )


def merged(composition: Composition, options: WeightsOptions) -> tuple[AdapterFile, float]:
    """Make one adapter of all concepts' adapters at their weights.

    Returns:
        The adapter, and the norm of what it lacks of their exact sum, as a share of that.

    Raises:
        AdapterError: They do not fit the model or the rule, or change norms, which low-rank factors cannot hold.
        Cancelled: A stop was asked for.
    """
    from ...pipelines.adapter_types import AdapterFile
    from ...pipelines.tool import one_family, tools

    inputs = _inputs(composition)
    tool = tools()[options.rule.replace("_", "-")]
    settings = options.model_dump(include=set(tool.options.model_fields)) | {"dtype": "float32"}
    made = _finished(tool.work(inputs, tool.options.parse(settings)))
    family = one_family(inputs.sources)
    adapter = AdapterFile(Path("merged.safetensors"), family, "concept", "", made.layers, "", {})
    size, error = (sum(row[column] ** 2 for _, row in made.rows) ** 0.5 for column in (0, 1))
    return adapter, error / size if size else 0.0


def _inputs(composition: Composition) -> Inputs:
    from torch import Tensor

    from ...pipelines.fitted import fitted
    from ...pipelines.tool import Inputs, Source

    attachments = [concept.attachment for concept in composition.concepts]
    modules = {
        path: module
        for module, uses in fitted(composition.model.components, attachments).layers
        for _, path in uses
    }  # fmt: skip
    norms = [path for path, module in modules.items() if module.weight.ndim < 2]
    if norms:
        raise AdapterError(
            f"The adapters change {len(norms)} norms, which a merged adapter cannot hold: first {norms[0]}.",
            "Compose them with Merge.",
        )

    def weight_of(path: str) -> Tensor:
        return modules[path].weight.detach().float().cpu()

    return Inputs(
        tuple(Source(use.name, use.adapter, use.weight) for use in attachments),
        {path: tuple(module.weight.shape) for path, module in modules.items()},
        weight_of, composition.seed, composition.token,
    )  # fmt: skip


def _finished(work: Work) -> Made:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@contextmanager
def _attach(composition: Composition, options: WeightsOptions) -> Generator[Drawing]:
    from ...pipelines.attach import Attachment, attached
    from ...pipelines.step_ranges import StepRanges

    kept: dict[Any, tuple[AdapterFile, float]] = composition.memo.setdefault("weights", {})
    key = (options, composition.seed if options.rule in ("dare", "lego") else None)
    if key not in kept:
        kept.clear()  # each may be as large as all adapters together
        kept[key] = merged(composition, options)
    adapter, error = kept[key]
    one = Attachment(" + ".join(composition.names), adapter)
    with attached(composition.model.components, (one, *composition.styles)) as hung:
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        hooks = (StepRanges(hung, composition.styles),)
        yield Drawing(work, hooks, facts=lambda: {"missing of the sum": error})


def _check(request: ComposeRequest, options: WeightsOptions) -> None:
    for use in request.concepts:
        if use.blocks or (use.first, use.last) != (0, 1):
            raise InputError(
                f"Merged weights takes {use.called} as a whole, in all steps.",
                "Drop its parts and steps, or use Merge.",
            )


METHOD = CompositionMethod(
    "weights", "Merged weights", "The adapters are merged into one by a rule for their weights.",
    "arXiv:2306.01708 (TIES), arXiv:2311.03099 (DARE), arXiv:2409.16167 (LoRA-LEGO)",
    WeightsOptions, _attach, least=2, check=_check,
)  # fmt: skip
