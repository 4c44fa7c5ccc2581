"""Mini, the embedded model: its shape, its tokenizer, its export as a plain SDXL folder.

Mini has SDXL's block names and conditioning at a size that fits a laptop, so every adapter method written for SDXL
runs on it unchanged. Nothing outside this file and its training knows that Mini exists.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import tokenizers as _tokenizers
import torch
import transformers as _transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

diffusers: Any = _diffusers  # the lazy names of these three are invisible to type checkers
transformers: Any = _transformers
tokenizers: Any = _tokenizers
Part = Any  # a network or tokenizer of theirs, whose own types are partial

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LATENTS = 8
TOKENS = 40  # captions take a dozen; every token more costs time in each cross-attention


def train_tokenizer(texts: Iterable[str], folder: Path, size: int = 4096) -> Part:
    """Train a byte-level BPE in CLIP's own form on captions; every byte has a token, so no text is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][: size - 2 * len(alphabet) - 2]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    made = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=START, eos_token=END, unk_token=END, pad_token=END,
        model_max_length=TOKENS,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


@dataclass
class Mini:
    """The trainable parts; the autoencoder is trained before them and stays frozen."""

    tokenizer: Part  # CLIPTokenizer
    text_encoder: Part  # CLIPTextModel
    text_encoder_2: Part  # CLIPTextModelWithProjection
    unet: Part  # UNet2DConditionModel
    vae: Part  # AutoencoderTiny

    def trained(self) -> dict[str, Any]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def encode(self, ids: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids `(batch, 40)` as SDXL does: token states `(batch, 40, 256)` and pooled `(batch, 192)`.

        Args:
            ids: Token ids.
            dropped: `(batch,)` bool; those are zeros, SDXL's form of "no prompt".
        """
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        keep = (~dropped).to(states.dtype)
        return states * keep[:, None, None], second.text_embeds * keep[:, None]


def build_autoencoder() -> Part:
    """An `AutoencoderTiny`, 8x down to 8 channels; its encoder has no blocks, hence is linear (see autoencoder.py)."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(0, 0, 0, 0),
        decoder_block_out_channels=(48, 48, 48, 48),
        latent_channels=LATENTS,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build(tokenizer: Part, vae: Part, seed: int) -> Mini:
    """Make an untrained Mini around a tokenizer and an autoencoder."""
    torch.manual_seed(seed)  # diffusers and transformers draw initial weights from the global generator
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": TOKENS,
        "hidden_act": "gelu",
    }
    first = transformers.CLIPTextConfig(
        **common, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, projection_dim=64
    )
    second = transformers.CLIPTextConfig(
        **common, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=3, projection_dim=192
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(2, 3, 4),  # SDXL's field of this name counts heads: 32 channels each
        cross_attention_dim=256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 192,
    )
    return Mini(
        tokenizer, transformers.CLIPTextModel(first), transformers.CLIPTextModelWithProjection(second), unet, vae
    )


def start_from(mini: Mini, folder: Path) -> None:
    """Take over the networks of an earlier Mini; of one with other latents all but the two layers that know them."""
    earlier_vae = diffusers.AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    ours = mini.vae.encoder.state_dict()
    same = all(torch.allclose(ours[k].float(), v, atol=1e-2) for k, v in earlier_vae.encoder.state_dict().items())
    for name, part in mini.trained().items():
        earlier = type(part).from_pretrained(folder / name, torch_dtype=torch.float32).state_dict()
        kept = {k: v for k, v in earlier.items() if same or not k.startswith(("conv_in.", "conv_out."))}
        part.load_state_dict({**part.state_dict(), **kept})


def scheduler() -> Part:
    """v-prediction with zero terminal SNR and trailing timesteps (arXiv:2305.08891): truly white backgrounds."""
    return diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def export(mini: Mini, folder: Path, size: int) -> None:
    """Write Mini, which draws `size` pixels by default, as a plain SDXL folder in fp16; temporary name first."""
    mini.unet.register_to_config(sample_size=size // 8)
    mini.tokenizer.model_max_length = TOKENS
    mini.tokenizer.backend_tokenizer.no_truncation()  # what training had set; readers set their own
    mini.tokenizer.backend_tokenizer.no_padding()
    import copy

    parts = {name: copy.deepcopy(part).to("cpu", torch.float16) for name, part in mini.trained().items()}
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=copy.deepcopy(mini.vae).to("cpu", torch.float16),
        tokenizer=mini.tokenizer,
        tokenizer_2=mini.tokenizer,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **parts,
    )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    _tidy(fresh)
    for extra in ("README.md", "card.json"):
        if (folder / extra).exists():
            shutil.copy2(folder / extra, fresh / extra)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def _tidy(folder: Path) -> None:
    """Take out of the written settings what is of this machine, and what only makes loaders talk."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            continue
        settings = {key: value for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")}
        if path.parent.name == "vae":
            settings.pop("block_out_channels", None)  # its loader derives this, and warns of finding it
        if path.parent.name.startswith("text_encoder"):
            settings["dtype"] = "float32"  # transformers would otherwise load the stored fp16
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def size_conditioning(count: int, size: int, device: torch.device) -> Tensor:
    """SDXL's six numbers `(count, 6)`: original height and width, crop top and left, target height and width."""
    return torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=torch.float32).expand(count, -1)


def tokenize(tokenizer: Part, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenize as SDXL's pipelines do, padded with the end token.

    Returns:
        Ids `(batch, 40)`, and the first and last character of each token `(batch, 40, 2)`.
    """
    made = tokenizer(
        list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt",
        return_offsets_mapping=True,
    )  # fmt: skip
    return made.input_ids, made.offset_mapping
