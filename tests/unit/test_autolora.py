"""AutoLoRA: gates against a loop over tokens and their limits, gate files, training, and retrieval by words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.draw import prepared
from intarsia.composition.gate import KEY, ROWS, Gate, fingerprint, initial, read_gate, widths, write_gate
from intarsia.composition.gate_training import GateOptions, Lesson, School, compared, generator, train_gate
from intarsia.composition.method import methods
from intarsia.composition.methods.autolora import AutoLoraOptions
from intarsia.composition.retrieval import Candidate, embedded, nearness, phrases, ranked, retrieve
from intarsia.pipelines.adapter_file import write_tensors
from intarsia.pipelines.attach import attached
from intarsia.pipelines.errors import AdapterError, Cancelled, InputError
from intarsia.pipelines.events import Artifact, CancelToken, Metric, Progress
from intarsia.pipelines.models import Model
from torch import Tensor, nn

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")


def gate_with(sizes: dict[str, int], **rows: float) -> Gate:
    """Gates whose rows are set to numbers; the rest plain."""
    plain = {"own": 0.0, "cross": 0.0, "shift": 0.0, "out": 1.0, "norm": 1.0, "norm shift": 0.0}
    values = [{**plain, "base norm": 1.0, "base norm shift": 0.0, **rows}[row] for row in ROWS]
    return Gate({path: torch.tensor(values)[:, None].expand(-1, width) for path, width in sizes.items()}, True)


# The formula


@pytest.mark.parametrize("picture", [False, True])
def test_a_gate_equals_a_loop_over_tokens(picture: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    width, count = 6, 5
    table = torch.randn(8, width, generator=rng)
    output = torch.randn(2, count, width, generator=rng)
    parts = {name: torch.randn(2, count, width, generator=rng) for name in ("a", "b", "c")}
    wanted = torch.zeros_like(output)
    own, cross, shift, out, norm, norm_shift, base_norm, base_shift = table.tolist()
    for sample in range(2):
        for token in range(count):
            b = _normed(output[sample, token].tolist(), base_norm, base_shift)
            for channel in range(width):
                value = float(output[sample, token, channel])
                for part in parts.values():
                    o = _normed(part[sample, token].tolist(), norm, norm_shift)[channel]
                    x = o * own[channel] + b[channel] * o * cross[channel] + shift[channel]
                    value += out[channel] / (1 + math.exp(-x)) * float(part[sample, token, channel])
                wanted[sample, token, channel] = value

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).unflatten(2, (count, 1)) if picture else tensor

    got = Gate({"x": table}, True).fuse("x", shaped(output), {name: shaped(part) for name, part in parts.items()})
    torch.testing.assert_close(got, shaped(wanted), atol=1e-5, rtol=1e-4)


def _normed(values: list[float], scale: list[float], shift: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [(value - mean) / spread * s + t for value, s, t in zip(values, scale, shift, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_merge_and_shut_ones_plain(tiny: Tiny, family: str, tmp_path: Path) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 2)
    made = replace(  # without text encoders, which no gate shuts
        made,
        concepts=tuple(
            replace(c, attachment=replace(c.attachment, adapter=fakes.random_adapter(made.model, i, text=False)))
            for i, c in enumerate(made.concepts, 1)
        ),
    )
    sizes = widths(made.model.components, made.attachments)
    drawn: dict[str, Tensor] = {}
    for name, rows in (("open", {"shift": 1e4}), ("shut", {"out": 0.0}), ("half", {"shift": 0.0})):
        write_gate(tmp_path / f"{name}.safetensors", gate_with(sizes, **rows), made.model.denoiser, {})
        drawn[name] = fakes.latents(made, "autolora", gate=str(tmp_path / f"{name}.safetensors"))
    torch.testing.assert_close(drawn["open"], fakes.latents(made, "merge"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn["shut"], fakes.plain(made), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(drawn["half"], fakes.latents(made, "merge", scale=0.5), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn["open"], drawn["shut"], atol=1e-2)


def test_untrained_gates_are_as_stated_and_are_told(tiny: Tiny) -> None:
    gate = initial({"a": 5000, "b": 5000}, 3)
    for table in gate.layers.values():
        assert table[:3].mean().abs() < 0.05 and table[:3].std() == pytest.approx(1, abs=0.05)
        assert torch.equal(table[3:].T[0], torch.tensor([0.512, 1, 0, 1, 0]))
    assert not torch.equal(gate.layers["a"], gate.layers["b"])
    assert torch.equal(initial({"b": 5000}, 3).layers["b"], gate.layers["b"])
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    with prepared(made, methods()["autolora"], AutoLoraOptions()) as drawing:
        assert drawing.notices == ("The gates of AutoLoRA are not trained: their values are random.",)
    assert not torch.equal(fakes.latents(made, "autolora"), fakes.latents(made, "autolora", seed=1))


# Files


def test_a_gate_file_is_read_back_and_wrong_ones_are_refused_in_words(tiny: Tiny, tmp_path: Path) -> None:
    model, other = fakes.tiny_model(tiny, "sdxl"), fakes.tiny_model(tiny, "sd15")
    made = fakes.composition(model, 2)
    sizes = widths(model.components, made.attachments)
    path = tmp_path / "gate.safetensors"
    gate = initial(sizes, 1)
    write_gate(path, gate, model.denoiser, {"steps": 5})
    again = read_gate(path, model.denoiser, sizes)
    assert again.trained and all(torch.equal(again.layers[name], gate.layers[name]) for name in sizes)
    assert torch.equal(fakes.latents(made, "autolora", gate=str(path)), fakes.latents(made, "autolora", seed=1))
    with prepared(made, methods()["autolora"], AutoLoraOptions(gate=str(path))) as drawing:
        assert drawing.notices == ()

    with pytest.raises(AdapterError, match="trained on another model"):
        read_gate(path, other.denoiser, sizes)
    with pytest.raises(AdapterError, match=f"no gate for 1 of {len(sizes) + 1} layers .* unet.nowhere"):
        read_gate(path, model.denoiser, {**sizes, "unet.nowhere": 4})
    with pytest.raises(AdapterError, match="There is no file"):
        fakes.latents(made, "autolora", gate=str(tmp_path / "none.safetensors"))
    write_tensors(tmp_path / "plain.safetensors", {"x": torch.zeros(2)}, {})
    write_tensors(tmp_path / "odd.safetensors", {"x": torch.zeros(2)}, {KEY: "[1"})
    for name in ("plain", "odd"):
        with pytest.raises(AdapterError, match="holds no gates"):
            read_gate(tmp_path / f"{name}.safetensors", model.denoiser, sizes)
    broken = Gate({name: torch.full((8, width), torch.nan) for name, width in sizes.items()}, True)
    write_gate(path, broken, model.denoiser, {})
    with pytest.raises(AdapterError, match="NaN"):
        read_gate(path, model.denoiser, sizes)


def test_a_fingerprint_tells_models_apart_but_not_precisions(tiny: Tiny) -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        one.weight.copy_(one.weight.to(torch.bfloat16))
        one.bias.copy_(one.bias.to(torch.bfloat16))
    before = fingerprint(one)
    assert fingerprint(one.to(torch.bfloat16)) == before != fingerprint(other)


# Training


def lessons_of(model: Model, names: tuple[str, ...] = ("apple", "cat")) -> list[Lesson]:
    rng = torch.Generator().manual_seed(4)
    channels = model.denoiser.config["in_channels"]
    return [Lesson(torch.randn(1, channels, 8, 8, generator=rng), name, f"a {name}") for name in names for _ in (0, 1)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny: Tiny, family: str, tmp_path: Path) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 2)
    lessons, path = lessons_of(made.model), tmp_path / "gate.safetensors"
    options = GateOptions(steps=30, rate=0.05, margin=0, save_every=20)
    before = fakes.state(made.model)
    events = list(train_gate(made.model, made.attachments, lessons, options, path, CancelToken()))
    assert fakes.state(made.model) == before
    assert [event.step for event in events if isinstance(event, Artifact)] == [20, 30]
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, 31))
    sizes = widths(made.model.components, made.attachments)
    arms = {"initial": initial(sizes, 0), "trained": read_gate(path, made.model.denoiser, sizes), "merge": None}
    found = compared(made.model, made.attachments, lessons, arms, 3, 9, CancelToken())
    assert found["trained"] < found["initial"] and found["trained"] < found["merge"]
    assert fakes.state(made.model) == before


def test_the_same_seed_gives_the_same_file_and_another_does_not(tiny: Tiny, tmp_path: Path) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 3)
    lessons = lessons_of(made.model)
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        options = GateOptions(steps=3, seed=seed)
        list(train_gate(made.model, made.attachments, lessons, options, tmp_path / name, CancelToken()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != (tmp_path / "three").read_bytes()


def test_a_stop_keeps_the_last_file_and_restores_the_model(tiny: Tiny, tmp_path: Path) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    token, path, before = CancelToken(), tmp_path / "gate.safetensors", fakes.state(made.model)
    losses: list[float] = []
    with pytest.raises(Cancelled):
        for event in train_gate(
            made.model, made.attachments, lessons_of(made.model), GateOptions(steps=9, save_every=2), path, token
        ):
            losses += [event.value] if isinstance(event, Metric) else []
            if len(losses) == 3:
                token.cancel()
    assert fakes.state(made.model) == before
    assert len(losses) == 3 and [file.name for file in tmp_path.iterdir()] == [path.name]
    read_gate(path, made.model.denoiser, widths(made.model.components, made.attachments))


@pytest.mark.parametrize("variant", ["", "vpred"])
def test_the_loss_is_that_of_plain_adapters_and_formulas(tiny: Tiny, variant: str) -> None:
    """Without gates: noise or velocity against the prediction, by hand."""
    model = fakes.tiny_model(tiny, "sdxl", variant)
    made = fakes.composition(model, 2)
    (lesson, *_) = lessons_of(model)
    with attached(model.components, made.attachments) as hung, torch.no_grad():
        school = School(model, hung, [lesson])
        said = school.work("a apple", "apple")
        got = school.wrong(lesson, said, ["cat"], generator(3, 0), None)
        alphas = school.noising.alphas_cumprod
        rng = generator(3, 0)
        at = int(torch.randint(1000, (1,), generator=rng))
        noise = torch.randn(lesson.clean.shape, generator=rng)
        a, s = alphas[at].sqrt(), (1 - alphas[at]).sqrt()
        hung.activate(["apple", "cat"])
        answer = said.network(a * lesson.clean + s * noise, torch.tensor(at))
        target = a * noise - s * lesson.clean if variant else noise
        assert float(got) == pytest.approx(float((answer - target).square().mean()), rel=1e-5)
        assert float(got) != pytest.approx(float(school.wrong(lesson, said, [], generator(3, 0), None)), rel=1e-3)
        gate = gate_with(widths(model.components, made.attachments), shift=1e4)
        opened = school.wrong(lesson, said, ["cat"], generator(3, 0), gate)
        assert float(opened) == pytest.approx(float(got), rel=1e-4)
        alone = school.wrong(lesson, said, [], generator(3, 0), gate)
        assert float(alone) == pytest.approx(float(school.wrong(lesson, said, [], generator(3, 0), None)), rel=1e-4)


def test_what_cannot_be_trained_is_refused_in_words(tiny: Tiny, tmp_path: Path) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    lessons, path = lessons_of(made.model), tmp_path / "x"

    def training(model: Model, count: int, given: list[Lesson]) -> None:
        attachments = fakes.composition(model, count).attachments
        list(train_gate(model, attachments, given, GateOptions(steps=1), path, CancelToken()))

    with pytest.raises(InputError, match="two adapters or more"):
        training(made.model, 1, lessons)
    with pytest.raises(InputError, match="two adapters or more"):
        training(made.model, 2, [])
    with pytest.raises(InputError, match="a picture of cow"):
        training(made.model, 2, [*lessons, Lesson(lessons[0].clean, "cow", "")])
    with pytest.raises(InputError, match="differ in size"):
        training(made.model, 2, [*lessons, Lesson(torch.zeros(1, 4, 4, 8), "cat", "")])
    with pytest.raises(InputError, match="cannot be trained"):
        training(fakes.tiny_model(tiny, "sd3"), 2, lessons)
    assert not path.exists()


# Retrieval


def test_constructed_embeddings_rank_as_they_must() -> None:
    query = torch.tensor([[1.0, 0.0, 0.0]])
    rows = torch.tensor([[0.0, 1, 0], [3, 3, 0], [0.1, 0, 0], [-5, 0, 0], [0, 0, 0]])
    owners = [Candidate("far", ("x",)), Candidate("near", ("y", "z")), Candidate("against", ("v",)),
              Candidate("empty", ("w",))]  # fmt: skip
    found = ranked(query, rows, owners, 3)
    assert [one.name for one in found] == ["near", "far", "empty"]
    assert found[0].text == "z" and found[0].nearness == pytest.approx(1)
    assert nearness(query, rows).tolist() == pytest.approx([0, 0.5**0.5, 1, -1, 0])
    assert [one.name for one in ranked(query, rows, owners, 1)] == ["near"]
    two = torch.tensor([[0.0, 0, 1], [0, -2, 0]])
    assert nearness(two, rows).tolist() == pytest.approx([0, 0, 0, 0, 0])
    assert nearness(-two, rows).tolist() == pytest.approx([1, 0.5**0.5, 0, 0, 0])


def test_the_size_of_a_row_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(1)
    query, rows = torch.randn(2, 8, generator=rng), torch.randn(6, 8, generator=rng)
    owners = [Candidate(str(index), ("text",)) for index in range(6)]
    before = ranked(query, rows, owners, 6)
    for index, factor in ((0, 1000.0), (3, 1e-3), (5, 7.0)):
        rows[index] *= factor
    after = ranked(5 * query, rows, owners, 6)
    assert [one.name for one in after] == [one.name for one in before]
    assert [one.nearness for one in after] == pytest.approx([one.nearness for one in before], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_found_by_its_own_words(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    candidates = [Candidate("fruit", ("a red apple", "sks")), Candidate("pet", ("a blue dog",)), Candidate("mute", ())]
    before = fakes.state(model)
    for prompt, name in (("a red apple", "fruit"), ("sks", "fruit"), ("a blue dog", "pet")):
        found = retrieve(model, prompt, candidates, 2, CancelToken())
        assert found[0].name == name and found[0].text == prompt
        assert found[0].nearness == pytest.approx(1, abs=1e-5) and len(found) == 2
    both = retrieve(model, "sks and a blue dog, style", candidates, 2, CancelToken())
    assert {one.name for one in both} == {"fruit", "pet"} and both[1].nearness == pytest.approx(1, abs=1e-5)
    assert retrieve(model, "a", [Candidate("mute", ())], 3, CancelToken()) == ()
    assert fakes.state(model) == before
    rows = embedded(model, ["a red apple", "sks"], CancelToken())
    assert rows.shape[0] == 2 and rows.ndim == 2
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        retrieve(model, "a", candidates, 1, token)


def test_a_prompt_is_asked_as_a_whole_and_phrase_by_phrase() -> None:
    assert phrases("a cat and a dog, noto style") == ("a cat and a dog, noto style", "a cat", "a dog", "noto style")
    assert phrases("a sandy band") == ("a sandy band",)
