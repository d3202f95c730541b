"""The Tucker-2 term: its choice of both ranks, its counts, its module."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from service.contract.plan import Form
from service.contract.terms import Tucker2TermSpec
from worker.engine.csteps.additive import TermChoice, project
from worker.engine.csteps.tucker import errors_of_all_ranks, hosvd
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Ask, NotApplicableError, Price
from worker.engine.forms.tucker2 import Tucker2Term

LAYERS = {
    "conv1d": ((6, 4, 3), {"stride": (2,), "padding": (1,)}),
    "conv2d": ((6, 5, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "conv2d_same": ((6, 5, 2, 3), {"padding": "same"}),
    "conv3d": ((4, 3, 2, 3, 2), {"padding": (0, 1, 0)}),
    "conv_transpose1d": ((4, 6, 3), {"stride": (2,), "output_padding": (1,)}),
    "conv_transpose2d": ((5, 6, 3, 2), {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
    "conv_transpose3d": ((3, 4, 2, 3, 2), {"stride": (1, 2, 1)}),
}


def made(name: str) -> tuple[Geometry, Tensor, Tensor, Tensor, Tensor]:
    """Geometry, weight, bias, input and output of a layer."""
    torch.manual_seed(0)
    kind, (shape, options) = name.removesuffix("_same"), LAYERS[name]
    axes, back = len(shape) - 2, "transpose" in kind
    weight, bias = torch.randn(shape), torch.randn(shape[1] if back else shape[0])
    x = torch.randn(1, shape[0] if back else shape[1], *(8, 7, 5)[:axes])
    y = getattr(functional, kind)(x, weight, bias, **options)
    fill = {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes, "output_padding": (0,) * axes}
    geometry = Geometry(kind, shape, (Call(tuple(x.shape), tuple(y.shape)),), **(fill | options))  # type: ignore[arg-type]
    return geometry, weight, bias, x, y


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_ranks_it_is_the_layer_and_costs_what_pytorch_counts(name: str) -> None:
    geometry, weight, bias, x, y = made(name)
    n, c = weight.shape[:2] if "transpose" not in name else (weight.shape[1], weight.shape[0])
    term = term_class("tucker2").from_spec(Tucker2TermSpec(ranks=(n, c)), geometry)
    assert isinstance(term, Tucker2Term)
    assert term.units_asked(None) == (n, n)
    theta = term.fit(weight.double(), Ask(0.0, n, n))
    assert torch.allclose(term.project(theta).float(), weight, atol=1e-5)
    theta = term.restore({key: value.float() for key, value in theta.tensors().items()}, theta.facts())
    module = torch.jit.script(term.emit(theta, bias))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(x)
    assert torch.allclose(out, y, atol=1e-4)
    assert torch.allclose(module(x[0]), y[0], atol=1e-4)
    assert counter.get_total_flops() // 2 == term.counts(theta).macs
    assert sum(each.numel() for each in module.parameters()) - n == term.counts(theta).params
    assert (term.form_of(theta), term.composed, term.details(theta)) == (
        Form.TUCKER2,
        False,
        {"rank_out": n, "rank_in": c},
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 99), st.floats(0.0, 2.0), st.integers(0, 2), st.integers(2, 6))
def test_the_pair_of_ranks_is_the_best_of_all(name: str, seed: int, pressure: float, low: int, high: int) -> None:
    geometry, weight, *_ = made(name)
    weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    term = Tucker2Term(geometry)
    price, high = Price(macs=0.01, params=0.3), min(high, term.units_max)
    n, c = term.channels
    ordered = weight.transpose(0, 1) if term.transposed else weight
    errors = errors_of_all_ranks(hosvd(ordered.reshape(n, c, -1)))
    dense = price(type(term.least_counts(0))(weight.numel(), geometry.dense_macs, 32 * weight.numel()))
    pairs = [(out, into) for out in range(max(low, 1), high + 1) for into in range(1, c + 1)]
    cheaper = [pair for pair in pairs if price(term.counts_at_ranks(pair)) < dense]
    objectives = {
        pair: pressure * price(term.counts_at_ranks(pair)) + float(errors[pair])
        for pair in (cheaper if cheaper or low == 0 else pairs)
    }
    if low == 0:
        objectives[0, 0] = float(errors[0, 0])
    theta = term.fit(weight, Ask(pressure, low, high, price=price))
    error = float((weight - term.project(theta)).square().sum())
    reached = pressure * price(term.counts(theta)) + error
    assert objectives[theta.ranks] <= min(objectives.values()) + 1e-9
    assert reached <= min(objectives.values()) + 1e-9  # HOOI only gains
    again = term.fit(weight, Ask(pressure, low, high, price=price), theta)
    error = float((weight - term.project(again)).square().sum())
    assert pressure * price(term.counts(again)) + error <= reached + 1e-9


def test_a_start_from_the_step_before_is_never_worse() -> None:
    geometry, weight, *_ = made("conv2d")
    term, price = Tucker2Term(geometry), Price(params=0.05)
    ask = Ask(0.3, 0, term.units_max, price=price)
    theta = None
    for seed in range(5):
        moved = weight.double() + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        after = term.fit(moved, ask, theta)
        objectives = [
            ask.pressure * price(term.counts(each)) + float((moved - term.project(each)).square().sum())
            for each in ([after] if theta is None else [after, theta])
        ]
        assert objectives[0] <= objectives[-1] + 1e-9
        theta = after


def test_it_is_made_again_from_json() -> None:
    geometry, weight, *_ = made("conv2d")
    for spec in (Tucker2TermSpec(), Tucker2TermSpec(ranks=(3, 99))):
        term = Tucker2Term.from_spec(spec, geometry)
        theta = term.fit(weight.double(), Ask(1e-9, 1, 6))
        again = term_class("tucker2").from_facts(json.loads(json.dumps(term.facts())), geometry)
        facts = json.loads(json.dumps(theta.facts()))
        assert torch.equal(again.project(again.restore(theta.tensors(), facts)), term.project(theta))
        empty = again.restore({}, facts)
        assert {key: value.shape for key, value in empty.tensors().items()} == {
            key: value.shape for key, value in theta.tensors().items()
        }
        assert again.empty(weight).units == 0
        assert float(again.project(again.empty(weight)).abs().sum()) == 0.0
        assert again.least_counts(1) == (term.counts(theta) if spec.ranks else Tucker2Term(geometry).least_counts(1))
    assert theta.ranks == (3, 5)


def test_layers_that_have_no_such_form_are_refused() -> None:
    for geometry in (
        Geometry("linear", (6, 5), ()),
        Geometry("conv2d", (6, 5, 1, 1), ()),
        Geometry("conv2d", (6, 3, 3, 3), (), groups=2),
    ):
        with pytest.raises(NotApplicableError):
            Tucker2Term.from_spec(Tucker2TermSpec(), geometry)


def test_it_takes_part_in_a_sum() -> None:
    geometry, weight, *_ = made("conv2d")
    low_rank = term_class("low_rank").from_facts(
        {"view": [6, 5, 3, 2], "permute": [0, 2, 1, 3], "matrix": [18, 10], "groups": 1, "store_dtype": None}, geometry
    )
    price = Price(params=0.02)
    choices = [TermChoice(Tucker2Term(geometry), price, 0, 6), TermChoice(low_rank, price, 0, 8)]
    both = project(weight, choices, 0.5)
    for alone in choices:
        assert both.objective <= project(weight, [alone], 0.5).objective + 1e-9
