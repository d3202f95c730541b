"""The reshape as a part of the C step: the least objective of all that apply, in a Θ that remembers which."""

import json
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from service.contract.terms import LowRankTermSpec, NamedReshape
from worker.engine.csteps.additive import TermChoice, project
from worker.engine.forms.best_reshape import BestReshapeTerm
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.low_rank_forms import LowRankForms
from worker.engine.forms.registry import term_class
from worker.engine.forms.reshape import Reshape
from worker.engine.forms.term import Ask, NotApplicableError, Price

CONVOLUTION = Geometry("conv2d", (6, 5, 3, 3), (Call((1, 5, 9, 8), (1, 6, 5, 4)),), (2, 2), (1, 1), (1, 1))
LINEAR = Geometry("linear", (12, 8), (Call((1, 8), (1, 12)),))
BEST = LowRankTermSpec(reshape="best")
NAMES = [name for name in get_args(NamedReshape) if name != "best"]
PRICE = Price(macs=1e-3, params=0.5)


def best(geometry: Geometry) -> BestReshapeTerm:
    made = term_class("low_rank").from_spec(BEST, geometry)
    assert isinstance(made, BestReshapeTerm)
    return made


def objective(term: LowRankTerm, weight: Tensor, ask: Ask) -> float:
    high = min(ask.high, term.units_max)
    made = term.fit(weight, Ask(ask.pressure, min(ask.low, high), high, price=ask.price))
    error = float((weight - term.project(made)).square().sum())
    return ask.pressure * ask.price(term.counts(made)) + error


def weight_near(geometry: Geometry, name: str, seed: int) -> Tensor:
    """A weight whose matrix under one named reshape has a low rank, and noise."""
    generator = torch.Generator().manual_seed(seed)
    made = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": name}), geometry)
    assert isinstance(made, LowRankTerm)
    (p, q), rank = made.reshape.matrix, 1 + seed % 2
    factors = Factors(torch.randn(p, rank, generator=generator), torch.randn(rank, q, generator=generator))
    noise = torch.randn(geometry.weight_shape, generator=generator)
    return (made.project(factors) + 0.01 * noise).double()


@pytest.mark.parametrize(
    ("geometry", "name"),
    [
        (CONVOLUTION, "channel"),
        (CONVOLUTION, "spatial"),
        (CONVOLUTION, "spatial_transposed"),
        (LINEAR, "matrix"),
        (LINEAR, "chunked"),
        (LINEAR, "kronecker"),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_reshape_that_the_weight_was_made_with_is_found(geometry: Geometry, name: str, fixed: bool) -> None:
    term = best(geometry)
    weight = weight_near(geometry, name, 1)
    ask = Ask(0.01, 2, 2, price=PRICE) if fixed else Ask(0.01, 0, term.units_max, price=PRICE)
    made = term.fit(weight, ask)
    assert term.form_of(made) == name
    assert made.units == 2
    assert term.settled(made).graded


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sampled_from(NAMES), st.floats(0.0, 3.0), st.booleans())
def test_the_objective_is_the_least_of_all_reshapes(seed: int, name: str, pressure: float, fixed: bool) -> None:
    for geometry in (CONVOLUTION, LINEAR):
        term = best(geometry)
        try:
            weight = weight_near(geometry, name, seed)
        except NotApplicableError:
            weight = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(seed)).double()
        price = Price(params=0.1)
        rank = 1 + seed % 2
        ask = Ask(pressure, rank, rank, price=price) if fixed else Ask(pressure, 0, 2, price=price)
        made = term.fit(weight, ask)
        assert not fixed or made.units == rank
        error = float((weight - term.project(made)).square().sum())
        reached = pressure * price(term.counts(made)) + error
        least = min(objective(each, weight, ask) for each in term.candidates)
        assert abs(reached - least) <= 1e-9 * (1 + least)
        again = term.fit(weight, ask, made)
        assert again.place == made.place


def test_a_term_and_its_theta_are_made_again_from_json() -> None:
    term = best(CONVOLUTION)
    weight = weight_near(CONVOLUTION, "spatial", 1)
    made = term.fit(weight, Ask(0.01, 0, 9, price=PRICE))
    again = term_class("low_rank").from_facts(json.loads(json.dumps(term.facts())), CONVOLUTION)
    assert again.key == term.key
    theta = again.restore(made.tensors(), json.loads(json.dumps(made.facts())))
    assert torch.equal(again.project(theta), term.project(made))
    untrained = again.restore({}, json.loads(json.dumps(made.facts())))
    assert {name: each.shape for name, each in untrained.tensors().items()} == {
        name: each.shape for name, each in made.tensors().items()
    }
    chosen = term.settled(made)  # alone it is a low-rank term like any other
    alone = LowRankForms.from_facts(json.loads(json.dumps(chosen.facts())), CONVOLUTION)
    assert isinstance(alone, LowRankTerm)
    assert torch.equal(alone.project(made), term.project(made))
    assert chosen.fit(weight, Ask(0.0, 3, 3)).place == made.place


def test_the_chosen_reshape_is_what_is_emitted() -> None:
    term = best(CONVOLUTION)
    x = torch.randn(2, 5, 9, 8)
    for name in ("channel", "spatial", "spatial_transposed"):
        made = term.fit(weight_near(CONVOLUTION, name, 1), Ask(0.01, 0, 9, price=PRICE)).to(torch.float32)
        module = torch.jit.script(term.emit(made, None))
        expected = functional.conv2d(x, term.project(made), None, (2, 2), (1, 1))
        assert torch.allclose(module(x), expected, atol=1e-4)
        assert sum(parameter.numel() for parameter in module.parameters()) == term.counts(made).params


def test_reshapes_that_are_the_same_or_composed_do_not_compete() -> None:
    one_by_one = LowRankForms.from_spec(BEST, Geometry("conv2d", (6, 5, 1, 1), ()))
    assert isinstance(one_by_one, LowRankTerm)  # channel, spatial and matrix are one
    parameter = LowRankForms.from_spec(BEST, Geometry("parameter", (8, 6), ()))
    assert parameter.composed
    assert isinstance(parameter, BestReshapeTerm)
    assert len(parameter.candidates) == 3
    assert not any(each.composed for each in best(CONVOLUTION).candidates)
    with pytest.raises(NotApplicableError):
        LowRankForms.from_spec(BEST, Geometry("parameter", (8,), ()))


def test_a_reshape_never_costs_more_than_the_dense_weight() -> None:
    term = best(LINEAR)
    price = Price(params=1.0)
    made = term.fit(torch.randn(12, 8).double(), Ask(1e-9, 0, term.units_max, price=price))
    assert term.counts(made).params < 96
    assert term.least_counts(1).params == min(each.counts_at(1).params for each in term.candidates)
    assert term.least_counts(0).params == 0


def test_it_takes_part_in_a_sum() -> None:
    other = LowRankTerm(Reshape((6, 5, 3, 3), (0, 1, 2, 3), (30, 9)), CONVOLUTION)
    weight = weight_near(CONVOLUTION, "spatial", 1) + weight_near(CONVOLUTION, "channel", 2)
    price = Price(params=1.0)
    choices = [TermChoice(each, price, 0, 4) for each in (best(CONVOLUTION), other)]
    made = project(weight, choices, 0.05)
    alone = project(weight, choices[:1], 0.05)
    assert made.objective <= alone.objective * (1 + 1e-9)
    more = project(weight, choices, 0.05, rank_total_low=6)
    assert sum(more.ranks) >= 6
