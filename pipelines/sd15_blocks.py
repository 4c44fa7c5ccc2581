"""Stable Diffusion 1.5 as modular blocks: diffusers has none for it, so the two that differ from SDXL's are here."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class TextEncoderStep(ModularPipelineBlocks):
    """Encode the prompt, and the negative one where guidance compares with it."""

    model_name = "stable-diffusion"

    @property
    def description(self) -> str:
        return "Encodes the prompt with CLIP; an absent negative prompt is the empty one."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", CLIPTextModel),
            ComponentSpec("tokenizer", CLIPTokenizer),
            ComponentSpec("guider", ClassifierFreeGuidance, default_creation_method="from_config"),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("prompt", required=True), InputParam("negative_prompt")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("prompt_embeds", type_hint=Tensor), OutputParam("negative_prompt_embeds", type_hint=Tensor)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:  # noqa: ANN401
        block: Any = self.get_block_state(state)
        texts: list[str] = [block.prompt]
        if components.guider.num_conditions > 1:
            texts.append(block.negative_prompt or "")
        embeds = [_encode(components, text) for text in texts]
        block.prompt_embeds = embeds[0]  # (1, tokens, width)
        block.negative_prompt_embeds = embeds[1] if len(embeds) > 1 else None
        self.set_block_state(state, block)
        return components, state


def _encode(components: Any, text: str) -> Tensor:  # noqa: ANN401
    tokenizer, encoder = components.tokenizer, components.text_encoder
    tokens = tokenizer(
        [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = components._execution_device
    mask = tokens.attention_mask.to(device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(device), attention_mask=mask)[0]


class InputStep(ModularPipelineBlocks):
    """Tell the following blocks the batch size and the dtype."""

    model_name = "stable-diffusion"

    @property
    def description(self) -> str:
        return "Determines batch size and dtype from the embeddings."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("prompt_embeds", required=True, type_hint=Tensor)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("batch_size", type_hint=int), OutputParam("dtype", type_hint=torch.dtype)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:  # noqa: ANN401
        block: Any = self.get_block_state(state)
        block.batch_size = block.prompt_embeds.shape[0]
        block.dtype = block.prompt_embeds.dtype
        self.set_block_state(state, block)
        return components, state
