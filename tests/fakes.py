"""Tiny random pipelines with the real families' block names, and tokenizers that work, written offline in a second.

`tiny_pipeline("sdxl", folder)` writes an ordinary diffusers folder: plain `from_pretrained` loads it. Nothing is
downloaded and the weights follow from the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

D: Any = diffusers  # the annotations of both libraries are too narrow for their own configurations
T: Any = transformers
Tiny = Callable[..., Path]  # the type of the fixture `tiny`

WIDTH = 32  # of every text encoder but two: the T5 of sd3 must hold two CLIPs side by side, and
WIDER = 48  # single files tell the two CLIPs of SDXL apart by their width
WORDS = ("a ", "apple ", "cat ", "red ", "blue ", "dog ", "style ", "photo ", "of ", "in ", "sks ")


def tiny_pipeline(family: str, folder: Path, seed: int = 0, variant: str = "") -> Path:
    """Write a tiny random pipeline of a family.

    Args:
        family: "sd15", "sdxl", "sd3" or "flux1".
        folder: Where to write it; made if missing.
        seed: The weights follow from it.
        variant: "" for the usual one; "vpred" (sdxl: v-prediction, zero terminal SNR, trailing timesteps,
            AutoencoderTiny with 8 channels, as Mini); "guided" (flux1: guidance is an input of the network).

    Returns:
        The folder.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        pipeline = MAKERS[family](variant)
    finally:
        torch.set_rng_state(state)
    pipeline.save_pretrained(folder)
    return folder


def clip_tokenizer() -> Any:  # noqa: ANN401
    """A byte-level BPE tokenizer with a handful of whole words, in CLIP's own format."""
    letters = _byte_letters()
    vocab = list(letters) + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left, *rest = [*word.strip()[:-1], word.strip()[-1] + "</w>"]
        for part in rest:
            if (left, part) not in merges:
                merges.append((left, part))
                vocab.append(left + part)
            left += part
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return T.CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocab)}, merges=merges, model_max_length=77
    )


def t5_tokenizer() -> Any:  # noqa: ANN401
    """A unigram tokenizer over single characters and a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)]
    pieces += [("▁" + word.strip(), -3.0) for word in WORDS]
    return T.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(code if code in kept else next(spare)) for code in range(256)]


def _clip(kind: type[Any], tokenizer: Any, width: int = WIDTH) -> Any:  # noqa: ANN401
    config = T.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    model = kind(config).eval()
    with torch.no_grad():  # as initialised, prompts would hardly differ
        model.text_model.embeddings.token_embedding.weight.mul_(50) if hasattr(model, "text_model") else (
            model.embeddings.token_embedding.weight.mul_(50)
        )
    return model


def _t5(width: int, tokenizer: Any) -> Any:  # noqa: ANN401
    config = T.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return T.T5EncoderModel(config).eval()


def _vae(channels: int, **more: Any) -> Any:  # noqa: ANN401  # noqa: ANN401
    return D.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **more,
    ).eval()


def _unet_common() -> dict[str, Any]:
    return {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8}


def _sd15(variant: str) -> Any:  # noqa: ANN401
    tokenizer = clip_tokenizer()
    unet = D.UNet2DConditionModel(
        **_unet_common(),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    scheduler = D.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return D.StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(T.CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=_attentive(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(variant: str) -> Any:  # noqa: ANN401
    tokenizer = clip_tokenizer()
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    vpred = variant == "vpred"
    if vpred:
        betas |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    vae: Any = _vae(4, scaling_factor=0.13025)
    if vpred:
        vae = D.AutoencoderTiny(
            latent_channels=8,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            scaling_factor=1.0,
        ).eval()
        with torch.no_grad():  # contrast, so that a comparison of pictures can fail
            vae.decoder.layers[-1].weight.mul_(8)
    channels = 8 if vpred else 4
    unet = D.UNet2DConditionModel(
        **_unet_common() | {"in_channels": channels, "out_channels": channels},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=WIDTH + WIDER,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDER,
    )
    return D.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=_clip(T.CLIPTextModel, tokenizer),
        text_encoder_2=_clip(T.CLIPTextModelWithProjection, tokenizer, WIDER),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=_attentive(unet),
        scheduler=D.EulerDiscreteScheduler(**betas),
        force_zeros_for_empty_prompt=not vpred,
        add_watermarker=False,
    )


def _sd3(variant: str) -> Any:  # noqa: ANN401
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    transformer = D.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=48,
    )
    return D.StableDiffusion3Pipeline(
        transformer=_stirred(transformer),
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(8, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(T.CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip(T.CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(2 * WIDTH, long),
        tokenizer_3=long,
    )


def _flux1(variant: str) -> Any:  # noqa: ANN401
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    transformer = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=variant == "guided",
    )
    return D.FluxPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(T.CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(WIDTH, long),
        tokenizer_2=long,
        transformer=_stirred(transformer),
    )


def _attentive(unet: Any) -> Any:  # noqa: ANN401
    """Let the prompt weigh more than it does in a freshly initialised network."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight.mul_(20)
    return unet.eval()


def _stirred(transformer: Any) -> Any:  # noqa: ANN401
    """Give the zero-initialised layers of a transformer random weights, or it would ignore its prompt."""
    for weight in transformer.parameters():
        if weight.ndim > 1 and not weight.detach().any():
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        transformer.context_embedder.weight.mul_(10)
        transformer.proj_out.weight.mul_(4)
    return transformer.eval()


MAKERS: dict[str, Callable[[str], Any]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux1": _flux1}
