"""Extract an adapter from two models: what a tuned one has over its base, as far as a rank can hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Progress
from ..factors import of_dense, reduced, stored
from ..options import option
from ..tool import COLUMNS, FileOptions, Inputs, Made, Tool, Work, bare_name, dtype_of, in_sum, provenance

if TYPE_CHECKING:
    from ..adapter_types import LowRank


class ExtractOptions(FileOptions):
    """Options of extracting; `model` is the base."""

    tuned: str = option("", label="Tuned model", help="A folder or file of the same family as the base.", high=1000)
    rank: int = option(32, label="Rank", help="The most a layer may have; 0 for no limit.", low=0, high=4096)
    energy: float = option(
        1.0, label="Energy", help="Share of each layer's squared norm to keep, with the smallest rank that does.",
        low=0.01, high=1,
    )  # fmt: skip


def _work(inputs: Inputs, options: ExtractOptions) -> Work:
    import torch

    from ..adapter_file import card, write_adapter
    from ..model_weights import places
    from ..sources import resolve

    if not options.model or not options.tuned:
        raise InputError("Two models are needed.", "Name the base with --model and the other with --tuned.")
    base, tuned = resolve(options.model), resolve(options.tuned)
    if base.family != tuned.family:
        raise InputError(f"{base.name} is {base.family}, {tuned.name} is {tuned.family}.", "Give two of one family.")
    before, after = places(base), places(tuned)
    unlike = [path for path in before if path not in after or before[path].shape != after[path].shape]
    if unlike or len(after) != len(before):
        first = (unlike or sorted(after.keys() - before.keys()))[0]
        raise InputError(f"The two models do not have the same layers: first {first}.", "Give two of one family.")
    dtype, layers, left = dtype_of(options), dict[str, "LowRank"](), list[str]()
    rows: list[tuple[str, tuple[float, ...]]] = []
    for number, (path, place) in enumerate(before.items(), 1):
        inputs.token.check()
        change = after[path].read() - place.read()
        yield Progress(stage="extract", step=number, total=len(before))
        if not change.any():
            continue
        if (
            change.ndim not in (2, 4)
            or path.startswith("vae.")
            or path.endswith(("token_embedding", "position_embedding"))
        ):
            left.append(path)
            continue
        made = reduced(of_dense(change, place.shape), options.rank, options.energy)
        layers[path], rounded = stored(made, dtype)
        size = float(change.double().norm())
        error = float((change.double().flatten(1) - rounded.dense()).norm())
        rows.append((path, (size, error, error / size, float(made.rank))))
    if not layers:
        raise InputError("The two models do not differ in any layer an adapter can change.", "Check which is which.")
    told = [in_sum(rows)]
    if left:
        told.append(f"{len(left)} changed layers are no matrices of an adapter and are left out: first {left[0]}.")
    biases = places(tuned, ".bias")
    moved = [
        path for path, place in places(base, ".bias").items() if not torch.equal(place.read(), biases[path].read())
    ]
    if moved:
        told.append(f"{len(moved)} biases differ too and are left out: first {moved[0]}.")
    texts = card(base.family, base=bare_name(base.name)) | provenance(inputs, options, "extract")
    return Made(COLUMNS, tuple(rows), tuple(told), lambda path: write_adapter(path, layers, texts))


TOOL = Tool(
    "extract",
    "Extract",
    "What a tuned model has over its base, as an adapter.",
    "",
    ExtractOptions,
    0,
    0,
    "adapter",
    _work,
)  # fmt: skip
