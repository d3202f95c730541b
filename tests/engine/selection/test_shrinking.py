"""A falling budget: the units go that the loss misses least, whatever their energies say."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_steering import NETWORKS, network_of
from torch import Tensor

from worker.engine.csteps.additive import Projection
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection import shrinking
from worker.engine.selection.network import Network, composed
from worker.engine.selection.shrinking import FALLS_FROM, FALLS_TO, SLACK, LossOf, falling_limit, shrink
from worker.engine.selection.steering import pressure_for
from worker.engine.selection.units import fill

SPEC = {"budget": {"max_params_fraction": 0.5}}


def begin(name: str, share: float) -> tuple[Network, list[Tensor], list[Projection]]:
    network, weights = network_of(name, SPEC)
    _, made = pressure_for(network, weights, int(share * network.dense_size))
    return network, weights, fill(network, weights, made, int(share * network.dense_size))


def test_the_limit_is_wide_then_falls_and_ends_at_the_budget() -> None:
    made = [falling_limit(100, 1000, share) for share in (0.0, FALLS_FROM, 0.5, 0.7, FALLS_TO, 1.0)]
    assert made[0] == made[1] == 100 * SLACK
    assert all(after < before for before, after in pairwise(made[1:5]))
    assert made[4] == made[5] == 100
    assert falling_limit(900, 1000, 0.0) == 950, "never above the dense network"
    assert falling_limit(1000, 1000, 0.0) == 1000


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_size_meets_the_limit_and_units_only_go(name: str) -> None:
    network, weights, before = begin(name, 0.7)
    limit = int(0.5 * network.dense_size)
    after = shrink(network, weights, before, limit, measured(weights, range(len(weights))))
    assert network.size(after) <= limit < network.size(before)
    for one, other in zip(before, after, strict=True):
        assert other.dense <= one.dense
        if not one.dense:
            assert all(fewer <= units for units, fewer in zip(one.ranks, other.ranks, strict=True))


def test_units_that_the_loss_does_not_need_go_first() -> None:
    network, weights, before = begin("mlp", 0.7)
    kept, others = before[0], range(1, len(before))
    after = shrink(network, weights, before, int(0.55 * network.dense_size), measured(weights, [0]))
    assert after[0].ranks == kept.ranks
    assert any(after[index].ranks != before[index].ranks or before[index].dense for index in others)


def test_a_loss_that_falls_in_a_trial_does_not_cost_the_layer_all_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    network, weights, before = begin("mlp", 0.7)
    limit = int(0.45 * network.dense_size)
    others = measured(weights, range(1, len(weights)))

    def falling(index: int, change: Tensor | None) -> float:
        return -float(change.square().sum()) if index == 0 and change is not None else others(index, change)

    def units_left() -> int:
        after = shrink(network, weights, before, limit, falling)
        assert network.size(after) <= limit
        return after[0].ranks[0]

    made = units_left()
    alike = shrink(network, weights, before, limit, measured(weights, range(len(weights))))
    monkeypatch.setattr(shrinking, "FLOOR", 0.0)
    assert units_left() < made < alike[0].ranks[0], "worth less than the others, but not nothing"


def test_a_dense_layer_becomes_a_sum_where_the_loss_does_not_mind() -> None:
    network, weights, before = begin("mlp", 0.7)
    dense = [replace(before[0], dense=True), *before[1:]]
    limit = network.size(dense) - 1
    after = shrink(network, weights, dense, limit, measured(weights, range(1, len(weights))))
    assert not after[0].dense
    assert network.size(after) <= limit


def test_within_the_limit_units_stay_and_are_fitted_anew() -> None:
    network, weights, before = begin("mlp", 0.5)
    moved = [2 * weight for weight in weights]
    after = shrink(network, moved, before, network.size(before), fails)
    assert [made.ranks for made in after] == [made.ranks for made in before]
    for problem, one, other in zip(network.problems, before, after, strict=True):
        assert_doubled(problem, one, other)


def assert_doubled(problem: LayerProblem, one: Projection, other: Projection) -> None:
    if not one.dense:
        torch.testing.assert_close(
            composed(problem, other.factors), 2 * composed(problem, one.factors), rtol=1e-2, atol=1e-2
        )


def measured(weights: Sequence[Tensor], counted: Sequence[int]) -> LossOf:
    """A loss that is the square of the change, in some layers; in the others nothing changes it."""

    def loss_of(index: int, change: Tensor | None) -> float:
        assert change is None or change.shape == weights[index].shape
        return float(change.square().sum()) if change is not None and index in counted else 0.0

    return loss_of


def fails(index: int, _change: Tensor | None) -> float:
    raise AssertionError(f"nothing has to go, and layer {index} was tried")
