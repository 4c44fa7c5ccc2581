"""The model families: which parts their pipelines have and what sizes they take. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import WeightsError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        name: Key in FAMILIES.
        title: As people call it.
        pipeline_class: The plain diffusers pipeline, as `model_index.json` names it.
        denoiser: Component that predicts noise or velocity.
        text_encoders: Components that read the prompt, in the order the pipeline uses them.
        tokenizers: One for each text encoder.
        pixel_step: Width and height must be multiples of this many pixels.
        default_size: (width, height) in pixels, used only where the model itself does not say.
        prediction: "noise" (or v, as the scheduler's settings say) or "flow" (velocity of a straight path).
        negative: Whether guidance compares with a negative prompt; FLUX.1 is distilled and does not.
    """

    name: str
    title: str
    pipeline_class: str
    denoiser: Literal["unet", "transformer"]
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    pixel_step: int
    default_size: tuple[int, int]
    prediction: Literal["noise", "flow"]
    negative: bool = True

    @property
    def modules(self) -> tuple[str, ...]:
        """Every component with weights."""
        return (*self.text_encoders, self.denoiser, "vae")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd15",
            title="Stable Diffusion 1.5",
            pipeline_class="StableDiffusionPipeline",
            denoiser="unet",
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            pixel_step=8,
            default_size=(512, 512),
            prediction="noise",
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            pipeline_class="StableDiffusionXLPipeline",
            denoiser="unet",
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            pixel_step=8,
            default_size=(1024, 1024),
            prediction="noise",
        ),
        Family(
            name="sd3",
            title="Stable Diffusion 3",
            pipeline_class="StableDiffusion3Pipeline",
            denoiser="transformer",
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
            pixel_step=16,
            default_size=(1024, 1024),
            prediction="flow",
        ),
        Family(
            name="flux1",
            title="FLUX.1",
            pipeline_class="FluxPipeline",
            denoiser="transformer",
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            pixel_step=16,
            default_size=(1024, 1024),
            prediction="flow",
            negative=False,
        ),
    )
}
SUPPORTED = ", ".join(family.title for family in FAMILIES.values())

# What a checkpoint's tensor names tell of it: the first row whose names all occur. The last column is the family, or
# the reason for a refusal.
SINGLE_FILES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"), "sdxl", ""),
    (("conditioner.embedders.0.model.ln_final.weight",), "", "the SDXL refiner, which is not a model of its own"),
    (("cond_stage_model.model.ln_final.weight",), "", "Stable Diffusion 2"),
    (("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",), "sd15", ""),
    (("cond_stage_model.transformer.embeddings.token_embedding.weight",), "sd15", ""),
    (("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",), "", "Stable Diffusion 3 in one file"),
    (("double_blocks.0.img_attn.qkv.weight",), "", "FLUX in one file"),
    (("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",), "", "FLUX in one file"),
    (("model.diffusion_model.input_blocks.0.0.weight",), "", "a denoiser without its text encoders"),
    (("first_stage_model.decoder.conv_in.weight",), "", "an autoencoder alone"),
)


def family_of_index(index: Mapping[str, Any], where: str) -> Family:
    """Recognize a family by a folder's `model_index.json`.

    Raises:
        WeightsError: It is another family; says which.
    """
    kind = index.get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline_class == kind:
            return family
    raise WeightsError(f"{where} is a {kind}, which is not supported.", f"Supported are: {SUPPORTED}.")
