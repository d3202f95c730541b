"""The C step of one layer: what holds for every weight, pressure and set of terms."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.reshape import named_reshape
from worker.engine.forms.term import Price

NAMES = {2: ("matrix", "chunked"), 4: ("channel", "spatial", "spatial_transposed")}


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, list[TermChoice], float]:
    if draw(st.booleans()):
        shape: tuple[int, ...] = (draw(st.sampled_from([4, 6, 9])), draw(st.sampled_from([4, 6, 8])))
        call = Call((1, shape[1]), (1, shape[0]))
    else:
        shape = (draw(st.integers(2, 6)), draw(st.integers(2, 5)), draw(st.integers(2, 3)), draw(st.integers(2, 3)))
        call = Call((1, shape[1], 9, 9), (1, shape[0], 9, 9))
    geometry = Geometry("linear" if len(shape) == 2 else "conv2d", shape, (call,))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator)
    names = list(draw(st.permutations(NAMES[len(shape)])))[: draw(st.integers(1, 3))]
    choices = []
    for name in names:
        reshape = named_reshape(name, shape)
        assert reshape is not None
        term = LowRankTerm(reshape, geometry)
        choices.append(TermChoice(term, Price(params=1e-6), 0, term.rank_max))
    largest = max(energies(weight, choice)[0] / choice.unit_price for choice in choices)
    return weight, choices, float(largest * 10.0 ** draw(st.floats(-3, 0.2)))


def energies(weight: Tensor, choice: TermChoice) -> np.ndarray:
    return scipy.linalg.svdvals(choice.term.reshape.to_matrix(weight.double()).numpy()) ** 2


def objective(weight: Tensor, choices: list[TermChoice], pressure: float, made: Projection) -> float:
    whole = sum((c.term.project(f) for c, f in zip(choices, made.factors, strict=True)), torch.zeros(weight.shape))
    cost = sum(c.unit_price * f.rank for c, f in zip(choices, made.factors, strict=True))
    return pressure * cost + float((weight.double() - whole).square().sum())


def single(weight: Tensor, choice: TermChoice, pressure: float) -> float:
    """Objective of the best single term, from the full SVD and the closed form."""
    found = energies(weight, choice)
    rank = int((found > pressure * choice.unit_price).sum())
    return pressure * choice.unit_price * rank + float(found[rank:].sum())


@settings(max_examples=120, deadline=None)
@given(layers())
def test_never_above_the_best_single_term(layer: tuple[Tensor, list[TermChoice], float]) -> None:
    weight, choices, pressure = layer
    made = project(weight, choices, pressure)
    best = min(single(weight, choice, pressure) for choice in choices)
    assert made.objective == pytest.approx(objective(weight, choices, pressure, made), rel=1e-9)
    assert made.objective <= best * (1 + 1e-9)
    assert made.objective <= float(weight.double().square().sum()) * (1 + 1e-9)  # Θ = 0 is a candidate


@settings(max_examples=120, deadline=None)
@given(layers())
def test_never_rises_in_a_sweep(layer: tuple[Tensor, list[TermChoice], float]) -> None:
    weight, choices, pressure = layer
    last, warm = float(weight.double().square().sum()), None
    for _ in range(5):
        made = project(weight, choices, pressure, warm=warm, sweeps=1)
        assert made.objective <= last * (1 + 1e-9)
        last, warm = made.objective, made.factors


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 4))
def test_warm_starts_keep_both_promises(layer: tuple[Tensor, list[TermChoice], float], rank: int) -> None:
    weight, choices, pressure = layer
    warm = project(weight + 0.1, [c.at_rank(min(rank, c.term.rank_max)) for c in choices], 0.0).factors
    made = project(weight, choices, pressure, warm=warm)
    start = objective(weight, choices, pressure, Projection(warm, 0.0, 0.0, 0))
    assert made.objective <= start * (1 + 1e-9)
    assert made.objective <= min(single(weight, choice, pressure) for choice in choices) * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 2), st.one_of(st.none(), st.integers(1, 10)))
def test_max_rank_zero_on_the_second_term_is_the_single_term_bit_for_bit(
    layer: tuple[Tensor, list[TermChoice], float], least: int, sweeps: int | None
) -> None:
    weight, choices, pressure = layer
    others = [replace(choice, rank_high=0) for choice in choices[1:]]
    both = project(weight, [choices[0], *others], pressure, rank_total_low=least, sweeps=sweeps)
    alone = project(weight, [choices[0]], pressure, rank_total_low=least, sweeps=sweeps)
    assert both.ranks[0] == alone.ranks[0]
    assert sum(both.ranks[1:]) == 0
    assert torch.equal(both.factors[0].left, alone.factors[0].left)
    assert torch.equal(both.factors[0].right, alone.factors[0].right)
    assert (both.objective, both.error) == (alone.objective, alone.error)


@settings(max_examples=120, deadline=None)
@given(layers())
def test_the_rank_of_one_term_is_the_threshold(layer: tuple[Tensor, list[TermChoice], float]) -> None:
    weight, choices, pressure = layer
    found = energies(weight, choices[0])
    threshold = pressure * choices[0].unit_price  # 2λα/μ
    if np.min(np.abs(found - threshold)) < 1e-9 * found[0]:
        return
    made = project(weight, choices[:1], pressure)
    assert made.ranks == (int((found > threshold).sum()),)
    costs = [threshold * r + found[r:].sum() for r in range(len(found) + 1)]  # every rank, by brute force
    assert made.ranks[0] == int(np.argmin(costs))
    assert made.objective == pytest.approx(min(costs), rel=1e-8)


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 2), st.integers(0, 3), st.integers(0, 5))
def test_bounds_and_least_totals_hold(
    layer: tuple[Tensor, list[TermChoice], float], low: int, room: int, least: int
) -> None:
    weight, choices, pressure = layer
    bounded = []
    for choice in choices:
        lowest = min(low, choice.term.rank_max)
        bounded.append(replace(choice, rank_low=lowest, rank_high=min(lowest + room, choice.term.rank_max)))
    made = project(weight, bounded, pressure, rank_total_low=least)
    assert all(c.rank_low <= rank <= c.rank_high for c, rank in zip(bounded, made.ranks, strict=True))
    assert sum(made.ranks) >= min(least, sum(choice.rank_high for choice in bounded))


def test_fixed_ranks_of_one_term_are_eckart_young() -> None:
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    reshape = named_reshape("matrix", (9, 6))
    assert reshape is not None
    choice = TermChoice(LowRankTerm(reshape, Geometry("linear", (9, 6), ())), Price(params=1 / 15), 0, 6).at_rank(3)
    made = project(weight, [choice], 12.0)
    assert made.ranks == (3,)
    assert made.error == pytest.approx(float(energies(weight, choice)[3:].sum()), rel=1e-9)
    assert made.objective == pytest.approx(3 * 12.0 + made.error)


def test_dense_is_one_more_candidate() -> None:
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    reshape = named_reshape("matrix", (9, 6))
    assert reshape is not None
    choice = TermChoice(LowRankTerm(reshape, Geometry("linear", (9, 6), ())), Price(params=1), 0, 6)
    low = project(weight, [choice], 1e-3, dense_cost=54.0)
    assert low.dense  # all six ranks cost 90, the dense layer 54
    assert low.ranks == (6,)
    assert not project(weight, [choice], 1e-3).dense
    assert not project(weight, [choice], 1.0, dense_cost=54.0).dense


def test_two_terms_fit_what_one_cannot() -> None:
    """A sum of rank-1 matrices under two reshapes is found again at those ranks."""
    generator = torch.Generator().manual_seed(5)
    shape = (6, 5, 3, 3)
    geometry = Geometry("conv2d", shape, (Call((1, 5, 9, 9), (1, 6, 9, 9)),))
    weight, choices = torch.zeros(shape, dtype=torch.float64), []
    for name in ("channel", "spatial"):
        reshape = named_reshape(name, shape)  # type: ignore[arg-type]
        assert reshape is not None
        p, q = reshape.matrix
        left = torch.randn(p, 1, generator=generator, dtype=torch.float64)
        weight += reshape.to_weight(left @ torch.randn(1, q, generator=generator, dtype=torch.float64), shape)
        choices.append(TermChoice(LowRankTerm(reshape, geometry), Price(params=1), 1, 1))
    made = project(weight, choices, 0.0, sweeps=60)
    assert made.error <= 1e-2 * float(weight.square().sum())
    for choice in choices:
        assert float(energies(weight, choice)[1:].sum()) > 3 * made.error
