"""AutoLoRA: all adapters at once, each through a gate that every layer sets token by token (arXiv:2508.02107).

gate_i = sigmoid(LN(o_i) w_l + LN(b) LN(o_i) w_x + beta), y = b + sum_i w_o gate_i o_i; see gate.py. Gates are trained
per model by `gate_training.train_gate`; without a file the layers have the initial values of the released code, which
are random, and a notice says so. Styles go through gates as concepts do; text encoders are not gated. Finding adapters
by the prompt is retrieval.py. Deviations: no "global" adapter is decomposed from the others; retrieval reads texts.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines.options import Options, option
from ...pipelines.requests import MAX_SEED
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from ..composition import Composition

INITIAL = "initial"


class AutoLoraOptions(Options):
    """Options of AutoLoRA."""

    gate: str = option(
        INITIAL, label="Gates", help='A .safetensors file of trained gates, or "initial" for untrained ones.', low=1,
        high=1000,
    )  # fmt: skip
    seed: int = option(0, label="Gate seed", help="Of untrained gates.", low=0, high=MAX_SEED)


@contextmanager
def _attach(composition: Composition, options: AutoLoraOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..gate import initial, read_gate, widths

    components, attachments = composition.model.components, composition.attachments
    sizes = widths(components, attachments)
    if options.gate == INITIAL:
        gate = initial(sizes, options.seed)
    else:
        gate = read_gate(Path(options.gate).expanduser(), composition.model.denoiser, sizes)
    notices = () if gate.trained else ("The gates of AutoLoRA are not trained: their values are random.",)
    with attached(components, attachments) as hung:
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        hung.combine(gate.on(composition.model.device).fuse)
        yield Drawing(work, (StepRanges(hung, attachments),), notices=notices)


METHOD = CompositionMethod(
    "autolora", "AutoLoRA", "All adapters act, each through a gate that every layer sets token by token.",
    "arXiv:2508.02107", AutoLoraOptions, _attach,
)  # fmt: skip
