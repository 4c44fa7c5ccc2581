"""What the composition bench compares: every way to compose that is found, the prompt alone, and two controls made of
real pictures. A method joins by its file in composition/methods; nothing here names one but Merge, the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...composition.layout import ComposeRequest, ConceptUse
from ...composition.method import CompositionMethod, fitting, methods
from ...pipelines.errors import InputError
from .layouts import Scene, pasted

if TYPE_CHECKING:
    from PIL import Image

    from ...composition.composition import Composition
    from ...pipelines.adapter_types import AdapterFile
    from .bench import Place


@dataclass(frozen=True)
class Kit:
    """What an arm draws with.

    Args:
        place: Of the bench.
        adapters: Content to the adapter it was taught as; holds nothing while no arm needs it.
        weight: Of every adapter.
        steps: Of denoising.
        guidance: Guidance scale.
        size: (width, height) in pixels.
    """

    place: Place
    adapters: Mapping[str, AdapterFile]
    weight: float
    steps: int
    guidance: float
    size: tuple[int, int]

    def composition(self, scene: Scene) -> Composition:
        """A scene as a method sees it: each content with its adapter, its own words and its box."""
        from ...composition.composition import Composition, Concept
        from ...pipelines.attach import Attachment

        concepts = tuple(
            Concept(Attachment(content, self.adapters[content], self.weight), said, phrase, box)
            for content, said, phrase, box in told(scene)
        )
        return Composition(
            self.place.model, concepts, prompt=scene.prompt, steps=self.steps, guidance=self.guidance, size=self.size,
            token=self.place.token,
        )  # fmt: skip

    def real(self, content: str, style: str) -> Image.Image:
        """The real picture of a content in a style, at the size of the canvas."""
        pictures = self.place.pictures
        return pictures.image(pictures.of(content=content, style=style)[0], max(self.size))


def told(scene: Scene) -> list[tuple[str, str, str, tuple[float, float, float, float]]]:
    """Of every content: its name, what its place shows, its words in the prompt of the scene, its box."""
    from ...training.scenes import named

    return [
        (content, f"{named(content)}, {scene.style} style", named(content), box)
        for content, box in zip(scene.contents, scene.boxes, strict=True)
    ]


Draw = Callable[[Kit, Scene, Sequence[int]], "list[Image.Image]"]


@dataclass(frozen=True)
class Arm:
    """One way to draw scenes.

    Args:
        name: In records and tables.
        title: For people.
        draw: Gives one picture per seed.
        alone: Name of the arm that draws one content alone: what composing costs is told by the difference.
        taught: Whether it needs the adapters.
        control: Made of real pictures: says what the instruments can tell, not what a method can do.
        able: Whether it can draw a scene at all, with a model of a family.
    """

    name: str
    title: str
    draw: Draw
    alone: str
    taught: bool = False
    control: bool = False
    able: Callable[[Scene, str], bool] = lambda scene, family: True


def base(kit: Kit, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
    """Draw with the prompt alone, and the model as it is."""
    from ...pipelines.batch import render_many

    made = render_many(
        kit.place.model, [scene.prompt] * len(seeds), seeds, steps=kit.steps, guidance=kit.guidance, size=kit.size,
        token=kit.place.token, batch=1,
    )  # fmt: skip
    return list(made)


def arm_of(method: CompositionMethod[Any]) -> Arm:
    """A method with its usual options; each content alone is drawn by Merge, whose sum has one part then."""

    def draw(kit: Kit, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
        from dataclasses import replace

        from ...composition.draw import render

        composition = kit.composition(scene)  # one for all seeds: a method may keep what does not depend on them
        return [render(replace(composition, seed=seed), method, method.options()) for seed in seeds]

    def able(scene: Scene, family: str) -> bool:
        uses = tuple(
            ConceptUse(adapter=content, prompt=said, words=phrase, box=box)
            for content, said, phrase, box in told(scene)
        )
        try:
            fitting(ComposeRequest(prompt=scene.prompt, concepts=uses), method, family, {})
        except InputError:
            return False
        return True

    return Arm(method.name, method.title, draw, alone="merge", taught=True, able=able)


def truth(kit: Kit, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
    """Lay the real pictures of the contents into their boxes, a little smaller and off their centre by the seed."""
    real = [kit.real(content, scene.style) for content in scene.contents]
    return [pasted(real, scene.boxes, kit.size, seed) for seed in seeds]


def swapped(kit: Kit, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
    """As `truth`, with every content in the next one's box."""
    return truth(kit, scene.moved(), seeds)


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("truth", "Real pictures, laid out", truth, alone="truth", control=True),
        Arm("swapped", "Real pictures, boxes exchanged", swapped, alone="truth", control=True),
        Arm("base", "Prompt only", base, alone="base"),
        *map(arm_of, methods().values()),
    )
}
