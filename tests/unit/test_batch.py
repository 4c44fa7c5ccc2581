"""Pictures made several in a pass are those made one by one."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import Tiny
from intarsia.pipelines.batch import render_many
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.image import render
from intarsia.pipelines.models import load
from intarsia.pipelines.sources import resolve

PROMPTS = ["a red apple", "two green pears on a plate", "a red apple"]
LEVELS = 1  # grey levels another order of additions may cost


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_holds_the_pictures_that_each_seed_gives_alone(tiny: Tiny, family: str, guidance: float) -> None:
    model = load(resolve(str(tiny(family))))
    together = list(render_many(model, PROMPTS, [3, 4, 5], steps=3, guidance=guidance, batch=2))
    for picture, prompt, seed in zip(together, PROMPTS, (3, 4, 5), strict=True):
        alone = render(model, prompt, seed=seed, steps=3, guidance=guidance)[0]
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= LEVELS
    assert np.asarray(together[0]).tobytes() != np.asarray(together[2]).tobytes(), "another seed, another picture"


def test_noise_inside_the_loop_comes_from_each_pictures_own_seed(tiny: Tiny) -> None:
    model = load(resolve(str(tiny("sdxl"))))
    both = [
        list(render_many(model, PROMPTS, [3, 4, 5], steps=3, batch=size, scheduler="euler_ancestral"))
        for size in (1, 3)
    ]
    for one, other in zip(*both, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= LEVELS


def test_a_stop_and_a_missing_seed_are_noticed(tiny: Tiny) -> None:
    model, token = load(resolve(str(tiny("sdxl")))), CancelToken()
    with pytest.raises(InputError, match="3 prompts but 1 seeds"):
        list(render_many(model, PROMPTS, [1]))
    token.cancel()
    with pytest.raises(Cancelled):
        list(render_many(model, PROMPTS, [1, 2, 3], steps=2, token=token))
