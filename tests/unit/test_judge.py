"""The judge: where it looks, what it never sees, and that its training can be cut and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from intarsia.pipelines.errors import WeightsError
from intarsia.pipelines.judge import CONTENT, STYLE, ContentNetwork, Judge, StyleNetwork, pixels
from intarsia.training import judge as training
from intarsia.training.corpus import Captioned
from PIL import Image

STYLES = [f"style {i}" for i in range(9)]


def rows(contents: int = 60) -> list[Captioned]:
    return [
        Captioned(f"{style}/{i:04X}.webp", f"thing {i}", style, (), "objects", f"{i:04X}", "train")
        for style in STYLES
        for i in range(contents)
    ]


def shapes(count: int, size: int = 64) -> torch.Tensor:
    """Half-transparent pictures of one colour each: `(count, 4, size, size)`."""
    colours = torch.randint(0, 256, (count, 3, 1, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    picture = torch.zeros(count, 4, size, size, dtype=torch.uint8)
    picture[:, :3] = colours
    picture[:, 3, size // 4 : -size // 4, size // 4 : -size // 4] = 255
    return picture


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Untrained, which is enough to see where it looks."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    return Judge(
        (ContentNetwork(), StyleNetwork()),
        ["a", "b"],
        ["x"],
        unit(torch.randn(2, CONTENT)),
        unit(torch.randn(1, STYLE)),
    )


def test_embeddings_are_unit_rows_and_batches_change_nothing(judge: Judge) -> None:
    pictures = [Image.effect_noise((90, 70), 80 + i).convert("RGB") for i in range(5)]
    together = judge.embed(pictures)
    assert together.content.shape == (5, CONTENT) and together.style.shape == (5, STYLE)
    assert torch.allclose(together.content.norm(dim=1), torch.ones(5), atol=1e-5)
    alone = judge.embed(pictures[3:4])
    assert torch.allclose(together[3].content, alone.content, atol=1e-5)
    assert torch.allclose(together[3].style, alone.style, atol=1e-5)
    assert judge.content_scores(together).shape == (5, 2) and judge.style_scores(together).shape == (5, 1)


def test_a_box_is_looked_at_as_if_it_had_been_cut_out(judge: Judge) -> None:
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste("red", (40, 70, 70, 100))
    boxed = judge.embed([picture], [(0.25, 0.5, 0.75, 1.0)])
    cut = judge.embed([picture.crop((32, 64, 96, 128))])
    assert torch.allclose(boxed.content, cut.content, atol=1e-4)
    assert not torch.allclose(boxed.content, judge.embed([picture]).content, atol=1e-3)


def test_transparency_is_white(judge: Judge) -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert torch.equal(pixels(clear), torch.ones(3, 64, 64))


def test_style_can_be_left_out(judge: Judge) -> None:
    seen = judge.embed([Image.new("RGB", (32, 32))] * 2, style=False)
    assert len(seen) == 2 and len(seen[0].style) == 0


def test_a_folder_without_a_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no judge"):
        Judge.load(tmp_path)


def test_what_the_judge_never_sees_is_fixed_and_about_as_much_as_promised() -> None:
    why = training.unseen(rows())
    assert why == training.unseen(rows())
    assert len({r.content for r, reason in zip(rows(), why, strict=True) if reason == "content"}) == training.CONTENTS
    assert why.count("content") == training.CONTENTS * len(STYLES), "all renderings of them"
    left = [reason for reason in training.unseen(rows(600)) if reason != "content"]
    assert left.count("rendering") / len(left) == pytest.approx(training.CELLS, abs=0.01)


@pytest.mark.parametrize("part", ["content", "style"])
def test_views_are_of_one_size_and_follow_from_the_seed(part: str) -> None:
    views = training.Views(shapes(6, 64 if part == "content" else 128))
    draw = views.changed if part == "content" else views.whole
    chosen = torch.tensor([0, 3, 5, 1])
    one, other, third = (draw(chosen, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert one.shape == (4, 3, *views.pixels.shape[2:]) and one.abs().max() <= 1
    assert torch.equal(one, other) and not torch.equal(one, third)


@pytest.mark.parametrize("part", ["content", "style"])
def test_training_that_was_cut_goes_on_as_if_it_had_not_been(part: str, tmp_path: Path) -> None:
    views, allowed = training.Views(shapes(6, 64 if part == "content" else 128)), torch.arange(6)
    labels = [torch.tensor([0, 1, 2, 3, 4, -1]), torch.arange(6)][: 2 if part == "content" else 1]

    def trained(until: int, path: Path) -> dict[str, torch.Tensor]:
        run = training.Training(training.Lesson(part, views, labels, seed=3), 4, 1e-3, seed=3)
        if path.exists():
            run.load(path)
        while run.step < until:
            run.train_step(allowed, 4)
        run.save(path)
        return {key: value.clone() for key, value in run.lesson.network.state_dict().items()}

    whole, cut = trained(4, tmp_path / "whole.safetensors"), trained(2, tmp_path / "cut.safetensors")
    resumed = trained(4, tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], cut[key]) for key in whole)
