"""Ranks of all layers at once: budgets are never exceeded, and what is left is used."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_jobs import ConvNet, Looped, Mlp, archive
from torch import Tensor

from service.contract.spec import parse_spec
from worker.engine.csteps.additive import Projection
from worker.engine.layer_rules import apply_rules
from worker.engine.network.costs import take_census
from worker.engine.network.load import load_model
from worker.engine.selection.curves import curves_of, estimate_pressure
from worker.engine.selection.network import Network, settle_dense
from worker.engine.selection.steering import least_projections, pressure_for, project_all
from worker.engine.selection.units import fill

NETWORKS = {"mlp": (Mlp, (20,)), "convnet": (ConvNet, (2, 8, 8)), "looped": (Looped, (20,))}


SUMS = [
    {"kind": "conv2d", "terms": [{"reshape": "channel"}, {"reshape": "spatial"}]},
    {"match": "*"},
]


def network_of(name: str, spec: dict[str, Any], falling: float = 0.8) -> tuple[Network, list[Tensor]]:
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    module = load_model(archive(make()))
    census = take_census(module, (torch.randn(1, *example),))
    decisions = apply_rules(census.layers, parse_spec({"layers": SUMS, **spec}))
    metric = decisions.problems[0].metric
    total = census.total_macs if metric == "macs" else census.total_params
    network = Network(tuple(decisions.problems), total - sum(problem.dense_size for problem in decisions.problems))
    assert network.dense_size == total
    weights = []
    for problem in decisions.problems:
        shape = problem.layer.weight_shape
        u, s, v = torch.linalg.svd(torch.randn(shape[0], int(torch.Size(shape[1:]).numel())), full_matrices=False)
        weights.append(((u * s[0] * falling ** torch.arange(len(s))) @ v).reshape(shape))
    return network, weights


def steer(network: Network, weights: list[Tensor], limit: int) -> list[Projection]:
    _, made = pressure_for(network, weights, limit)
    return settle_dense(network, fill(network, weights, made, limit))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(["max_macs_fraction", "max_params_fraction"]),
    st.floats(0.0, 1.0),
    st.floats(0.5, 1.0),
)
def test_the_budget_is_met_and_used(name: str, field: str, share: float, falling: float) -> None:
    network, weights = network_of(name, {"budget": {field: 0.5}}, falling)
    limit = int(network.least_size + share * (0.95 * network.dense_size - network.least_size))
    made = steer(network, weights, limit)
    size = network.size(made)
    assert size <= limit
    coarsest = max(problem.size([1] * len(problem.choices)) for problem in network.problems)
    assert (
        size >= limit - coarsest
        or all(
            rank == choice.rank_high or projection.dense
            for problem, projection in zip(network.problems, made, strict=True)
            for choice, rank in zip(problem.choices, projection.ranks, strict=True)
        )
        or size >= 0.9 * limit
    )
    for problem, projection in zip(network.problems, made, strict=True):
        assert projection.dense or problem.rank_total_low <= sum(projection.ranks)
        assert projection.dense or problem.size(projection.ranks) < problem.dense_size


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_least_size_is_reached_exactly(name: str) -> None:
    for field in ("max_macs_fraction", "max_params_fraction"):
        network, weights = network_of(name, {"budget": {field: 0.5}})
        assert network.size(steer(network, weights, network.least_size)) == network.least_size


def test_the_least_size_is_reached_where_cost_and_budget_count_different_things() -> None:
    """The dearest term in C may be the smallest in the budget's metric."""
    rules = [{"terms": [{"reshape": "channel"}, {"reshape": "spatial"}]}, {"match": "*"}]
    network, weights = network_of("convnet", {"budget": {"max_macs_fraction": 0.5}, "cost": "params", "layers": rules})
    least = least_projections(network, weights)
    assert network.size(least) == network.least_size
    assert network.size(steer(network, weights, network.least_size)) == network.least_size


def test_ranks_fall_as_the_pressure_rises() -> None:
    network, weights = network_of("mlp", {"budget": {"max_params_fraction": 0.5}})
    sizes = [network.size(project_all(network, weights, 10.0**power, None, None)) for power in range(-2, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == network.dense_size
    assert sizes[-1] == network.least_size


def test_the_estimate_from_spectra_meets_the_limit_with_single_terms() -> None:
    network, weights = network_of("mlp", {"budget": {"max_params_fraction": 0.5}})
    for share in (0.3, 0.5, 0.8):
        limit = int(share * network.dense_size)
        pressure = estimate_pressure(curves_of(network.problems, weights), network.rest, limit)
        made = project_all(network, weights, pressure, None, None)
        assert 0.8 * limit <= network.size(made) <= limit


def test_fill_takes_the_most_energy_per_cost_first() -> None:
    network, weights = network_of("mlp", {"budget": {"max_params_fraction": 0.5}})
    weights[0] *= 1e-3
    limit = int(0.5 * network.dense_size)
    made = fill(network, weights, least_projections(network, weights), limit)
    assert made[0].ranks[0] <= 2  # what fits nowhere else
    assert made[1].ranks[0] >= 10
    assert network.size(made) <= limit
    for weight, projection in zip(weights, made, strict=True):
        assert projection.error == pytest.approx(
            float(torch.linalg.svdvals(weight.double())[projection.ranks[0] :].square().sum()), rel=1e-6
        )


def test_a_literal_c_step_has_no_dense_candidate_and_no_least_rank() -> None:
    network, weights = network_of("mlp", {"method": {"lambda": 1.0}})
    assert all(made.dense for made in project_all(network, weights, 1e-6, None, None))
    low = project_all(network, weights, 1e-6, None, 3)
    assert [made.ranks[0] for made in low] == [min(p.layer.weight_shape) for p in network.problems]
    assert [made.ranks for made in project_all(network, weights, 1e9, None, 3)] == [(0,)] * 3
    assert [made.ranks for made in project_all(network, weights, 1e9, None, None)] == [(1,)] * 3


def test_settle_dense_leaves_no_layer_at_or_above_its_dense_size() -> None:
    network, weights = network_of("convnet", {"budget": {"max_params_fraction": 0.5}})
    fat = [replace(choice, rank_low=choice.rank_high) for choice in network.problems[0].choices]
    problem = replace(network.problems[0], choices=tuple(fat))
    made = [least_projections(Network((problem,), 0), weights[:1])[0]]
    assert problem.size(made[0].ranks) >= problem.dense_size
    settled = settle_dense(Network((problem,), 0), made)
    assert [each.dense for each in settled] == [True]
