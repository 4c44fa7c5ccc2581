"""Diffusers' modular pipelines, behind one class. Nothing else imports them: they are marked experimental.

Their blocks encode prompts, prepare noise and timesteps, and decode; the denoise block is ours (`DenoiseStep`, around
`denoise.denoise`). Their guider only says whether there are two branches: it would call the network once for each,
`Network` calls it once for both, in the order of the plain pipelines, so that the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers as _diffusers
import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux import before_denoise as flux_before
from diffusers.modular_pipelines.flux import decoders as flux_decoders
from diffusers.modular_pipelines.flux import encoders as flux_encoders
from diffusers.modular_pipelines.flux import inputs as flux_inputs
from diffusers.modular_pipelines.flux.modular_pipeline import FluxModularPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_3 import before_denoise as sd3_before
from diffusers.modular_pipelines.stable_diffusion_3 import decoders as sd3_decoders
from diffusers.modular_pipelines.stable_diffusion_3 import encoders as sd3_encoders
from diffusers.modular_pipelines.stable_diffusion_3 import inputs as sd3_inputs
from diffusers.modular_pipelines.stable_diffusion_3.modular_pipeline import StableDiffusion3ModularPipeline
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise as sdxl_before
from diffusers.modular_pipelines.stable_diffusion_xl import decoders as sdxl_decoders
from diffusers.modular_pipelines.stable_diffusion_xl import encoders as sdxl_encoders
from diffusers.modular_pipelines.stable_diffusion_xl.modular_pipeline import StableDiffusionXLModularPipeline
from PIL import Image
from torch import Tensor

from . import sd15_blocks
from .denoise import Work, denoise
from .events import CancelToken
from .families import FAMILIES, Family
from .hooks import StepHook
from .network import Network

diffusers: Any = _diffusers  # its lazy names are invisible to type checkers
Blocks = dict[str, type[ModularPipelineBlocks]]


@dataclass(frozen=True)
class Recipe:
    """A family's blocks, by what they are for; `pipeline` is diffusers' class that holds its components."""

    pipeline: type[Any]
    encode: Blocks
    prepare: Blocks
    decode: Blocks


RECIPES: dict[str, Recipe] = {
    "sd15": Recipe(
        StableDiffusionXLModularPipeline,  # only its sizes are used, which come from the components
        {"text_encoder": sd15_blocks.TextEncoderStep},
        {
            "input": sd15_blocks.InputStep,
            "set_timesteps": sdxl_before.StableDiffusionXLSetTimestepsStep,
            "prepare_latents": sdxl_before.StableDiffusionXLPrepareLatentsStep,
        },
        {"decode": sdxl_decoders.StableDiffusionXLDecodeStep},
    ),
    "sdxl": Recipe(
        StableDiffusionXLModularPipeline,
        {"text_encoder": sdxl_encoders.StableDiffusionXLTextEncoderStep},
        {
            "input": sdxl_before.StableDiffusionXLInputStep,
            "set_timesteps": sdxl_before.StableDiffusionXLSetTimestepsStep,
            "prepare_latents": sdxl_before.StableDiffusionXLPrepareLatentsStep,
            "prepare_add_cond": sdxl_before.StableDiffusionXLPrepareAdditionalConditioningStep,
        },
        {"decode": sdxl_decoders.StableDiffusionXLDecodeStep},
    ),
    "sd3": Recipe(
        StableDiffusion3ModularPipeline,
        {"text_encoder": sd3_encoders.StableDiffusion3TextEncoderStep},
        {
            "input": sd3_inputs.StableDiffusion3TextInputStep,
            "prepare_latents": sd3_before.StableDiffusion3PrepareLatentsStep,
            "set_timesteps": sd3_before.StableDiffusion3SetTimestepsStep,
        },
        {"decode": sd3_decoders.StableDiffusion3DecodeStep},
    ),
    "flux1": Recipe(
        FluxModularPipeline,
        {"text_encoder": flux_encoders.FluxTextEncoderStep},
        {
            "input": flux_inputs.FluxTextInputStep,
            "prepare_latents": flux_before.FluxPrepareLatentsStep,
            "set_timesteps": flux_before.FluxSetTimestepsStep,
            "prepare_rope": flux_before.FluxRoPEInputsStep,
        },
        {"unpack": flux_decoders.FluxUnpackLatentsStep, "decode": flux_decoders.FluxDecodeStep},
    ),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the networks read it; made by `Engine.encode`, used by `Engine.begin` any number of times.

    Args:
        embeddings: The text blocks' outputs by name.
        guidance: As asked for.
        guided: Whether there are two branches.
    """

    embeddings: Mapping[str, Any]
    guidance: float
    guided: bool


class Engine:
    """One loaded model's encode, prepare and decode blocks.

    Args:
        family: Of the model.
        components: Of the model.
        device: Where it computes.
    """

    def __init__(self, family: Family, components: Mapping[str, Any], device: torch.device) -> None:
        self._family = family
        self._recipe = RECIPES[family.name]
        self._pipeline = _pipeline(family, components, device)
        self._encode: list[Any] = [kind() for kind in self._recipe.encode.values()]
        self._prepare: dict[str, Any] = {name: kind() for name, kind in self._recipe.prepare.items()}
        self._decode: list[Any] = [kind() for kind in self._recipe.decode.values()]

    def encode(self, prompt: str, negative: str, guidance: float) -> Prompt:
        """Read a prompt.

        Args:
            prompt: What the picture shows.
            negative: What it must not show; "" is as if there were none.
            guidance: Up to 1 there is no guidance, as in the plain pipelines; above, both branches are read.
        """
        embedded = bool(getattr(getattr(self._pipeline, "unet", None), "config", {}).get("time_cond_proj_dim"))
        guided = guidance > 1 and self._family.negative and not embedded
        guider = ClassifierFreeGuidance(guidance_scale=guidance, enabled=guided)
        if self._family.negative:
            self._pipeline.guider = guider
        state = _state(prompt=prompt)
        if guided and (negative or self._family.name == "sd3"):  # SD3's block has no branch without a negative prompt
            state.set("negative_prompt", negative)
        for block in self._encode:
            block(self._pipeline, state)
        kept = {key: value for key, value in state.values.items() if isinstance(value, Tensor)}
        return Prompt(kept, guidance, guided)

    def begin(
        self,
        prompt: Prompt,
        size: tuple[int, int],
        steps: int,
        scheduler: Any,  # noqa: ANN401
        generator: torch.Generator,
    ) -> Work:
        """Draw the noise and set the timesteps of one picture.

        Args:
            prompt: From `encode`.
            size: (width, height) in pixels.
            steps: Denoising steps.
            scheduler: A fresh sampler.
            generator: On the CPU.
        """
        self._pipeline.scheduler = scheduler
        state = _state(**prompt.embeddings, width=size[0], height=size[1], num_inference_steps=steps)
        state.set("generator", generator)
        state.set("guidance_scale", prompt.guidance)
        for name, block in self._prepare.items():
            block(self._pipeline, state)
            if name == "input":
                state.set("dtype", torch.float32)  # of noise and latents, whatever the network computes in
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # spares a search, and a look at the device, in every step
        network = Network(self._family, self._pipeline, state, prompt.guidance, prompt.guided)
        return Work(state.get("latents"), state.get("timesteps"), scheduler, network, generator)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> list[Image.Image]:
        """Turn denoised latents into pictures.

        Args:
            latents: As the loop left them.
            size: (width, height) in pixels.
        """
        state = _state(latents=latents.to(self._pipeline.vae.dtype), width=size[0], height=size[1])
        for block in self._decode:
            block(self._pipeline, state)
        return state.get("images")

    def spatial(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Lay latents out as `(batch, channels, height / 8, width / 8)`; FLUX.1 packs four cells into a token."""
        if latents.ndim == 4:
            return latents
        state = _state(latents=latents, width=size[0], height=size[1])
        self._decode[0](self._pipeline, state)
        return state.get("latents")


def _state(**values: Any) -> Any:  # noqa: ANN401 - its getters are typed too loosely to be of use
    state = PipelineState()
    for name, value in values.items():
        state.set(name, value)
    return state


def _pipeline(family: Family, components: Mapping[str, Any], device: torch.device) -> Any:  # noqa: ANN401
    """A modular pipeline that holds the components; the guider and the image processor are its own."""
    recipe = RECIPES[family.name]

    class Placed(recipe.pipeline):
        """Offloaded components lie on the CPU between uses, so the device is said, not looked up."""

        @property
        def _execution_device(self) -> torch.device:
            return device

    pipeline = Placed(blocks=blocks(family.name))
    wanted = set(pipeline.component_names)
    pipeline.register_components(**{name: part for name, part in components.items() if name in wanted})
    zeros = components.get("settings", {}).get("force_zeros_for_empty_prompt")
    if zeros is not None:
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    return pipeline


def blocks(family: str, hooks: Sequence[StepHook] = ()) -> SequentialPipelineBlocks:
    """Give a family's whole text-to-image workflow with our denoise block in it, for a modular pipeline of one's own.

    Args:
        family: Key of FAMILIES.
        hooks: What to hang on the loop.
    """
    recipe = RECIPES[family]
    found: dict[str, ModularPipelineBlocks] = {name: kind() for name, kind in (recipe.encode | recipe.prepare).items()}
    found["denoise"] = DenoiseStep(family, hooks)
    return SequentialPipelineBlocks.from_blocks_dict(found | {name: kind() for name, kind in recipe.decode.items()})


class DenoiseStep(ModularPipelineBlocks):
    """Our denoising loop as a block, for use in other people's modular pipelines in place of diffusers' own.

    Args:
        family: Key of FAMILIES.
        hooks: What to hang on the loop.
    """

    model_name = "intarsia"

    def __init__(self, family: str = "sdxl", hooks: Sequence[StepHook] = ()) -> None:
        self._family = FAMILIES[family]
        self._hooks = hooks
        super().__init__()

    @property
    def description(self) -> str:
        return "Denoises with hooks around each step; both guidance branches run in one batch."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        kinds = {"sd3": diffusers.SD3Transformer2DModel, "flux1": diffusers.FluxTransformer2DModel}
        denoiser = kinds.get(self._family.name, diffusers.UNet2DConditionModel)
        return [
            ComponentSpec(self._family.denoiser, denoiser),
            ComponentSpec("scheduler", diffusers.EulerDiscreteScheduler),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        names = ("latents", "timesteps", "prompt_embeds")
        return [*(InputParam(name, required=True) for name in names), InputParam("generator")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=Tensor)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:  # noqa: ANN401
        guider: Any = getattr(components, "guider", None)
        guided = guider is not None and guider.num_conditions > 1 and self._family.negative
        scale = float(guider.guidance_scale) if guider is not None and guided else 1.0
        network = Network(self._family, components, state, scale, guided)
        generator = state.get("generator") or torch.Generator().manual_seed(0)
        work = Work(state.get("latents"), state.get("timesteps"), components.scheduler, network, generator)
        for done in denoise(work, CancelToken(), self._hooks):
            state.set("latents", done.latents)
        return components, state
