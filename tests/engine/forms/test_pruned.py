"""The pruned term: what it keeps, counts and emits, against the dense operators."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from service.contract.plan import Form
from service.contract.terms import PruneTermSpec
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.pruned import Kept, PruneTerm
from worker.engine.forms.term import Ask, NotApplicableError, Price

SPECS: list[dict[str, Any]] = [
    {"keep_fraction": 0.2},
    {"norm": "l1", "keep_fraction": 0.4},
    {"form": "penalty", "alpha": 0.4},
    {"norm": "l1", "form": "penalty", "alpha": 0.4},
    {},
]
GROUPS = ["weight", "filter", "channel"]


def make(geometry: Geometry, **spec: Any) -> PruneTerm:
    return PruneTerm.from_spec(PruneTermSpec(**spec), geometry)


def ask_of(term: PruneTerm, **more: Any) -> Ask:
    low, high = term.units_asked(None) or (0, term.units_max)
    return Ask(**{"pressure": 1.0, "low": low, "high": high, "mu": 1.0, "price": Price(bytes=0.05), **more})


def stored_bits(module: nn.Module) -> int:
    return sum(8 * each.numel() * each.element_size() for each in [*module.parameters(), *module.buffers()])


def objective(term: PruneTerm, theta: Kept, weight: Tensor, ask: Ask) -> float:
    error = float((weight - term.project(theta)).square().sum())
    return error + term.own_penalty(theta, ask) + ask.pressure * ask.price(term.counts(theta))


@pytest.mark.parametrize("kind", ["linear", "parameter", "matmul", "conv_transpose2d", "embedding"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("spec", SPECS)
def test_counts_facts_and_tensors(spec: dict[str, Any], group: str, kind: str) -> None:
    torch.manual_seed(0)
    shape = (8, 6, 3, 3) if kind.startswith("conv") else (12, 9)
    term = make(Geometry(kind, shape, ()), group=group, **spec)
    weight = torch.randn(shape, dtype=torch.float64)
    theta = term.fit(weight, ask_of(term))
    dense = term.project(theta)
    assert 0 < theta.units <= term.units_max
    assert term.form == Form.PRUNED
    counts = term.counts(theta)
    cast = theta.to(torch.float32)
    module = term.emit_weight(cast) if term.composed else term.emit(cast, None)
    assert stored_bits(module) == counts.bits <= term.counts_at(theta.units).bits
    assert sum(parameter.numel() for parameter in module.parameters()) == counts.params
    if term.composed:
        module = torch.jit.script(module).eval()
        with torch.no_grad():
            assert torch.allclose(module(), dense.float())
            assert torch.equal(module(), module())
    again = PruneTerm.from_facts(term.facts(), term.geometry)
    assert (again.facts(), again.key) == (term.facts(), term.key)
    restored = again.restore(theta.tensors(), theta.facts())
    assert torch.equal(again.project(restored), dense)
    assert restored.facts() == theta.facts()
    blank = again.restore({}, theta.facts())
    untrained = again.emit_weight(blank) if term.composed else again.emit(blank, None)
    shapes = {name: tensor.shape for name, tensor in untrained.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
    details = term.details(theta)
    assert details["kept"] == theta.units
    assert details["index_bits"] == counts.bits - 32 * counts.params


def test_kappa_weights_and_groups_are_the_largest() -> None:
    torch.manual_seed(1)
    weight = torch.randn(10, 20, dtype=torch.float64)
    term = make(Geometry("linear", (10, 20), ()), keep_fraction=0.05)
    kept = term.project(term.fit(weight, ask_of(term)))
    assert int((kept != 0).sum()) == 10
    assert float(kept[kept != 0].abs().min()) >= float(weight[kept == 0].abs().max())
    assert bool((kept[kept != 0] == weight[kept != 0]).all())
    rows = make(Geometry("linear", (10, 20), ()), keep_fraction=0.3, group="filter")
    norms = rows.project(rows.fit(weight, ask_of(rows))).norm(dim=1)
    assert sorted(norms.topk(3).indices.tolist()) == sorted(weight.norm(dim=1).topk(3).indices.tolist())
    assert int((norms > 0).sum()) == 3


def test_thresholds_of_penalties() -> None:
    weight = torch.tensor([[0.1, -0.5, 1.0, -2.0, 0.9]], dtype=torch.float64)
    geometry, free = Geometry("linear", (1, 5), ()), {"pressure": 0.0}
    hard = make(geometry, form="penalty", alpha=0.8)
    made = hard.project(hard.fit(weight, ask_of(hard, mu=2.0, **free)))  # √(2·0.8/2) = 0.894
    assert torch.equal(made, torch.tensor([[0.0, 0.0, 1.0, -2.0, 0.9]], dtype=torch.float64))
    soft = make(geometry, norm="l1", form="penalty", alpha=0.8)
    made = soft.project(soft.fit(weight, ask_of(soft, mu=2.0, **free)))  # 0.8/2 = 0.4
    assert torch.allclose(made, torch.tensor([[0.0, -0.1, 0.6, -1.6, 0.5]], dtype=torch.float64))
    assert soft.own_penalty(soft.fit(weight, ask_of(soft, mu=2.0, **free)), ask_of(soft, mu=2.0)) == pytest.approx(2.24)
    everything = hard.fit(weight, ask_of(hard, mu=float("inf"), **free))
    assert everything.units == 5


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("spec", SPECS)
def test_no_small_change_lowers_the_objective(spec: dict[str, Any], group: str) -> None:
    """Every unit that is kept is worth it and no other is, at the price of the term's own index where it is exact."""
    torch.manual_seed(2)
    weight = torch.randn(8, 6, dtype=torch.float64)
    term = make(Geometry("linear", (8, 6), ()), group=group, **spec)
    ask = ask_of(term, price=Price(params=0.2))
    theta = term.fit(weight, ask)
    best = objective(term, theta, weight, ask)
    kept = set(theta.positions.tolist())
    for place in range(term.units_max):
        other = sorted(kept ^ {place})
        if spec.get("norm") == "l1" or (spec.get("keep_fraction") and len(other) != len(kept)):
            continue
        changed = term._take(weight, torch.tensor(other, dtype=torch.int64))
        assert objective(term, changed, weight, ask) >= best - 1e-9
    if spec.get("norm") == "l1" and "alpha" in spec:
        for factor in (0.9, 0.99, 1.01, 1.1):
            moved = Kept(theta.values * factor, theta.positions, theta.count)
            assert objective(term, moved, weight, ask) >= best - 1e-9


def test_the_ball_stays_where_the_first_step_set_it() -> None:
    torch.manual_seed(3)
    weight = torch.randn(12, 10, dtype=torch.float64)
    term = make(Geometry("linear", (12, 10), ()), norm="l1", keep_fraction=0.3)
    first = term.fit(weight, ask_of(term), term.empty(weight))
    assert float(term.project(first).abs().sum()) == pytest.approx(0.3 * float(weight.abs().sum()))
    second = term.fit(2 * weight, ask_of(term), first)
    assert float(term.project(second).abs().sum()) == pytest.approx(0.3 * float(weight.abs().sum()))
    inside = term.fit(0.1 * weight, ask_of(term), first)
    assert torch.equal(term.project(inside), 0.1 * weight)
    few = term.fit(weight, ask_of(term, high=3), first)
    assert few.units <= 3
    assert float(term.project(few).abs().sum()) <= float(term.project(first).abs().sum()) + 1e-9


def test_kappa_of_nothing_and_nothing_but_zeros() -> None:
    for group in GROUPS:
        term = make(Geometry("linear", (4, 5), ()), group=group)
        weight = torch.randn(4, 5, dtype=torch.float64)
        empty = term.fit(weight, ask_of(term, low=0, high=0))
        assert (empty.units, term.counts(empty).bits, term.counts_at(0).bits) == (0, 0, 0)
        assert float(term.project(empty).abs().sum()) == 0
        assert term.project(empty).shape == (4, 5)
        assert term.fit(weight, ask_of(term, pressure=1e9)).units == 0
        assert term.restore(empty.tensors(), empty.facts()).units == 0
        for spec in SPECS:
            pruned = make(Geometry("linear", (4, 5), ()), group=group, **spec)
            assert bool(pruned.project(pruned.fit(torch.zeros(4, 5).double(), ask_of(pruned))).isfinite().all())


def test_a_higher_price_keeps_fewer_and_energies_fall() -> None:
    torch.manual_seed(4)
    weight = torch.randn(40, 50, dtype=torch.float64)
    term = make(Geometry("linear", (40, 50), ()))
    assert term.graded
    energies = term.energies(weight)
    assert torch.equal(energies, weight.square().reshape(-1).sort(descending=True).values)
    kept = [term.fit(weight, ask_of(term, price=Price(bytes=price))).units for price in (1e-4, 0.1, 0.3, 1.0, 3.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    by_params = term.fit(weight, ask_of(term, price=Price(params=2.0)))
    assert by_params.units == int((energies > 2.0).sum())
    best = objective(term, term.fit(weight, ask_of(term)), weight, ask_of(term))
    for number in range(0, 2001, 20):  # the usual size of an index stands for its own
        other = term.fit(weight, ask_of(term, low=number, high=number))
        assert objective(term, other, weight, ask_of(term)) >= 0.995 * best


OPERATORS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("linear", (6, 8), (1, 3, 8), {}),
    ("matmul", (8, 6), (1, 3, 8), {}),
    ("conv1d", (6, 4, 3), (1, 4, 11), {"stride": (2,), "padding": (1,), "dilation": (2,)}),
    ("conv2d", (6, 4, 3, 2), (1, 4, 9, 8), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ("conv2d", (6, 4, 3, 3), (1, 4, 9, 8), {"padding": "same"}),
    ("conv3d", (6, 4, 2, 3, 1), (1, 4, 5, 6, 4), {"stride": (1, 2, 1), "padding": (0, 1, 0), "dilation": (1, 1, 1)}),
    (
        "conv_transpose1d",
        (4, 6, 3),
        (1, 4, 7),
        {"stride": (2,), "padding": (1,), "dilation": (1,), "output_padding": (1,)},
    ),
    (
        "conv_transpose2d",
        (4, 6, 3, 2),
        (1, 4, 5, 6),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "output_padding": (1, 0)},
    ),
]


def apply(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    if kind == "linear":
        return functional.linear(x, weight, bias)
    if kind == "matmul":
        return x @ weight + (0 if bias is None else bias)
    operator: Any = getattr(functional, kind)
    return operator(x, weight, bias, **options)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("group", ["filter", "channel"])
@pytest.mark.parametrize(("kind", "shape", "x_shape", "options"), OPERATORS)
def test_smaller_operators(
    kind: str, shape: tuple[int, ...], x_shape: tuple[int, ...], options: dict[str, Any], group: str, with_bias: bool
) -> None:
    torch.manual_seed(5)
    weight, x, bias = torch.randn(shape), torch.randn(x_shape), torch.randn(6) if with_bias else None
    dense = apply(kind, x, weight, bias, options)
    geometry = Geometry(kind, shape, (Call(x_shape, tuple(dense.shape)),), **options)
    term = make(geometry, group=group, keep_fraction=0.5)
    assert not term.composed
    theta = term.fit(weight.double(), ask_of(term)).to(torch.float32)
    expected = apply(kind, x, term.project(theta), bias, options)
    module = torch.jit.script(term.emit(theta, bias))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = module(x)
    assert torch.allclose(y, expected, atol=1e-5)
    assert counter.get_total_flops() // 2 == term.counts(theta).macs == term.geometry.dense_macs // 2
    batch = torch.cat([x, 2 * x])
    assert torch.allclose(module(batch)[:1], expected, atol=1e-5)
    assert module(x[:0]).shape[0] == 0
    y.sum()
    module.train()
    module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    half = module.to(torch.bfloat16)
    assert torch.allclose(half(x.to(torch.bfloat16)).float(), expected, atol=0.3)


def test_columns_of_an_embedding_are_left_out_and_rows_composed() -> None:
    torch.manual_seed(6)
    weight, x = torch.randn(30, 8), torch.randint(0, 30, (4, 5))
    geometry = Geometry("embedding", (30, 8), (Call((5,), (5, 8)),))
    columns = make(geometry, group="filter", keep_fraction=0.5)
    theta = columns.fit(weight.double(), ask_of(columns)).to(torch.float32)
    module = torch.jit.script(columns.emit(theta, None))
    assert torch.equal(module(x), functional.embedding(x, columns.project(theta)))
    rows = make(geometry, group="channel", keep_fraction=0.5)
    kept = rows.fit(weight.double(), ask_of(rows)).to(torch.float32)
    assert rows.composed
    assert int((rows.project(kept).norm(dim=1) > 0).sum()) == 15
    assert torch.equal(rows.emit_weight(kept)(), rows.project(kept))


def test_grouped_convolutions_and_parameters_are_composed() -> None:
    assert make(Geometry("conv2d", (6, 2, 3, 3), (), groups=2), group="filter").composed
    assert make(Geometry("parameter", (6, 2), ()), group="channel").composed
    with pytest.raises(NotApplicableError):
        make(Geometry("parameter", (6,), ()), group="channel")


def test_one_kappa_and_one_ball_for_several_layers() -> None:
    torch.manual_seed(7)
    shapes = [(6, 10), (4, 5), (3, 3, 2)]
    weights = [
        scale * torch.randn(shape, dtype=torch.float64) for scale, shape in zip((1, 0.1, 3), shapes, strict=True)
    ]
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    for spec in ({"keep_fraction": 0.25}, {"norm": "l1", "keep_fraction": 0.25}):
        terms = [make(Geometry("parameter", shape, ()), joint=True, **spec) for shape in shapes]
        one = make(Geometry("parameter", (flat.numel(),), ()), **spec)
        assert not terms[0].graded
        asks = [ask_of(term) for term in terms]
        thetas = PruneTerm.fit_joint(
            terms, weights, asks, [term.fit(w, a) for term, w, a in zip(terms, weights, asks, strict=True)]
        )
        parts = torch.cat([term.project(theta).reshape(-1) for term, theta in zip(terms, thetas, strict=True)])
        assert torch.allclose(parts, one.project(one.fit(flat, ask_of(one))))
        again = PruneTerm.fit_joint(terms, [1.5 * w for w in weights], asks, thetas)
        if spec.get("norm"):
            total = sum(float(term.project(theta).abs().sum()) for term, theta in zip(terms, again, strict=True))
            assert total == pytest.approx(0.25 * float(flat.abs().sum()))
    penalised = [make(Geometry("parameter", shape, ()), joint=True, form="penalty", alpha=0.5) for shape in shapes]
    made = PruneTerm.fit_joint(penalised, weights, [ask_of(term, pressure=0.0) for term in penalised], None)
    assert [theta.units for theta in made] == [int((w.square() > 1.0).sum()) for w in weights]
