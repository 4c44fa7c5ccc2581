"""Words that come with an adapter: read as diffusers' textual inversion reads them, and forgotten without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapter_files import attention, kohya, lora, write
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.image import render
from intarsia.pipelines.learned_words import taught
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.sources import resolve, unet_shapes

D: Any = diffusers
Tiny = Callable[..., Path]
PROMPT = "a <s1> in <s2> style"


@pytest.fixture
def folder(tiny: Tiny) -> Path:
    return tiny("sd15")


def bring(path: Path, folder: Path, width: int = 32, words: tuple[str, ...] = ("<s1>", "<s2>")) -> Attachment:
    """An adapter of no strength that brings words: what is read comes from the words alone."""
    index = unet_shapes(resolve(str(folder)))
    shapes = {name.removesuffix(".weight"): shape for name, shape in index.items()}
    tensors = lora(dict(list(attention(shapes).items())[:1]), kohya)
    random = np.random.default_rng(len(path.stem))
    tensors |= {word: random.standard_normal(width).astype(np.float32) for word in words}
    return Attachment(path.stem, read_adapter(write(path, tensors), index), 0.0)


def ids(model: Model) -> list[int]:
    return model.components["tokenizer"](PROMPT)["input_ids"]


def test_words_are_read_as_diffusers_reads_textual_inversion(folder: Path, tmp_path: Path) -> None:
    use = bring(tmp_path / "a.safetensors", folder)
    plain = D.StableDiffusionPipeline.from_pretrained(folder)
    for word, row in use.adapter.words.items():
        plain.load_textual_inversion({word: row[None]}, token=word)
    wanted, _ = plain.encode_prompt(PROMPT, "cpu", 1, False)
    model = load(resolve(str(folder)))
    with taught(model.components, [use]), torch.no_grad():
        tokens = model.components["tokenizer"](
            PROMPT, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        found = model.components["text_encoder"](tokens.input_ids)[0]
        taught_picture = render(model, PROMPT, steps=2)[0]
    torch.testing.assert_close(found, wanted)
    assert np.abs(np.asarray(taught_picture, float) - np.asarray(render(model, PROMPT, steps=2)[0], float)).max() > 0


@pytest.mark.parametrize("broken", [False, True])
def test_they_are_forgotten_without_a_trace(broken: bool, folder: Path, tmp_path: Path) -> None:
    model, use = load(resolve(str(folder))), bring(tmp_path / "a.safetensors", folder)
    tokenizer, table = model.components["tokenizer"], model.components["text_encoder"].get_input_embeddings()
    before = (tokenizer.backend_tokenizer.to_str(), len(tokenizer), table.num_embeddings, id(table.weight), ids(model))
    try:
        with taught(model.components, [use]):
            assert len(ids(model)) < len(before[4]) and table.weight.shape[0] == before[2] + 2
            if broken:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert broken
    after = (tokenizer.backend_tokenizer.to_str(), len(tokenizer), table.num_embeddings, id(table.weight), ids(model))
    assert after == before


def test_words_that_do_not_fit_or_meet_twice_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(resolve(str(folder)))
    one, other = bring(tmp_path / "a.safetensors", folder), bring(tmp_path / "bb.safetensors", folder)
    wide = bring(tmp_path / "c.safetensors", folder, width=768)
    for uses, said in (([one, other], "both bring the word"), ([wide], "768 numbers")):
        with pytest.raises(AdapterError, match=said), taught(model.components, uses):
            raise AssertionError("they were taught")


def test_an_adapter_without_words_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model, use = load(resolve(str(folder))), bring(tmp_path / "a.safetensors", folder, words=())
    before = model.components["tokenizer"].backend_tokenizer
    with taught(model.components, [use]):
        assert model.components["tokenizer"].backend_tokenizer is before
