"""The tools for adapter files against PEFT's own merges, dense arithmetic and exact limit cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.factors import Factors, distance, factors, norm, of_dense, reduced, stored, together
from intarsia.pipelines.kind import Layer
from intarsia.pipelines.kinds.loha import Hadamard
from intarsia.pipelines.tool import Inputs, Made, Source, tools
from intarsia.pipelines.tools.diff import compared, crosstalk
from intarsia.pipelines.tools.lego import centres
from torch import Tensor, nn

PEFT: Any = peft
LINEAR, CONV = (24, 16), (12, 8, 3, 3)
SHAPES = {"unet.linear": LINEAR, "unet.conv": CONV}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(shape: tuple[int, ...], seed: int, rank: int = 4, alpha: float = 2.0) -> LowRank:
    random = rng(seed)
    down = torch.randn(rank, *shape[1:], generator=random)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random)
    return LowRank(down, up, alpha)


def source(seed: int, weight: float = 1.0, rank: int = 4, alpha: float = 2.0, **more: Layer) -> Source:
    layers: dict[str, Layer] = {
        path: low_rank(shape, 10 * seed + number, rank, alpha) for number, (path, shape) in enumerate(SHAPES.items())
    }
    layers |= {f"unet.{name}": layer for name, layer in more.items()}
    name = f"a{seed}"
    return Source(name, AdapterFile(Path(f"{name}.safetensors"), "sd15", "concept", "", layers, name, {}), weight)


def use(name: str, *sources: Source, seed: int = 0, **options: object) -> Made:
    """Use a tool and give what it made."""
    tool = tools()[name]
    shapes = {**SHAPES, "unet.norm": (16,)}
    steps = tool.work(Inputs(sources, shapes, seed=seed), tool.options.parse({"dtype": "float32"} | options))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def written(made: Made, folder: Path) -> dict[str, Tensor]:
    """The dense change of each layer of a result, as read from its file."""
    assert made.save is not None
    made.save(folder / "made.safetensors")
    return dense(read_adapter(folder / "made.safetensors", SHAPES).layers)


def dense(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        change = layer.change(torch.zeros(SHAPES[path])).weight
        assert change is not None
        found[path] = change
    return found


def exact_sum(*sources: Source) -> dict[str, Tensor]:
    changes = [dense(given.adapter.layers) for given in sources]
    return {
        path: torch.stack([given.weight * change[path] for given, change in zip(sources, changes, strict=True)]).sum(0)
        for path in SHAPES
    }


def worst(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[path] - other[path]).norm() / other[path].norm().clamp(min=1e-12)) for path in other)


# The arithmetic


def test_factors_are_the_change_and_their_norm_is_its_norm() -> None:
    layer = low_rank(CONV, 1, alpha=-3.0)
    made, change = factors(layer, CONV), layer.change(torch.zeros(CONV)).weight
    assert change is not None
    torch.testing.assert_close(made.dense().float().reshape(CONV), change)
    assert norm(made) == pytest.approx(float(change.norm()), rel=1e-6)


def test_a_dense_kind_is_factored_whole() -> None:
    a, b, c, d = (torch.randn(shape, generator=rng(5)) for shape in ((24, 3), (3, 16), (24, 3), (3, 16)))
    layer = Hadamard(a, b, c, d, None, None, 3.0)
    change = layer.change(torch.zeros(LINEAR)).weight
    assert change is not None
    made = factors(layer, LINEAR)
    assert made.rank <= 9  # of a product of two matrices of rank 3
    assert float((made.dense() - change).norm() / change.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), CONV])
def test_reducing_is_as_good_as_the_svd_says(shape: tuple[int, ...]) -> None:
    whole = together([(0.7, factors(low_rank(shape, 1, 6), shape)), (1.3, factors(low_rank(shape, 2, 5), shape))])
    values = torch.linalg.svdvals(whole.dense())
    for rank in (1, 3, 7):
        assert distance(reduced(whole, rank), whole) == pytest.approx(float(values[rank:].norm()), rel=1e-9)
        assert distance(reduced(of_dense(whole.dense(), shape), rank), whole) == pytest.approx(
            float(values[rank:].norm()), rel=1e-6
        )
    assert distance(reduced(whole, 11), whole) < 1e-10 * norm(whole)
    kept = reduced(whole, energy=0.9).rank
    shares = values.square().cumsum(0) / values.square().sum()
    assert shares[kept - 1] >= 0.9 > (shares[kept - 2] if kept > 1 else 0)


def test_rounding_of_the_stored_type_is_part_of_the_error() -> None:
    whole = factors(low_rank(LINEAR, 1), LINEAR)
    layer, rounded = stored(whole, torch.float16)
    assert layer.down.dtype == torch.float16
    assert 1e-5 < distance(rounded, whole) / norm(whole) < 1e-2


# Merges, against PEFT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LINEAR[1], LINEAR[0])
        self.conv = nn.Conv2d(CONV[1], CONV[0], 3)


def by_peft(kind: str, sources: list[Source], **more: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The dense changes PEFT's own merge of the same adapters has."""
    net = Net()
    model: Any = None
    for given in sources:
        config = PEFT.LoraConfig(r=4, lora_alpha=2.0, target_modules=["linear", "conv"])
        if model is None:
            model = PEFT.get_peft_model(net, config, adapter_name=given.name)
        else:
            model.add_adapter(given.name, config)
        for path, layer in given.adapter.layers.items():
            assert isinstance(layer, LowRank)
            place = model.base_model.model.get_submodule(path.partition(".")[2])
            place.lora_A[given.name].weight.data.copy_(layer.down)
            place.lora_B[given.name].weight.data.copy_(layer.up)
    names, weights = [given.name for given in sources], [given.weight for given in sources]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **more)
    places = {path: model.base_model.model.get_submodule(path.partition(".")[2]) for path in SHAPES}
    return {path: place.get_delta_weight("merged").detach() for path, place in places.items()}


DENSITY = {"density": 0.4}
PEFT_TYPES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("cat", {}, "cat", {}),
    ("linear", {}, "linear", {}),
    ("svd", {"svd_rank": 5}, "svd", {"rank": 5}),
    ("ties", DENSITY, "ties", {"on": "factors"}),
    ("ties", {"majority_sign_method": "frequency"} | DENSITY, "ties", {"on": "factors", "signs": "frequency"}),
    ("ties_svd", {"svd_rank": 5} | DENSITY, "ties", {"rank": 5}),
    ("magnitude_prune", DENSITY, "magnitude-prune", {"on": "factors"}),
    ("magnitude_prune_svd", {"svd_rank": 5} | DENSITY, "magnitude-prune", {"rank": 5}),
    ("dare_linear", {"density": 1.0}, "dare", {"on": "factors", "density": 1.0}),
    ("dare_linear_svd", {"density": 1.0, "svd_rank": 5}, "dare", {"density": 1.0, "rank": 5}),
    ("dare_ties", {"density": 1.0}, "dare", {"on": "factors", "density": 1.0, "signs": "total"}),
    ("dare_ties_svd", {"density": 1.0, "svd_rank": 5}, "dare", {"density": 1.0, "rank": 5, "signs": "total"}),
]


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize(("kind", "theirs", "tool", "ours"), PEFT_TYPES, ids=lambda value: str(value)[:24])
def test_a_merge_is_pefts(kind: str, theirs: dict[str, Any], tool: str, ours: dict[str, Any], tmp_path: Path) -> None:
    sources = [source(1, 0.8), source(2, -0.5), source(3, 1.0)]
    density: dict[str, Any] = {"density": 0.4} if "density" in theirs and "density" not in ours else {}
    made = use(tool, *sources, **(density | ours))
    assert worst(written(made, tmp_path), by_peft(kind, sources, **theirs)) < 1e-5


def test_what_dare_drops_is_the_share_and_what_it_keeps_is_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is zero or its own over the density, as many as a share of all, and another seed drops others."""
    big = (400, 300)
    layer = LowRank(torch.eye(300), torch.randn(400, 300, generator=rng(1)), 300.0)
    given = Source("a", AdapterFile(Path("a"), "sd15", "concept", "", {"unet.linear": layer}, "a", {}))
    monkeypatch.setitem(SHAPES, "unet.linear", big)
    made = {seed: use("dare", given, given, seed=seed, density=0.3, rank=300) for seed in (0, 1)}
    errors = {seed: found.rows[0][1][1] for seed, found in made.items()}
    # Two independent thinnings of the same matrix: error^2 = 2 |W|^2 (1 - p) / p.
    expected = float(layer.up.norm()) * (2 * 0.7 / 0.3) ** 0.5
    assert errors[0] == pytest.approx(expected, rel=0.01) and errors[0] != errors[1]
    assert use("dare", given, given, density=0.3, rank=300).rows == made[0].rows


def test_rank_stabilised_adapters_merge_rightly_where_peft_is_wrong(tmp_path: Path) -> None:
    """Their scale is alpha over the root of the rank: `read_adapter` gives it as alpha, and `cat` keeps it."""
    texts = '{"unet.r": 4, "unet.lora_alpha": 2.0, "unet.use_rslora": true}'
    tensors = {
        f"unet.conv_in.lora_{part}.weight": torch.randn(shape, generator=rng(number))
        for number, (part, shape) in enumerate((("A", (4, 4, 3, 3)), ("B", (320, 4, 1, 1))))
    }
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "rs.safetensors", {"lora_adapter_metadata": texts})
    adapter = read_adapter(tmp_path / "rs.safetensors")
    layer = adapter.layers["unet.conv_in"]
    assert isinstance(layer, LowRank) and layer.scale == pytest.approx(1.0)  # 2 / sqrt(4)
    made = use("cat", Source("rs", adapter, 0.5), Source("rs", adapter, 0.5))
    assert made.save is not None
    made.save(tmp_path / "made.safetensors")
    again = read_adapter(tmp_path / "made.safetensors").layers["unet.conv_in"]
    zero = torch.zeros(320, 4, 3, 3)
    torch.testing.assert_close(again.change(zero).weight, layer.change(zero).weight)


def test_the_exact_merge_has_no_error_and_says_so(tmp_path: Path) -> None:
    sources = [source(1, 0.8, rank=3), source(2, -1.5, rank=5)]
    made = use("cat", *sources)
    assert worst(written(made, tmp_path), exact_sum(*sources)) < 1e-6
    assert all(row[2] < 1e-6 and row[3] == 8 for _, row in made.rows)


@pytest.mark.parametrize("name", [name for name, tool in tools().items() if tool.merge])
def test_the_error_told_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    sources = [source(1, 0.8), source(2, 1.2)]
    made = use(name, *sources)
    wanted, found = exact_sum(*sources), written(made, tmp_path)
    for path, (size, error, relative, _) in made.rows:
        assert size == pytest.approx(float(wanted[path].norm()), rel=1e-5)
        assert error == pytest.approx(float((found[path] - wanted[path]).norm()), rel=1e-3, abs=1e-5 * size)
        assert relative == pytest.approx(error / size)


def test_adapters_without_a_layer_leave_it_to_the_others(tmp_path: Path) -> None:
    one, other = source(1), source(2)
    layers = {"unet.linear": other.adapter.layers["unet.linear"]}
    half = Source("half", AdapterFile(Path("half"), "sd15", "concept", "", layers, "half", {}))
    found = written(use("cat", one, half), tmp_path)
    assert worst({"unet.conv": found["unet.conv"]}, {"unet.conv": dense(one.adapter.layers)["unet.conv"]}) < 1e-6


# LoRA-LEGO


def test_lego_with_room_for_every_piece_is_exact(tmp_path: Path) -> None:
    sources = [source(1, 0.8), source(2, -1.2)]
    assert worst(written(use("lego", *sources, rank=8), tmp_path), exact_sum(*sources)) < 1e-6


def test_lego_joins_like_pieces_however_they_are_spelled(tmp_path: Path) -> None:
    """The same adapter with its ranks in another order, with other signs and lengths: joined it is itself."""
    one = source(1, 0.5)
    order, gains = torch.tensor([2, 0, 3, 1]), torch.tensor([-2.0, 0.5, -0.1, 3.0])

    def other(layer: Layer) -> LowRank:
        assert isinstance(layer, LowRank)
        shape = (-1, *[1] * (layer.down.ndim - 1))
        up = layer.up[:, order] / gains.reshape(1, -1, *[1] * (layer.up.ndim - 2))
        return LowRank(layer.down[order] * gains.reshape(shape), up, layer.alpha)

    layers = {path: other(layer) for path, layer in one.adapter.layers.items()}
    again = Source("again", AdapterFile(Path("again"), "sd15", "concept", "", layers, "again", {}), 0.5)
    assert worst(written(use("lego", one, again), tmp_path), dense(one.adapter.layers)) < 1e-5


def test_centres_of_clear_groups_are_their_means() -> None:
    groups = torch.eye(3, 6, dtype=torch.float64) * 10
    signs = torch.where(torch.rand(30, 1, generator=rng(3)) < 0.5, -1.0, 1.0)
    points = groups.repeat(10, 1) * signs + 0.01 * torch.randn(30, 6, generator=rng(4), dtype=torch.float64)
    found = centres(points, 3, rng(0))
    assert torch.allclose(found.abs().sort(0).values, groups.abs().sort(0).values, atol=0.02)


# Resize, slice, diff


def test_resizing_keeps_what_the_singular_values_say(tmp_path: Path) -> None:
    one = source(1, rank=6)
    made = use("resize", one, rank=2)
    for path, (size, error, _, rank) in made.rows:
        values = torch.linalg.svdvals(dense(one.adapter.layers)[path].double().flatten(1))
        assert (rank, size) == (2, pytest.approx(float(values.norm()), rel=1e-5))
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-4)
    assert worst(written(use("resize", one, rank=0), tmp_path), dense(one.adapter.layers)) < 1e-6


def test_norms_are_left_out_and_told() -> None:
    from intarsia.pipelines.kinds.difference import Difference

    made = use("cat", source(1, norm=Difference(torch.ones(16), None)), source(2))
    assert "1 norms are left out" in made.told[1] and [path for path, _ in made.rows] == list(SHAPES)


def test_comparing_an_adapter_with_itself_its_opposite_and_a_stranger() -> None:
    one = factors(low_rank(LINEAR, 1), LINEAR)
    same = compared(one, one)
    assert same[2] < 1e-6 and same[3:] == pytest.approx((1, 1, 1, 1, 1), abs=1e-6)
    assert compared(one, together([(-1.0, one)]))[3] == pytest.approx(-1)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=rng(2), dtype=torch.float64))[0]
    up = torch.randn(24, 4, generator=rng(3), dtype=torch.float64)
    apart = [Factors(basis[:, cut].T.contiguous(), up, None, LINEAR) for cut in (slice(0, 4), slice(4, 8))]
    assert compared(*apart)[4:] == pytest.approx((0, 1, 0, 0), abs=1e-9)


def test_crosstalk_is_the_share_that_acts_on_the_others_inputs() -> None:
    change = factors(low_rank(LINEAR, 1), LINEAR)
    inputs = torch.linalg.qr(torch.randn(16, 5, generator=rng(4), dtype=torch.float64))[0]
    dense_share = (change.dense() @ inputs @ inputs.T).norm() / change.dense().norm()
    assert crosstalk(change, inputs) == pytest.approx(float(dense_share))
