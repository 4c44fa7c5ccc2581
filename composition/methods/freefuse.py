"""FreeFuse: a few steps show which part of the picture each concept's words make; then each adapter acts there alone.

After the released code. Deviations: equal areas are approached by sorting, not by small steps, and count the foreground
alone; a blur stands for the vote of neighbours, and centres have no pull; on UNets the maps of all layers of a size are
averaged (there one layer is chosen by hand); words of others are spared in the half that has the prompt (there in the
first of the batch); a softmax over likeness takes its own spread as temperature where none is given; adapters of every
kind are routed, styles act everywhere, and layers of the clock have each adapter by its part of the picture.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ...pipelines.errors import InputError
from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ...pipelines.attach import Branches
    from ..composition import Composition
    from ..freefuse import Routes
    from ..layout import ComposeRequest


class FreeFuseOptions(Options):
    """Options of FreeFuse; the paper's values are FLUX.1-dev's at 1024 pixels."""

    probe: int = option(
        5, label="Probe", help="Steps before the places are read. Paper: 5; SDXL 10 of 30.", low=1, high=200,
        unit="steps",
    )  # fmt: skip
    cells: Literal["auto", "16", "32"] = option(
        "auto", label="Cells", help="Of a UNet's maps, in pixels; auto: 32, for small pictures 16. Paper: SDXL 32."
    )
    block: int | None = option(
        None, label="Block", help="Joint layer of a transformer, from 0. Empty: FLUX's last (paper: 18), SD3's middle.",
        low=0, high=100,
    )  # fmt: skip
    attention_temperature: float = option(
        1000.0, label="Attention temperature", help="Divides a transformer's scores. Paper: 1000.", low=0.01, high=1e6
    )
    top: float = option(0.1, label="Top share", help="Tokens that stand for a concept. Paper: 0.1.", low=0, high=1)
    temperature: float | None = option(
        None, label="Likeness temperature", help="Paper: 4000; SDXL 300. Empty: the spread of the likeness itself.",
        low=0.01, high=1e6,
    )  # fmt: skip
    background: Literal["end", "words", "mean", "none"] = option(
        "end", label="Background", help="What it is told by: the prompt's end, words of its own, or the concepts' mean "
        "(whose weight must be above 1); none: all is somebody's.",
    )  # fmt: skip
    scene: str = option("", label="Background's words", help="In the prompt, such as 'on a meadow'.", high=500)
    behind: float = option(
        0.95, label="Background's weight", help="Higher leaves less to the concepts. Paper: 0.95.", low=0, high=10
    )
    clean: int = option(2, label="Clean", help="Smallest spot or hole. Paper: 2; 1 keeps all.", low=1, high=8,
                        unit="cells")  # fmt: skip
    smooth: float = option(
        1.0, label="Smooth", help="Blur of the maps before they are compared.", low=0, high=8, unit="cells"
    )
    balance: float = option(
        0.1, label="Balance", help="How far areas are drawn to equal ones: 0 not at all, 1 wholly.", low=0, high=1
    )
    towards: float = option(2.0, label="To own words", help="Added between a place and its words. Paper: 2.", low=0,
                            high=20)  # fmt: skip
    against: float = option(4.0, label="From others' words", help="Taken off between a place and the words of others. "
                            "Paper: 4.", low=0, high=20)  # fmt: skip


def _check(request: ComposeRequest, options: FreeFuseOptions) -> None:
    said: dict[str, str] = {}
    for use in request.concepts:
        twin = said.setdefault(use.phrase.casefold(), use.called)
        if twin != use.called:
            raise InputError(
                f'FreeFuse tells concepts apart by their words; {twin} and {use.called} both have "{use.phrase}".',
                "Give one of them other words in the prompt.",
            )
    if options.background == "words" and options.scene.strip().casefold() not in request.said.casefold():
        raise InputError(
            f'The prompt does not hold the background\'s words "{options.scene}".', "Write them into the prompt."
        )
    if options.background == "words" and not options.scene.strip():
        raise InputError("The background has no words.", "Give them, or choose another background.")


@contextmanager
def _attach(composition: Composition, options: FreeFuseOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..composition import network_of
    from ..freefuse import Routes
    from ..masks import resized
    from ..regions import Shares

    unet = composition.model.spec.denoiser == "unet"
    with attached(composition.model.components, composition.attachments) as hung:
        words, masks = _places(composition, hung, options)
        hung.mute(())
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        shares = Shares(composition.names, resized(masks, composition.grid))
        routes = Routes(hung, shares, words, network_of(work).text, unet)
        hung.spread(routes.gains)
        named = dict(zip(composition.names, masks, strict=True))
        facts = {f"part of {name}": float(mask.mean()) for name, mask in named.items()}
        with _leaning(composition, routes, options):
            hooks = (StepRanges(hung, composition.attachments),)
            yield Drawing(work, hooks, masks=lambda: named, facts=lambda: facts)


def _places(composition: Composition, hung: Branches, options: FreeFuseOptions) -> tuple[list[list[int]], Tensor]:
    """Run the probe: positions of each concept's words, and the masks `(concepts, height, width)`."""
    import torch

    from ..probing import Probe, probed
    from ..routing import Rules, contrasted, likeness, mapped, routed
    from ..tokens import IDLE, ends, positions

    model, prompt = composition.model, composition.prompt
    words = [positions(model, prompt, concept.phrase, idle=IDLE) for concept in composition.concepts]
    count = len(words)
    looked = list(words)
    if options.background == "end":
        looked.append(ends(model, prompt))
    elif options.background == "words":
        looked.append(positions(model, prompt, options.scene, idle=IDLE))
    (work,) = composition.begin([composition.encode(hung, prompt, composition.style_names)])
    cells = 0 if options.cells == "auto" else int(options.cells)
    probe = Probe(options.probe, cells, options.block, options.attention_temperature)
    with torch.no_grad():
        sight = probed(composition, hung, work, probe, looked)
        scores = torch.cat([contrasted(sight.scores[:count]), contrasted(sight.scores)[count:]])
        maps = mapped(likeness(sight.features, scores, options.top), options.temperature)
        behind = None if options.background == "none" else options.behind * maps[count:].sum(0)
        if options.background == "mean":
            behind = options.behind * maps.mean(0)
        rules = Rules(options.smooth, options.clean, options.balance)
        return words, routed(maps[:count], behind, sight.grid, rules)


def _leaning(composition: Composition, routes: Routes, options: FreeFuseOptions) -> AbstractContextManager[object]:
    from contextlib import nullcontext

    from ..attention import processors
    from ..joint_attention import joined

    denoiser = composition.model.denoiser
    if not (options.towards or options.against):
        return nullcontext()
    if composition.model.spec.denoiser == "unet":
        return processors(denoiser, routes.processors(denoiser, options.towards, options.against))
    bias = routes.joint_bias(options.towards, options.against)
    return joined(denoiser, lambda path: bias)


METHOD = CompositionMethod(
    "freefuse", "FreeFuse", "A few steps show where each concept's words go; then each adapter acts there alone.",
    "arXiv:2510.23515 (FreeFuse)",
    FreeFuseOptions, _attach, needs=frozenset({"phrases"}), check=_check,
)  # fmt: skip
