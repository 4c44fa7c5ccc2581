"""What the composition bench compares: ways to draw a scene of taught contents, and two controls made of real pictures.

A method that composes adapters joins by one more entry in `ARMS`: `drawn(...)` around a context that attaches the
scene's adapters to the model and gives the hooks of the denoising loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layouts import Scene, pasted

if TYPE_CHECKING:
    from PIL import Image

    from ...pipelines.adapter_types import AdapterFile
    from ...pipelines.attach import Attachment
    from ...pipelines.hooks import StepHook
    from .bench import Place


@dataclass(frozen=True)
class Kit:
    """What an arm draws with.

    Args:
        place: Of the bench.
        adapters: Content to the adapter it was taught as; holds nothing while no arm needs it.
        weight: Of every adapter in Merge.
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

    def attachments(self, scene: Scene) -> list[Attachment]:
        """The adapters of a scene's contents, each at its weight."""
        from ...pipelines.attach import Attachment

        return [Attachment(content, self.adapters[content], self.weight) for content in scene.contents]

    def real(self, content: str, style: str) -> Image.Image:
        """The real picture of a content in a style, at the size of the canvas."""
        pictures = self.place.pictures
        return pictures.image(pictures.of(content=content, style=style)[0], max(self.size))


Draw = Callable[[Kit, Scene, Sequence[int]], "list[Image.Image]"]
Hold = Callable[[Kit, Scene], "AbstractContextManager[Sequence[StepHook]]"]


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
    """

    name: str
    title: str
    draw: Draw
    alone: str
    taught: bool = False
    control: bool = False


def drawn(hold: Hold) -> Draw:
    """Draw with the model while `hold` keeps something attached to it."""

    def draw(kit: Kit, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
        from ...pipelines.batch import render_many

        with hold(kit, scene) as hooks:
            made = render_many(
                kit.place.model, [scene.prompt] * len(seeds), seeds, steps=kit.steps, guidance=kit.guidance,
                size=kit.size, token=kit.place.token, hooks=hooks,
            )  # fmt: skip
            return list(made)

    return draw


@contextmanager
def nothing(kit: Kit, scene: Scene) -> Generator[Sequence[StepHook]]:
    """Leave the model as it is: the prompt alone."""
    yield ()


@contextmanager
def merged(kit: Kit, scene: Scene) -> Generator[Sequence[StepHook]]:
    """All adapters at once: every layer adds the sum over the concepts of w * scale * up @ down.

    Paper: "Multi-LoRA Composition for Image Generation", arXiv:2402.16843, section 2 (LoRA Merge). Its code multiplies
    the sum by 0.8; here that is a weight of 0.8.
    """
    from ...pipelines.attach import attached

    with attached(kit.place.model.components, kit.attachments(scene)):
        yield ()


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
        Arm("base", "Prompt only", drawn(nothing), alone="base"),
        Arm("merge", "Merge: all adapters at once", drawn(merged), alone="merge", taught=True),
    )
}


@dataclass
class Meter:
    """What drawing cost.

    Args:
        rows: Latents the denoiser was run on; with guidance two per step of a picture.
        memory: Most bytes seen: on an accelerator by tensors, on the CPU by the process.
        seconds: On the wall.
    """

    rows: int = 0
    memory: int = 0
    seconds: float = 0.0


@contextmanager
def metered(kit: Kit) -> Generator[Meter]:
    """Count what the denoiser is asked for within the block; nothing is left on it afterwards."""
    import torch

    from ...pipelines.image import peak_memory

    meter, model = Meter(), kit.place.model
    if model.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(model.device)

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        latents = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        meter.rows += len(latents)
        meter.memory = max(meter.memory, peak_memory(model.device))

    handle = model.denoiser.register_forward_hook(count, with_kwargs=True)
    started = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - started
        handle.remove()
