"""The quantized term: what it fits, counts and emits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from service.contract.plan import Form
from service.contract.terms import QuantizeTermSpec
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.quantized import Codes, QuantizeTerm
from worker.engine.forms.term import Accuracy, Ask, NotApplicableError, Price

SCHEMES: list[dict[str, Any]] = [
    {"values": 2},
    {"values": 3},
    {"bits": 2},
    {"values": 300},
    {"scheme": "binary"},
    {"scheme": "scaled_binary"},
    {"scheme": "ternary"},
    {"scheme": "fixed_point", "bits": 1},
    {"scheme": "fixed_point", "bits": 3},
    {"scheme": "fixed_point", "bits": 9},
    {"scheme": "power_of_two", "bits": 2},
    {"scheme": "power_of_two", "bits": 4},
]
SHAPES = [("linear", (7, 9)), ("conv_transpose2d", (5, 4, 3, 2)), ("matmul", (6, 4)), ("parameter", (11,))]


def make(geometry: Geometry, **spec: Any) -> QuantizeTerm:
    return QuantizeTerm.from_spec(QuantizeTermSpec(**spec), geometry)


def whole(term: QuantizeTerm, accuracy: Accuracy = Accuracy.EXACT) -> Ask:
    return Ask(0.0, term.size, term.size, accuracy=accuracy)


def stored_bits(module: nn.Module) -> int:
    return sum(8 * each.numel() * each.element_size() for each in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("unpack", ["load", "call"])
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("spec", SCHEMES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_module_counts_facts_and_tensors(
    spec: dict[str, Any], kind: str, shape: tuple[int, ...], per_channel: bool, unpack: str
) -> None:
    torch.manual_seed(0)
    term = make(Geometry(kind, shape, ()), per_channel=per_channel, unpack=unpack, **spec)
    weight = torch.randn(shape, dtype=torch.float64)
    theta = term.fit(weight, whole(term))
    dense = term.project(theta)
    assert dense.shape == weight.shape
    assert term.units_asked(None) == (theta.units, theta.units) == (term.units_max,) * 2
    slices = dense.movedim(term.axis, 0) if term.per_channel else dense[None]
    assert all(len(each.unique()) <= term.size for each in slices)
    module = torch.jit.script(term.emit_weight(theta.to(torch.float32))).eval()
    with torch.no_grad():
        assert torch.allclose(module(), dense.float(), atol=1e-6)
        assert torch.equal(module(), module())
    counts = term.counts(theta)
    assert stored_bits(module) == counts.bits
    assert counts.macs == 0
    assert term.least_counts(term.size) == counts
    assert (term.form, term.composed, term.graded) == (Form.QUANTIZED, True, False)
    again = QuantizeTerm.from_facts(term.facts(), term.geometry)
    assert (again.facts(), again.key) == (term.facts(), term.key)
    assert torch.equal(again.project(again.restore(theta.tensors(), theta.facts())), dense)
    untrained = again.emit_weight(again.restore({}, theta.facts()))
    shapes = {name: tensor.shape for name, tensor in untrained.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("spec", SCHEMES)
@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.full((4, 5), -2.5), torch.tensor([[1e-30, 1e30]])])
def test_degenerate_weights_give_numbers(spec: dict[str, Any], weight: Tensor) -> None:
    for per_channel in (False, True):
        term = make(Geometry("linear", tuple(weight.shape), ()), per_channel=per_channel, **spec)
        made = term.project(term.fit(weight.double(), whole(term)))
        assert bool(made.isfinite().all())
        assert float((made - weight).norm()) <= float(weight.norm()) or term.scheme == "binary"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SCHEMES), st.booleans(), st.integers(0, 100))
def test_idempotent_and_deterministic(spec: dict[str, Any], per_channel: bool, seed: int) -> None:
    weight = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    term = make(Geometry("linear", (6, 10), ()), per_channel=per_channel, **spec)
    theta = term.fit(weight, whole(term))
    dense = term.project(theta)
    assert torch.equal(dense, term.project(term.fit(weight, whole(term))))
    start = theta if term.scheme == "fixed_point" else None  # its scale is a local optimum: the one that it starts from
    assert torch.allclose(term.project(term.fit(dense, whole(term), start)), dense, atol=1e-9)
    warm = term.project(term.fit(weight, whole(term, Accuracy.WARM), theta))
    assert float((warm - weight).norm()) <= float((dense - weight).norm()) + 1e-12


def test_nothing_where_that_is_allowed_and_cheaper() -> None:
    term = make(Geometry("linear", (6, 10), ()), values=4)
    weight = torch.randn(6, 10, dtype=torch.float64)
    dear, cheap = (Ask(1.0, 0, 4, 1.0, Price(bytes=price)) for price in (100.0, 1e-9))
    empty = term.fit(weight, dear)
    assert empty.units == 0
    assert term.counts(empty).bits == 0
    assert float(term.project(empty).abs().sum()) == 0
    assert term.project(empty).shape == weight.shape
    assert term.fit(weight, cheap).units == 4
    assert term.restore(empty.tensors(), empty.facts()).units == 0


def test_one_codebook_for_several_layers() -> None:
    torch.manual_seed(3)
    shapes = [(6, 10), (3, 2, 2, 2), (2, 1)]
    terms = [make(Geometry("parameter", shape, ()), values=4, joint=True) for shape in shapes]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    thetas = QuantizeTerm.fit_joint(terms, weights, [whole(term) for term in terms], None)
    parts = [term.project(theta) for term, theta in zip(terms, thetas, strict=True)]
    together = torch.cat([part.reshape(-1) for part in parts])
    assert len(together.unique()) == 4
    assert [tuple(part.shape) for part in parts] == shapes
    one = make(Geometry("parameter", (together.numel(),), ()), values=4)
    alone = one.project(one.fit(torch.cat([w.reshape(-1) for w in weights]), whole(one)))
    assert torch.equal(alone, together)
    tensors = [tensor for theta in thetas for tensor in theta.tensors().values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    again = QuantizeTerm.fit_joint(terms, parts, [whole(term, Accuracy.WARM) for term in terms], thetas)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(again, thetas, strict=True))
    for term, theta, part in zip(terms, thetas, parts, strict=True):
        module = term.emit_weight(theta.to(torch.float32))
        assert torch.allclose(module(), part.float(), atol=1e-6)
        assert stored_bits(module) == term.counts(theta).bits


def test_a_weight_of_no_axis_takes_no_part() -> None:
    with pytest.raises(NotApplicableError):
        make(Geometry("parameter", (), ()), values=2)


def test_values_of_a_small_weight_are_no_more_than_its_elements() -> None:
    term = make(Geometry("linear", (2, 3), ()), values=256)
    assert term.size == 6
    assert isinstance(term.empty(torch.zeros(2, 3)), Codes)


@pytest.mark.parametrize("spec", SCHEMES)
def test_channels_of_zeros_and_of_far_apart_sizes(spec: dict[str, Any]) -> None:
    torch.manual_seed(4)
    weight = torch.randn(5, 12, dtype=torch.float64)
    weight[1], weight[2], weight[3] = 0.0, 1e-20 * weight[2], 1e20 * weight[3]
    term = make(Geometry("linear", (5, 12), ()), per_channel=True, **spec)
    made = term.project(term.fit(weight, whole(term)))
    assert bool(made.isfinite().all())
    if term.scheme != "binary":
        assert float(made[1].abs().sum()) == 0
        assert bool(((weight - made).norm(dim=1) <= 0.7 * weight.norm(dim=1)).all())
