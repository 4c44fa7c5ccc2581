"""Mini's training: corpus, scenes, tokenizer, schedule, and a run that is cut and resumed."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.sources import mini_folder
from intarsia.training import base, corpus, long_run, mini, scenes
from intarsia.training.corpus import Captioned
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

WORDS = ["a red apple, twemoji style", "a dog left of a house on a light blue background", "noto style"] * 20


def squares(folder: Path, size: int = 32) -> list[Captioned]:
    """Eight captioned pictures in two styles: a coloured square in the middle of a transparent one."""
    rows: list[Captioned] = []
    for index, colour in enumerate(("red", "lime", "blue", "black")):
        for style in ("flat", "round"):
            image = Image.new("RGBA", (size, size))
            image.paste(Image.new("RGBA", (size // 2, size // 2), colour), (size // 4, size // 4))
            name = f"{style}/{index}.png"
            (folder / style).mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
            rows.append(Captioned(name, f"{colour} square", style, ("box", colour), "objects", str(index), "train"))
    (folder / "captions.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return rows


@pytest.fixture
def bank(tmp_path: Path) -> scenes.Bank:
    return scenes.Bank(tmp_path, squares(tmp_path), 32, torch.device("cpu"))


def plan(*objects: scenes.Placed, background: float = 1.0) -> scenes.Plan:
    return scenes.Plan(objects, (background,) * 3, (background,) * 3, "")


def centre_of_ink(picture: Tensor) -> tuple[float, float]:
    """Where the dark of `(3, size, size)` on white lies, as fractions from left and top."""
    ink = (1 - picture).sum(0)
    at = (torch.arange(len(ink)) + 0.5) / len(ink)
    return float((ink.sum(0) * at).sum() / ink.sum()), float((ink.sum(1) * at).sum() / ink.sum())


def test_an_object_lands_where_its_plan_says(bank: scenes.Bank) -> None:
    black = 6
    for x, y, size in ((0.5, 0.5, 1.0), (0.3, 0.7, 0.5), (0.75, 0.25, 0.4)):
        made = bank.render([plan(scenes.Placed(black, x, y, size))])[0]
        assert centre_of_ink(made) == pytest.approx((x, y), abs=0.02)
        area = float(((1 - made) / 2).mean())
        assert area == pytest.approx(size**2 / 4, rel=0.15)


def test_mirroring_flips_and_the_later_object_covers_the_earlier(bank: scenes.Bank) -> None:
    lopsided = bank.pixels.clone()
    lopsided[6, :, :, :16] = 0
    bank.pixels = lopsided
    right, left = bank.render([plan(scenes.Placed(6)), plan(scenes.Placed(6, mirror=True))])
    torch.testing.assert_close(left, right.flip(-1), atol=1e-4, rtol=0)
    covered = bank.render([plan(scenes.Placed(0), scenes.Placed(2))])[0]
    torch.testing.assert_close(covered[:, 16, 16], torch.tensor([-1.0, 1.0, -1.0]))  # lime over red


def test_the_same_seed_plans_the_same_pictures_and_scenes_name_their_objects(tmp_path: Path) -> None:
    rows = squares(tmp_path)
    planner = scenes.Planner(rows, scenes=1.0)
    first, again = (planner.draw(40, np.random.default_rng(5)) for _ in range(2))
    assert first == again
    for one in first:
        assert len(one.objects) in (2, 3)
        assert all(rows[item.index].content in one.caption for item in one.objects)
        if " left of " in one.caption:
            assert one.objects[0].x < one.objects[1].x
        if " below " in one.caption:  # "second below first"
            assert one.objects[1].y > one.objects[0].y


def test_a_folder_with_text_files_is_a_corpus_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no captioned pictures"):
        scenes.read_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a black tile\n")
    assert [row.content for row in scenes.read_folder(tmp_path)] == ["a black tile"]


def test_every_text_has_tokens_and_comes_back(tmp_path: Path) -> None:
    tokenizer = mini.train_tokenizer(WORDS, tmp_path, size=700)
    for text in ("a red apple", "ÿ 漢字 🦊 [v12]", "unheard-of words"):
        ids = tokenizer(text).input_ids[1:-1]
        assert tokenizer.eos_token_id not in ids  # CLIP's unknown token is its end token: it would cut the prompt
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    reloaded = mini.transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert reloaded(WORDS[0]).input_ids == tokenizer(WORDS[0]).input_ids
    assert mini.tokenize(reloaded, ["a" * 500])[0].shape == (1, mini.TOKENS)


def test_training_noise_is_the_exported_sampler_s() -> None:
    alphas, sampler = base.zero_terminal_alphas(), mini.scheduler()
    assert float(alphas[-1]) == 0
    torch.testing.assert_close(alphas[:-1], sampler.alphas_cumprod[:-1])


def test_latents_are_whitened_principal_components_of_patches(bank: scenes.Bank) -> None:
    """Oracle: numpy's singular values of the very patches, cut out by slicing."""
    from intarsia.training.autoencoder import fit_encoder

    rng = np.random.default_rng(0)
    mixed = torch.from_numpy(rng.random((48, 3, 4, 4))).float()
    pictures = torch.nn.functional.interpolate(mixed, (32, 32), mode="bilinear") * 2 - 1  # (48, 3, 32, 32)
    vae = mini.build_autoencoder()
    fit_encoder(vae, pictures)
    with torch.no_grad():
        latents = vae.encode(pictures).latents  # (48, 8, 4, 4)
    values = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(values), torch.eye(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(values.mean(1), torch.zeros(8), atol=2e-3, rtol=0)
    array = ((pictures + 1) / 2).numpy()
    cut = [
        array[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel() for n in range(48) for y in range(4) for x in range(4)
    ]
    patches = np.stack(cut) - np.mean(cut, axis=0)
    left, _, _ = np.linalg.svd(patches.astype(np.float64), full_matrices=False)
    expected = left[:, :8] * np.sqrt(len(cut) - 1)  # (patches, 8)
    found = latents.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    same = np.abs((found * expected).mean(0))  # both have unit variance: 1 means equal up to sign
    np.testing.assert_allclose(same, 1, atol=0.01)


def trainer(folder: Path, work: Path) -> tuple[base.Trainer, scenes.Bank, scenes.Planner]:
    rows = scenes.read_folder(folder)
    torch.manual_seed(0)
    parts = mini.build(mini.train_tokenizer(WORDS, work / "tokenizer", 700), mini.build_autoencoder(), seed=0)
    work.mkdir(exist_ok=True)
    bank = scenes.Bank(folder, rows, 32, torch.device("cpu"))
    phases = (base.Phase(32, steps=4, batch=2, pool=8, refresh=2),)
    return base.Trainer(parts, phases, 1e-3, seed=3, work=work), bank, scenes.Planner(rows)


def test_a_run_that_was_cut_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    squares(folder)
    whole, bank, planner = trainer(folder, tmp_path / "whole")
    assert whole.run({32: bank}, planner, until=float("inf"))
    cut, _, _ = trainer(folder, tmp_path / "cut")
    step = base.Trainer._train_step  # pyright: ignore[reportPrivateUsage]

    def interrupted(self: base.Trainer, pool: base.LatentPool, phase: base.Phase) -> Tensor:
        self.asked_to_stop = self.step == 2
        return step(self, pool, phase)

    with monkeypatch.context() as patch:
        patch.setattr(base.Trainer, "_train_step", interrupted)
        assert not cut.run({32: bank}, planner, until=float("inf"))
    resumed, _, _ = trainer(folder, tmp_path / "cut")
    resumed.load()
    assert resumed.step == 3
    assert resumed.run({32: bank}, planner, until=float("inf"))
    for key, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[key]), key
        assert torch.equal(whole.average[key], resumed.average[key]), key


def test_the_long_run_goes_on_from_the_weights_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path / "data")
    shutil.copytree(mini_folder(), tmp_path / "mini")
    drawn: list[list[str]] = []
    monkeypatch.setattr(long_run.sheet, "main", lambda: drawn.append(sys.argv))
    sizes = ["--small-steps", "1", "--small-batch", "2", "--steps", "0", "--pool", "4", "--refresh", "1"]
    where = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "mini")]
    monkeypatch.setattr(sys, "argv", ["long_run", *where, *sizes, "--device", "cpu", "--learning-rate", "1e-12"])
    long_run.main()
    card = json.loads((tmp_path / "mini" / "card.json").read_text("utf-8"))
    assert card["contents"] == ["red square", "lime square", "blue square", "black square"] and card["pictures"] == 2
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / weights) for folder in (mini_folder(), tmp_path / "mini"))
    assert max(float((after[key].float() - before[key].float()).abs().max()) for key in before) < 1e-3
    assert drawn, "the sheet was drawn anew"


def test_glyphs_are_matched_by_codepoint_by_name_and_by_alias(tmp_path: Path) -> None:
    wanted = [
        corpus.Content("1F34E", "red apple", (), "food", ("red-apple", "apple")),
        corpus.Content("2764", "red heart", (), "faces", ("red-heart",)),
        corpus.Content("1F436", "dog face", (), "animals", ("dog-face", "dog")),
    ]
    package = tmp_path / "set"
    package.mkdir()
    body = '<path d="M0 0h8v16H0z" fill="currentColor"/>'
    icons = {"icons": {"apple": {"body": body}, "heart": {"body": body}}, "aliases": {"dogface": {"parent": "heart"}}}
    icons["aliases"]["dogface"]["hFlip"] = True  # type: ignore[index]
    (package / "icons.json").write_text(json.dumps(icons))
    (package / "chars.json").write_text(json.dumps({"2764-fe0f": "heart"}))
    found = {g.content.code: g for g in corpus.glyphs(tmp_path, corpus.IconSet("s", "set", "1", "MIT"), wanted)}
    assert set(found) == {"1F34E", "2764", "1F436"}
    assert found["1F436"].flip and not found["2764"].flip
    pytest.importorskip("resvg_py")
    ink = np.asarray(corpus.draw(found["1F436"], 32))[:, :, 3]
    assert ink[:, 17:].min() >= 254 and ink[:, :15].max() <= 1  # the left half, mirrored


def test_held_out_contents_are_sixty_and_not_among_the_first(tmp_path: Path) -> None:
    hidden = corpus.held_out()
    assert len(hidden) == 60
    splits = Path(corpus.__file__).parents[1] / "assets" / "splits"
    lines = (splits / "held_out_contents.txt").read_text().splitlines()
    names = {line.split(" ", 2)[2] for line in lines if not line.startswith("#")}
    first = set((splits / "first_contents.txt").read_text().splitlines()[1:])
    assert not names & first
