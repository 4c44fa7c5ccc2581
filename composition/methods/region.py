"""Region: every concept's whole adapter acts in its own place and nowhere else; one prompt and the styles over all.

Ours. In one pass per step: each image token has the change of its own concept alone (cross- and self-attention,
feed-forward, convolutions), and reads the prompt as that adapter reads it, but for the words of the others. Edges are
soft: a token between two places has a part of both. Places may be kept from looking at each other; by default they see
each other, or each would be drawn as if the canvas were its own. On UNets what is read is made once per picture, and a
place may read its concept's own prompt; on transformers text and image share their layers, so the words of a concept
have its own adapter and those of others do not.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ...pipelines.errors import InputError
from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from ...pipelines.attach import Branches
    from ...pipelines.modular import Prompt
    from ..composition import Composition


class RegionOptions(Options):
    """Options of Region."""

    edge: float = option(
        1.0, label="Soft edge", help="Blur of the places' edges.", low=0, high=8, unit="cells of the latents"
    )
    reads: Literal["whole", "own", "both"] = option(
        "whole", label="Reads", help="What a place reads: the whole prompt without others' words, its own, or both."
    )
    towards: float = option(
        0.0, label="To own words", help="Added to a place's attention to its concept's words.", low=0, high=20
    )
    apart: float = option(
        0.0, label="Keep apart", help="How far tokens of one place are kept from looking at another's.", low=0, high=1
    )
    until: float = option(
        1.0, label="Apart until", help="Part of the steps after which all may look at all.", low=0, high=1
    )


@contextmanager
def _attach(composition: Composition, options: RegionOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached

    with attached(composition.model.components, composition.attachments) as hung:
        if composition.model.spec.denoiser == "unet":
            yield from _unet(composition, options, hung)
        else:
            yield from _transformer(composition, options, hung)


def _unet(composition: Composition, options: RegionOptions, hung: Branches) -> Generator[Drawing]:
    from ...pipelines.step_ranges import StepRanges
    from ..attention import processors
    from ..composition import network_of
    from ..regions import Regions, Shares, readings

    styles, reads = composition.style_names, options.reads
    prompts: list[list[Prompt]] = [[composition.encode(hung, composition.prompt, styles)]]
    for concept in composition.concepts:
        names = (concept.name, *styles)
        said = {"whole": composition.prompt, "own": concept.prompt or composition.prompt}
        prompts.append([composition.encode(hung, said[part], names) for part in said if reads in (part, "both")])
    works = [composition.begin(parts) for parts in prompts]
    read = [[network_of(work).text for work in part] for part in works]
    texts, leaning = readings(composition, read, reads != "own", options.towards)
    shares = Shares.of(composition, options.edge)
    regions = Regions(hung, shares, texts, leaning, options.apart, options.until)
    hung.spread(regions.gains)
    denoiser = composition.model.denoiser
    with processors(denoiser, regions.processors(denoiser)):
        yield Drawing(works[0][0], (regions, StepRanges(hung, composition.attachments)), masks=shares.by_name)


def _transformer(composition: Composition, options: RegionOptions, hung: Branches) -> Generator[Drawing]:
    from ...pipelines.step_ranges import StepRanges
    from ..composition import network_of
    from ..freefuse import Routes
    from ..joint_attention import joined
    from ..regions import Apart, Shares, span

    if options.reads != "whole":
        raise InputError(
            "On transformers a place reads the whole prompt without others' words; it cannot read its own.",
            "Set Reads to whole.",
        )
    (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
    shares = Shares.of(composition, options.edge)
    words = [span(composition, concept.phrase) for concept in composition.concepts]
    routes = Routes(hung, shares, words, network_of(work).text, unet=False)
    hung.spread(routes.gains)
    apart = Apart(shares, routes, options.towards, options.apart, options.until)
    with joined(composition.model.denoiser, apart.bias):
        yield Drawing(work, (apart, StepRanges(hung, composition.attachments)), masks=shares.by_name)


METHOD = CompositionMethod(
    "region", "Region", "Each concept's adapter acts in its own place alone; one pass, soft edges.", "",
    RegionOptions, _attach, needs=frozenset({"places"}),
)  # fmt: skip
