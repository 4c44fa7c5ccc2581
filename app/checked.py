"""What is refused before any work begins, and what is filled in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from ..composition.layout import ComposeRequest
from ..composition.method import check_request
from ..pipelines.errors import InputError
from ..pipelines.requests import MAX_SEED, EffectRequest, GenerateRequest, ToolRequest, TrainRequest
from ..pipelines.sources import resolve
from ..pipelines.tool import tools
from ..training.recipe import recipes
from .requests import AnyRequest

if TYPE_CHECKING:
    from .shelf import Shelf


def checked(request: AnyRequest, shelf: Shelf) -> AnyRequest:
    """Refuse what cannot be done before any work; fill in options and seeds.

    Raises:
        IntarsiaError: The model, the recipe, its options, a picture or an adapter cannot be used.
    """
    if isinstance(request, ToolRequest):
        return _tool(request, shelf)
    source = resolve(request.model)
    if isinstance(request, ComposeRequest):
        return _composition(request, source.family, shelf)
    if isinstance(request, EffectRequest):
        shelf.find(request.adapter.adapter)
        return request
    if isinstance(request, GenerateRequest):
        for use in request.adapters:
            shelf.find(use.adapter)
        if request.seed < 0:
            request = request.model_copy(update={"seed": random.SystemRandom().randint(0, MAX_SEED)})
        return request
    return _training(request, source.family)


def _tool(request: ToolRequest, shelf: Shelf) -> ToolRequest:
    tool = tools().get(request.tool)
    if tool is None:
        raise InputError(f"There is no tool {request.tool!r}.", f"Tools: {', '.join(tools())}.")
    tool.check(request.adapters)
    for use in request.adapters:
        shelf.find(use.adapter)
    if tool.makes != "nothing" and not (request.dry or request.name or request.out):
        raise InputError("The result needs a name.", "Give one, or a file to write to.")
    if tool.makes == "model" and not (request.dry or request.out):
        raise InputError("A model is written to a place of its own.", "Say where with --out.")
    options = tool.options.parse(request.options)
    return request.model_copy(update={"options": options.model_dump(mode="json")})


def _composition(request: ComposeRequest, family: str, shelf: Shelf) -> ComposeRequest:
    for use in (*request.concepts, *request.styles):
        shelf.find(use.adapter)
    for use in request.concepts:
        if use.mask and not Path(use.mask).is_file():
            raise InputError(f"There is no mask {use.mask} for {use.called}.", "Draw it again, or draw a box.")
    return check_request(request, family)


def _training(request: TrainRequest, family: str) -> TrainRequest:
    recipe = recipes().get(request.recipe)
    if recipe is None:
        raise InputError(f"There is no recipe {request.recipe!r}.", f"Recipes: {', '.join(recipes())}.")
    if family not in recipe.families:
        known = ", ".join(recipe.families)
        raise InputError(f"{recipe.title} cannot train a {family} model.", f"It works with: {known}.")
    if not request.name:
        raise InputError("The result needs a name.", "Give one; it becomes the entry in the library.")
    options = recipe.options.parse(request.options)
    for picture in request.pictures:
        if not Path(picture.path).exists():
            raise InputError(f"There is no picture {picture.path}.", "Choose it again.")
    recipe.check(request.pictures, options)
    return request.model_copy(update={"options": options.model_dump(mode="json")})
