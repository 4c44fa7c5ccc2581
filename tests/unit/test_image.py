"""The denoising loop: equal to the plain pipelines, hooks, previews, stops, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from fakes import Tiny
from intarsia.pipelines import modular, preview, schedule
from intarsia.pipelines.denoise import denoise
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import Artifact, CancelToken, Event, Metric, Notice, Preview, Progress, Stage
from intarsia.pipelines.hooks import Step
from intarsia.pipelines.image import generate, render
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.picture import open_picture, read_settings
from intarsia.pipelines.requests import GenerateRequest
from intarsia.pipelines.sources import resolve
from numpy.typing import NDArray
from PIL import Image

D: Any = diffusers
Make = Callable[..., Model]
KINDS = [("sd15", ""), ("sdxl", ""), ("sdxl", "vpred"), ("sd3", ""), ("flux1", ""), ("flux1", "guided")]
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def make(tiny: Tiny) -> Make:
    """Give a loaded tiny model, loaded once."""
    made: dict[tuple[str, str], Model] = {}

    def model(family: str, variant: str = "") -> Model:
        if (family, variant) not in made:
            made[family, variant] = load(resolve(str(tiny(family, variant=variant))))
        return made[family, variant]

    return model


@cache
def plain_pipeline(folder: Path, family: str) -> Any:  # noqa: ANN401
    kinds = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux1": "Flux"}
    more: dict[str, Any] = {"safety_checker": None} if family == "sd15" else {}
    pipe = getattr(D, kinds[family] + "Pipeline").from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(folder: Path, family: str, request: GenerateRequest) -> Image.Image:
    """Make the picture with diffusers' own pipeline."""
    pipe = plain_pipeline(folder, family)
    own = pipe.scheduler
    if request.scheduler == "dpmpp_2m":
        pipe.scheduler = D.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if request.scheduler == "euler_ancestral":
        pipe.scheduler = D.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    negative: dict[str, Any] = {} if family == "flux1" else {"negative_prompt": request.negative or None}
    image: Image.Image = pipe(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        **negative,
    ).images[0]
    pipe.scheduler = own
    return image


def run(model: Model, folder: Path, token: CancelToken | None = None, **values: Any) -> list[Event]:  # noqa: ANN401
    base: dict[str, Any] = {"model": "x", "prompt": PROMPT, "seed": 3, "steps": 4, "width": 64, "height": 48}
    request = GenerateRequest.parse(base | values)
    return list(generate(request, model, [], folder, folder, token or CancelToken()))


def pictures(events: list[Event]) -> list[Path]:
    return [Path(event.path) for event in events if isinstance(event, Artifact)]


def grey_levels(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.parametrize(("family", "variant"), KINDS)
@pytest.mark.parametrize(
    "values",
    [
        {"guidance": 5.0},
        {"guidance": 5.0, "negative": "a blue dog"},
        {"guidance": 1.0},
        {"guidance": 0.0},
    ],
    ids=["guided", "negative", "one", "zero"],
)
def test_without_hooks_the_picture_is_the_plain_pipelines(
    tiny: Tiny, make: Make, tmp_path: Path, family: str, variant: str, values: dict[str, Any]
) -> None:
    path = pictures(run(make(family, variant), tmp_path, **values))[0]
    request = GenerateRequest(prompt=PROMPT, seed=3, steps=4, width=64, height=48, **values)
    wanted = plain(tiny(family, variant=variant), family, request)
    assert np.asarray(wanted).std() > 10, "a flat picture would prove nothing"
    assert grey_levels(open_picture(path), wanted) <= 1


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_other_samplers_give_the_plain_pipelines_picture_too(
    tiny: Tiny, make: Make, tmp_path: Path, scheduler: str
) -> None:
    path = pictures(run(make("sdxl", "vpred"), tmp_path, scheduler=scheduler))[0]
    request = GenerateRequest(
        prompt=PROMPT, seed=3, steps=4, width=64, height=48, guidance=5.0, scheduler=cast(Any, scheduler)
    )
    assert grey_levels(open_picture(path), plain(tiny("sdxl", variant="vpred"), "sdxl", request)) <= 1


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_guidance_prompt_and_negative_each_change_the_picture(make: Make, family: str) -> None:
    model = make(family)
    base = render(model, PROMPT, seed=3, steps=4)[0]
    others = [
        render(model, "a blue dog", seed=3, steps=4)[0],
        render(model, PROMPT, seed=3, steps=4, guidance=9.0)[0],
        render(model, PROMPT, negative="a blue dog", seed=3, steps=4)[0],
        render(model, PROMPT, seed=4, steps=4)[0],
    ]
    assert all(grey_levels(base, other) > 2 for other in others)


@pytest.mark.parametrize("scheduler", ["default", "euler_ancestral"])
def test_each_of_several_pictures_is_that_of_its_seed_alone(make: Make, tmp_path: Path, scheduler: str) -> None:
    model = make("sdxl", "vpred")
    several = pictures(run(model, tmp_path, count=3, seed=7, scheduler=scheduler))
    for number, path in enumerate(several):
        alone = pictures(run(model, tmp_path, seed=7 + number, scheduler=scheduler))[0]
        assert path.read_bytes() == alone.read_bytes()
        assert read_settings(path).request.seed == 7 + number
    assert len({path.read_bytes() for path in several}) == 3


def test_events_come_in_order_with_a_preview_at_every_step(make: Make, tmp_path: Path) -> None:
    events = run(make("sdxl"), tmp_path, count=2)
    assert [event.name for event in events if isinstance(event, Stage)] == [
        "encode", "denoise", "decode", "denoise", "decode",
    ]  # fmt: skip
    steps = [(event.step, event.total) for event in events if isinstance(event, Progress)]
    assert steps == [(number, 8) for number in range(1, 9)]
    assert [event.step for event in events if isinstance(event, Preview)] == list(range(1, 9))
    rates = [event.value for event in events if isinstance(event, Metric) and event.name == "rate"]
    assert len(rates) == 8 and min(rates) > 0
    assert [path.name for path in pictures(events)] == ["00001-3.png", "00002-4.png"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("family", "variant"), KINDS)
def test_previews_have_the_shape_of_the_picture(make: Make, tmp_path: Path, family: str, variant: str) -> None:
    events = run(make(family, variant), tmp_path, width=128, height=64)
    last = [event for event in events if isinstance(event, Preview)][-1]
    seen = open_picture(last.path)
    assert seen.size == (128, 64)


def test_the_preview_map_recovers_colours_the_autoencoder_keeps() -> None:
    class Config(dict[str, Any]):
        pass

    class Mixing:
        """An autoencoder that averages cells and mixes colours linearly: the map must undo it exactly."""

        dtype = torch.float32
        config = Config(block_out_channels=(1, 1, 1, 1), scaling_factor=0.5, shift_factor=0.1)
        mix = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.3], [0.4, 0.0, 1.0], [0.5, 0.5, 0.5]])

        def encode(self, pixels: torch.Tensor) -> Any:  # noqa: ANN401
            @dataclass
            class Encoded:
                latents: torch.Tensor

            return Encoded(torch.einsum("bchw,kc->bkhw", torch.nn.functional.avg_pool2d(pixels, 8), self.mix))

    colours = preview.fit(Mixing(), torch.device("cpu"))
    rgb = torch.tensor([0.8, -0.4, 0.2])
    z = ((Mixing.mix @ rgb - 0.1) * 0.5)[None, :, None, None].expand(1, 4, 2, 2)
    shown = cast(NDArray[np.uint8], np.asarray(colours.picture(z)))[0, 0]
    assert np.abs(shown.astype(int) - ((rgb.numpy() + 1) * 127.5)).max() <= 3


@dataclass
class Recorder:
    """Notes every step and leaves the latents alone."""

    steps: list[Step] = field(default_factory=list[Step])
    done: list[Step] = field(default_factory=list[Step])

    def before(self, step: Step) -> torch.Tensor:
        self.steps.append(step)
        return step.latents

    def after(self, step: Step) -> torch.Tensor:
        self.done.append(step)
        return step.latents


@pytest.mark.parametrize(("family", "variant"), KINDS)
def test_hooks_see_every_step_and_may_ask_the_network(make: Make, family: str, variant: str) -> None:
    model, recorder = make(family, variant), Recorder()
    size = (64, 64)
    base = render(model, PROMPT, seed=3, steps=3, size=size)[0]
    assert grey_levels(render(model, PROMPT, seed=3, steps=3, size=size, hooks=(recorder,))[0], base) == 0
    total = recorder.steps[0].total
    assert [step.index for step in recorder.steps] == list(range(total)) == [step.index for step in recorder.done]
    assert recorder.steps[0].sigma > recorder.steps[-1].sigma > 0
    assert torch.equal(recorder.done[0].latents, recorder.steps[1].latents)

    class Asking(Recorder):
        def before(self, step: Step) -> torch.Tensor:
            with torch.enable_grad():
                x = step.latents.clone().requires_grad_()
                gradient = torch.autograd.grad(step.predict(x).square().sum(), x)[0]
            assert gradient.shape == x.shape and float(gradient.abs().max()) > 0
            return step.latents

    assert grey_levels(render(model, PROMPT, seed=3, steps=3, size=size, hooks=(Asking(),))[0], base) == 0


def test_what_a_hook_returns_is_what_comes_next(make: Make) -> None:
    class Zero(Recorder):
        def after(self, step: Step) -> torch.Tensor:
            return torch.zeros_like(step.latents) if step.index == 0 else step.latents

    after = Recorder()
    render(make("sdxl"), PROMPT, seed=3, steps=3, hooks=(Zero(), after))
    assert not after.done[0].latents.any(), "hooks are called in order"
    assert not after.steps[1].latents.any()


def test_the_loop_leaves_the_callers_gradient_mode_alone(make: Make, tmp_path: Path) -> None:
    request = GenerateRequest(prompt=PROMPT, seed=3, steps=2)
    for _ in generate(request, make("sdxl"), [], tmp_path, tmp_path, CancelToken()):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_stop_ends_the_work_before_the_next_step(make: Make, tmp_path: Path, at: int) -> None:
    token = CancelToken()
    seen = 0
    request = GenerateRequest(prompt=PROMPT, seed=3, steps=5, count=2)
    with pytest.raises(Cancelled):
        for event in generate(request, make("sdxl"), [], tmp_path, tmp_path, token):
            seen += isinstance(event, Progress)
            if seen == at:
                token.cancel()
    assert seen == at
    assert not list(tmp_path.glob("*.png"))


def test_a_finished_picture_survives_a_stop_in_the_next(make: Make, tmp_path: Path) -> None:
    token = CancelToken()
    request = GenerateRequest(prompt=PROMPT, seed=3, steps=2, count=2)
    with pytest.raises(Cancelled):
        for event in generate(request, make("sdxl"), [], tmp_path, tmp_path, token):
            if isinstance(event, Artifact):
                token.cancel()
    assert [path.name for path in tmp_path.glob("*.png")] == ["00001-3.png"]


def test_the_size_is_the_models_own_unless_asked_for(make: Make, tmp_path: Path) -> None:
    assert open_picture(pictures(run(make("sdxl"), tmp_path, width=None, height=40))[0]).size == (64, 40)
    with pytest.raises(InputError, match="Width cannot be 40") as caught:
        run(make("flux1"), tmp_path, width=40)
    assert "48" in caught.value.hint or "32" in caught.value.hint


def test_a_sampler_that_does_not_fit_is_refused_before_any_work(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ddim cannot run a FLUX"):
        run(make("flux1"), tmp_path, scheduler="ddim")


@pytest.mark.parametrize(
    ("family", "count", "left"), [("sdxl", 80, 5), ("sdxl", 75, 0), ("sd3", 200, 0), ("sd3", 300, 45)]
)
def test_words_beyond_the_encoders_limit_are_counted(
    make: Make, tmp_path: Path, family: str, count: int, left: int
) -> None:
    events = run(make(family), tmp_path, prompt=" ".join(["cat"] * count), steps=1)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert (f"its last {left} words were left out" in " ".join(notices)) == (left > 0), notices


def test_what_flux_cannot_use_is_said(make: Make, tmp_path: Path) -> None:
    events = run(make("flux1"), tmp_path, negative="blue", steps=1)
    text = " ".join(event.text for event in events if isinstance(event, Notice))
    assert "no negative prompt" in text and "guidance was not used" in text


def test_a_seed_draws_from_its_own_generator_alone(make: Make, tmp_path: Path) -> None:
    model = make("sdxl")
    for scheduler in ("default", "euler_ancestral", "lcm"):
        torch.manual_seed(0)
        first = pictures(run(model, tmp_path, scheduler=scheduler))[0].read_bytes()
        state = torch.get_rng_state()
        torch.manual_seed(1)
        assert pictures(run(model, tmp_path, scheduler=scheduler))[0].read_bytes() == first
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"


def test_the_denoise_block_works_in_other_peoples_pipelines(tiny: Tiny, make: Make) -> None:
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
    from diffusers.modular_pipelines.stable_diffusion_xl.modular_pipeline import StableDiffusionXLModularPipeline

    model = make("sdxl")
    recorder = Recorder()
    kind: Any = StableDiffusionXLModularPipeline
    pipeline = kind(blocks=modular.blocks("sdxl", hooks=(recorder,)))
    parts = {name: model.components[name] for name in pipeline.component_names if name in model.components}
    own = schedule.make("default", model.components["scheduler"], model.spec)
    pipeline.update_components(**parts | {"scheduler": own, "guider": ClassifierFreeGuidance(guidance_scale=5.0)})
    generator = torch.Generator().manual_seed(3)
    image = pipeline(
        prompt=PROMPT, width=64, height=48, num_inference_steps=4, generator=generator, output="images"
    )[0]  # fmt: skip
    request = GenerateRequest(prompt=PROMPT, seed=3, steps=4, width=64, height=48, guidance=5.0)
    assert grey_levels(image, plain(tiny("sdxl"), "sdxl", request)) <= 1
    assert len(recorder.done) == 4


def test_the_loop_itself_needs_no_model() -> None:
    """A network that always answers zero noise: Euler must then keep the latents as they are."""
    from intarsia.pipelines.denoise import Work

    scheduler = D.EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    start = torch.randn(1, 4, 2, 2)

    def silent(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scheduler.scale_model_input(latents, timestep)
        return torch.zeros_like(latents)

    work = Work(start, scheduler.timesteps, scheduler, silent, torch.Generator())
    done = list(denoise(work, CancelToken()))
    assert [step.index for step in done] == [0, 1, 2]
    assert torch.allclose(done[-1].latents, start)


def test_parts_that_wait_elsewhere_give_the_same_picture_and_are_let_go(tiny: Tiny) -> None:
    model = load(resolve(str(tiny("sdxl"))))
    base = render(model, PROMPT, seed=3, steps=2)[0]
    model.offload = True
    model.place()
    modules = list(model.modules.values())
    assert all(hasattr(module, "_hf_hook") for module in modules)
    assert grey_levels(render(model, PROMPT, seed=3, steps=2)[0], base) == 0
    model.free()
    assert not any(hasattr(module, "_hf_hook") for module in modules)
