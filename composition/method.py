"""What a way to compose is. A method is one file in `methods/` that defines `METHOD`; nothing heavy at its top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ..pipelines.errors import InputError
from ..pipelines.options import Options
from ..pipelines.plugins import discover
from .layout import ComposeRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.denoise import Work
    from ..pipelines.hooks import StepHook
    from .composition import Composition

O = TypeVar("O", bound=Options)  # noqa: E741 - the options of one method
Needs = Literal["places", "phrases", "gradients"]
UNETS = ("sd15", "sdxl")
ALL = (*UNETS, "sd3", "flux1")


@dataclass(frozen=True)
class Drawing:
    """A picture about to be denoised by a method, as long as its `attach` lasts.

    Args:
        work: Noise, timesteps, and the network of the method.
        hooks: Of the loop.
        masks: Where each concept acts at the moment, by name, `(height, width)` from 0 to 1 at the size of the
            latents or below; none for methods that know no places.
        facts: Figures to show, such as a loss of the last step; read after each step.
        notices: Sentences a person should know before the picture is drawn.
    """

    work: Work
    hooks: tuple[StepHook, ...] = ()
    masks: Callable[[], Mapping[str, Tensor]] = dict
    facts: Callable[[], Mapping[str, float]] = dict
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompositionMethod(Generic[O]):
    """One way to compose.

    Args:
        name: As in layouts and on the command line.
        title: For people.
        help: One sentence.
        paper: Where it comes from, "" if it is ours.
        options: Its options' class.
        attach: Prepares a model to draw one picture, and leaves it exactly as it was, whatever happens.
        needs: "places": every concept a box or a mask; "phrases": every concept's words in the prompt; "gradients":
            a model that can be differentiated.
        families: Keys of FAMILIES it works on.
        least: Concepts it wants at least, `most` at most.
        check: Refuses what only this method refuses.
    """

    name: str
    title: str
    help: str
    paper: str
    options: type[O]
    attach: Callable[[Composition, O], AbstractContextManager[Drawing]]
    needs: frozenset[Needs] = frozenset()
    families: Sequence[str] = ALL
    least: int = 1
    most: int = 10
    check: Callable[[ComposeRequest, O], None] = field(default=lambda request, options: None)


@cache
def methods() -> dict[str, CompositionMethod[Any]]:
    """Every method by name."""
    from . import methods as folder

    return discover(folder, "METHOD")


def method_named(name: str) -> CompositionMethod[Any]:
    """Give a method.

    Raises:
        InputError: There is none of this name.
    """
    if name not in methods():
        raise InputError(f"There is no method {name!r}.", f"Methods: {', '.join(methods())}.")
    return methods()[name]


def check_request(request: ComposeRequest, family: str) -> ComposeRequest:
    """Refuse what its methods cannot draw, before any work; fills in the methods' options.

    Args:
        request: Read.
        family: Of its model.

    Raises:
        InputError: Says which method cannot, and what would do.
    """
    chosen = [(method_named(use.method), use) for use in request.methods]
    filled = tuple(
        use.model_copy(update={"options": fitting(request, method, family, use.options).model_dump(mode="json")})
        for method, use in chosen
    )
    return request.model_copy(update={"methods": filled})


def fitting(request: ComposeRequest, method: CompositionMethod[O], family: str, options: Mapping[str, Any]) -> O:
    """Check that one method can draw a request; gives its options.

    Raises:
        InputError: It cannot.
    """
    title, count = method.title, len(request.concepts)
    if not count:
        raise InputError("There is no concept to compose.", "Add one: an adapter with a prompt, and a box.")
    if family not in method.families:
        raise InputError(f"{title} cannot draw with a {family} model.", f"It works with: {', '.join(method.families)}.")
    if not method.least <= count <= method.most:
        span = f"{method.least}" if method.least == method.most else f"{method.least} to {method.most}"
        have = "one concept" if count == 1 else f"{count} concepts"
        raise InputError(f"{title} composes {span} concepts; here is {have}.", "Change them, or choose another method.")
    if "places" in method.needs:
        lost = [use.called for use in request.concepts if not use.placed]
        if lost:
            raise InputError(f"{title} needs a place for {lost[0]}.", "Draw a box, or give a mask.")
    if "phrases" in method.needs:
        _check_phrases(request, title)
    parsed = method.options.parse(options)
    method.check(request, parsed)
    return parsed


def _check_phrases(request: ComposeRequest, title: str) -> None:
    for use in request.concepts:
        if not use.phrase:
            raise InputError(f"{title} needs the words of {use.called}.", "Give the concept a prompt.")
        if use.phrase.casefold() not in request.said.casefold():
            raise InputError(
                f'{title} looks for {use.called} by its words, and the prompt does not hold "{use.phrase}".',
                "Write them into the prompt, or set the concept's words.",
            )
