"""Low-rank terms with quantized factors: what is stored, what is emitted, and that fitting them to each other pays."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.terms import LowRankTermSpec
from worker.engine.forms.best_reshape import BestReshapeTerm
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.quantized_factors import QuantizedFactorsTerm
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Ask, Price, Term

CONVOLUTION = Geometry("conv2d", (8, 6, 3, 3), (Call((1, 6, 9, 9), (1, 8, 9, 9)),), (1, 1), (1, 1))
LAYERS: dict[str, tuple[Geometry, Any]] = {
    "channel": (CONVOLUTION, "channel"),
    "spatial": (CONVOLUTION, "spatial"),
    "grouped": (Geometry("conv2d", (8, 3, 3, 3), (), groups=2), "channel"),
    "transposed": (Geometry("conv_transpose2d", (6, 8, 3, 2), (), (2, 1), output_padding=(1, 0)), "spatial"),
    "linear": (Geometry("linear", (16, 12), (Call((1, 12), (1, 16)),)), "matrix"),
    "kronecker": (Geometry("matmul", (16, 12), ()), "kronecker"),
    "embedding": (Geometry("embedding", (20, 8), ()), "matrix"),
    "composed": (Geometry("linear", (6, 4), ()), {"view": [2, 6, 2], "permute": [0, 2, 1], "matrix": [4, 6]}),
}
SCHEMES: list[dict[str, Any]] = [
    {"scheme": "codebook", "values": 8},
    {"scheme": "ternary", "unpack": "call"},
    {"scheme": "fixed_point", "bits": 4},
]


def operator(geometry: Geometry, weight: Tensor, x: Tensor) -> Tensor:
    if geometry.kind == "embedding":
        return functional.embedding(x, weight)
    if geometry.kind in {"linear", "matmul"}:
        return functional.linear(x, weight.T if geometry.kind == "matmul" else weight)
    if geometry.kind == "conv2d":
        return functional.conv2d(x, weight, None, geometry.stride, geometry.padding, 1, geometry.groups)
    return functional.conv_transpose2d(x, weight, None, geometry.stride, 0, geometry.output_padding)


def input_of(geometry: Geometry) -> Tensor:
    if geometry.kind == "embedding":
        return torch.randint(0, geometry.weight_shape[0], (2, 5))
    if geometry.kind in {"linear", "matmul"}:
        return torch.randn(3, geometry.weight_shape[1 if geometry.kind == "linear" else 0])
    return torch.randn(2, 6, 9, 9)


def made(geometry: Geometry, reshape: Any, scheme: dict[str, Any]) -> Term:
    spec = LowRankTermSpec.model_validate({"reshape": reshape, "then": {"type": "quantize", **scheme}})
    return term_class("low_rank").from_spec(spec, geometry)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["scheme"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_module_is_the_operator_with_the_weight_and_stores_what_is_counted(
    name: str, scheme: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    geometry, reshape = LAYERS[name]
    term, weight = made(geometry, reshape, scheme), torch.randn(geometry.weight_shape).double()
    theta = term.fit(weight, Ask(0.0, 2, 2))
    theta = term.restore(
        {key: each.float() if each.is_floating_point() else each for key, each in theta.tensors().items()},
        theta.facts(),
    )
    x = input_of(geometry)
    expected = operator(geometry, term.project(theta), x)
    module = torch.jit.script(term.emit_weight(theta) if term.composed else term.emit(theta, None))

    def call() -> Tensor:
        return operator(geometry, module(), x) if term.composed else module(x)

    assert torch.allclose(call(), expected, atol=1e-4)
    module.eval()
    with torch.no_grad():
        assert torch.allclose(call(), expected, atol=1e-4)
        assert torch.allclose(call(), expected, atol=1e-4)  # from the cache
    held = [*module.parameters(), *module.buffers()]
    assert sum(8 * each.numel() * each.element_size() for each in held) == term.counts(theta).bits
    values = sum(each.numel() for each in module.parameters())
    plain = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": reshape}), geometry)
    assert term.counts(theta).params == plain.counts_at(2).params + values
    assert term.counts(theta).macs == plain.counts_at(2).macs
    module.train()
    call().square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_factors_are_fitted_to_each_others_values() -> None:
    torch.manual_seed(0)
    term = made(CONVOLUTION, "channel", SCHEMES[0])
    assert isinstance(term, QuantizedFactorsTerm)
    weight = (torch.randn(8, 4) @ torch.randn(4, 54)).reshape(8, 6, 3, 3).double()  # all error is the quantization's
    plain = LowRankTerm(term.reshape, CONVOLUTION).fit(weight, Ask(0.0, 4, 4))
    apart = [
        quantizer.project(quantizer.fit(each, Ask(0.0, 8, 8)))
        for quantizer, each in zip(term._quantizers(4), (plain.left, plain.right), strict=True)
    ]
    theta = term.fit(weight, Ask(0.0, 4, 4))
    error = float((weight - term.project(theta)).square().sum())
    assert error < 0.9 * float((term.reshape.to_matrix(weight) - apart[0] @ apart[1]).square().sum())
    moved = weight + 0.05 * torch.randn_like(weight)
    before = float((moved - term.project(theta)).square().sum())
    again = term.fit(moved, Ask(0.0, 4, 4), theta)
    assert float((moved - term.project(again)).square().sum()) <= before  # the Θ before is one of the starts


def test_the_rank_is_chosen_at_the_price_of_the_codes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 12).double()
    geometry, reshape = LAYERS["linear"]
    term, price = made(geometry, reshape, SCHEMES[0]), Price(bytes=1.0)
    energies = term.energies(weight)
    for pressure in (0.0, 0.1, 0.5, 1.0, 3.0, 100.0):
        theta = term.fit(weight, Ask(pressure, 0, 12, price=price))
        totals = [pressure * price(term.counts_at(rank)) + float(energies[rank:].sum()) for rank in range(13)]
        assert totals[theta.units] <= min(totals) + 1e-9
    assert theta.units == 0
    assert float(term.project(theta).abs().sum()) == 0.0
    assert term.counts(theta).bits == 0


def test_it_is_made_again_from_json() -> None:
    torch.manual_seed(0)
    for reshape in ("channel", "best"):
        term = made(CONVOLUTION, reshape, SCHEMES[0])
        theta = term.fit(torch.randn(8, 6, 3, 3).double(), Ask(0.0, 2, 2))
        again = term_class("low_rank").from_facts(json.loads(json.dumps(term.facts())), CONVOLUTION)
        assert type(again) is type(term)
        assert again.key == term.key
        facts = json.loads(json.dumps(theta.facts()))
        assert torch.equal(again.project(again.restore(theta.tensors(), facts)), term.project(theta))
        untrained = again.restore({}, facts)
        assert {key: each.shape for key, each in untrained.tensors().items()} == {
            key: each.shape for key, each in theta.tensors().items()
        }
        again.restore(again.empty(torch.zeros(1)).tensors(), again.empty(torch.zeros(1)).facts())
    assert isinstance(term, BestReshapeTerm)
    assert isinstance(term.settled(theta), QuantizedFactorsTerm)
    module = torch.jit.script(term.emit(term.restore({}, facts), torch.zeros(8)))
    assert module(torch.randn(2, 6, 9, 9)).shape == (2, 8, 9, 9)
