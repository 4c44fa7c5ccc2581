"""Names bound to places: spans, boxes, the loss against attention whose mark is known, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from intarsia.pipelines.models import Resident
from intarsia.training import base, mini
from intarsia.training.binding import Binding, boxes_of, named_tokens
from intarsia.training.corpus import Captioned
from intarsia.training.scenes import Placed, Plan, Planner, named
from torch import Tensor

ROWS = [
    Captioned(f"{name}.png", name, "", (), "noto", f"{number:X}", "train")
    for number, name in enumerate(("cat", "dog face", "apple", "skis"))
]
LEFT, RIGHT = Placed(0, 0.25, 0.5, 0.5), Placed(1, 0.75, 0.5, 0.5)


@pytest.fixture(scope="module")
def resident() -> Any:  # noqa: ANN401
    return Resident().get("mini")


def test_spans_name_the_objects_in_their_own_order() -> None:
    plans = Planner(ROWS, scenes=1.0).draw(200, np.random.default_rng(0))
    assert {len(plan.objects) for plan in plans} == {2, 3}
    for plan in plans:
        names = [plan.caption[first:last] for first, last in plan.spans]
        assert names == [named(ROWS[placed.index].content) for placed in plan.objects]
        if " right of " in plan.caption or " below " in plan.caption:
            assert plan.spans[0] > plan.spans[1], "the second object is named first"


def test_tokens_and_boxes_follow_the_plan(resident: Any) -> None:  # noqa: ANN401
    tokenizer = resident.components["tokenizer"]
    scene = Plan((RIGHT, LEFT), (1.0,) * 3, (1.0,) * 3, "a cat left of a dog face, noto style", ((14, 24), (0, 5)))
    alone = Plan((Placed(0),), (1.0,) * 3, (1.0,) * 3, "a cat")
    ids, offsets = mini.tokenize(tokenizer, [scene.caption, alone.caption])
    found = named_tokens([scene, alone], offsets)
    assert found.shape == (2, 3, mini.TOKENS) and not found[1].any() and not found[0, 2].any()
    words = [tokenizer.decode(ids[0][row]).replace(" ", "") for row in found[0, :2]]
    assert words == ["adogface", "acat"]
    assert boxes_of([scene, alone])[0, :2].tolist() == [[0.5, 0.25, 1.0, 0.75], [0.0, 0.25, 0.5, 0.75]]


def attention(of_left: int, of_right: int, tokens: int = 5) -> Tensor:
    """`(heads, 64, tokens)`: the left half of an 8 x 8 grid looks at one token, the right half at another."""
    places = torch.arange(64) % 8 < 4
    made = torch.zeros(2, 64, tokens)
    made[:, places, of_left] = 1
    made[:, ~places, of_right] = 1
    return made


def loss(*seen: Tensor) -> float:
    """Of one scene whose first object, on the left, is named by token 1, the second, on the right, by token 3."""
    binding = Binding(torch.nn.Module())
    binding._seen.extend(seen)  # pyright: ignore[reportPrivateUsage]
    names = torch.zeros(1, 3, 5, dtype=torch.bool)
    names[0, 0, 1] = names[0, 1, 3] = True
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.0] * 4]])
    return float(binding.loss(names, boxes))


def test_the_loss_is_none_where_names_are_looked_at_from_their_boxes() -> None:
    assert loss(attention(1, 3)) == pytest.approx(0, abs=1e-4)
    assert loss(attention(3, 1)) > 10, "exchanged"
    everywhere = torch.full((2, 64, 5), 0.2)
    assert loss(everywhere) == pytest.approx(0.25 + np.log(2), abs=1e-3), "half of it outside, two names alike"
    assert loss(attention(1, 3), everywhere) == pytest.approx((0.25 + np.log(2)) / 2, abs=1e-3)


def test_a_batch_without_scenes_costs_nothing() -> None:
    binding = Binding(torch.nn.Module())
    assert float(binding.loss(torch.zeros(2, 3, 5, dtype=torch.bool), torch.zeros(2, 3, 4))) == 0


def test_watching_changes_nothing_and_leaves_nothing(resident: Any) -> None:  # noqa: ANN401
    unet, before = resident.denoiser, dict(resident.denoiser.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    inputs = (torch.randn(1, 8, 16, 16), 500, torch.randn(1, 5, 256))
    added = {"text_embeds": torch.randn(1, 192), "time_ids": torch.ones(1, 6)}
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    try:
        with torch.no_grad():
            plain = unet(*inputs, added_cond_kwargs=added).sample
        binding = Binding(unet)
        seen = binding._seen  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(KeyError), binding.watched(), torch.no_grad():
            assert torch.equal(unet(*inputs, added_cond_kwargs=added).sample, plain)
            assert len(seen) == len(layers) and all(torch.allclose(a.sum(-1), torch.ones(1)) for a in seen)
            raise KeyError
        assert not any("get_attention_scores" in layer.__dict__ for layer in layers) and not seen
    finally:
        unet.set_attn_processor(before)


def test_one_convolution_encodes_as_the_encoder_does(resident: Any) -> None:  # noqa: ANN401
    vae = resident.components["vae"]
    pictures = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(base.patch_encoder(vae)(pictures), vae.encode(pictures).latents, atol=1e-3)


def test_small_objects_are_not_drawn_from_every_other_pixel(tmp_path: Path, bank: Callable[[Path], Any]) -> None:
    drawn = bank(tmp_path).render([Plan((Placed(0, 0.5, 0.5, 0.5),), (1.0,) * 3, (1.0,) * 3, "")])
    inside = drawn[0, :, 20:44, 20:44]
    assert inside.abs().max() < 0.05, "a fine chequerboard of black and white is grey from afar"


@pytest.fixture
def bank() -> Callable[[Path], Any]:
    from intarsia.training.scenes import Bank
    from PIL import Image

    def make(folder: Path) -> Any:  # noqa: ANN401
        chequered = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        Image.fromarray(chequered).convert("RGBA").save(folder / "cat.png")
        return Bank(folder, ROWS[:1], 64, torch.device("cpu"))

    return make
