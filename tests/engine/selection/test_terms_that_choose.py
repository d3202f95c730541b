"""Budgets over terms that choose their sizes themselves, and terms that layers share."""

from typing import Any

import pytest
import torch
from test_steering import network_of, steer
from torch import Tensor

from worker.engine.csteps.additive import Projection
from worker.engine.selection.network import Network, composed
from worker.engine.selection.shrinking import shrink
from worker.engine.selection.steering import least_projections, pressure_for
from worker.engine.selection.units import fill

RULES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "tucker2": ("convnet", [{"match": "conv2", "terms": [{"type": "tucker2"}]}, {"match": "*", "keep": "dense"}]),
    "tucker2 beside others": ("convnet", [{"match": "conv*", "terms": [{"type": "tucker2"}]}, {"match": "*"}]),
    "a share beside a matrix": (
        "mlp",
        [{"terms": [{"reshape": "matrix"}, {"type": "prune", "norm": "l1", "keep_fraction": 0.05}]}],
    ),
    "one number of weights": (
        "mlp",
        [
            {"match": "fc1", "terms": "auto"},
            {"match": "*", "terms": [{"type": "prune", "keep_fraction": 0.1, "joint": True}]},
        ],
    ),
}


def made_for(name: str, share: float) -> tuple[Network, list[Tensor], int, list[Projection]]:
    model, rules = RULES[name]
    network, weights = network_of(model, {"budget": {"max_params_fraction": 0.5}, "layers": rules})
    limit = int(share * network.dense_size)
    _, made = pressure_for(network, weights, limit)
    return network, weights, limit, fill(network, weights, made, limit)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_budget_is_met(name: str) -> None:
    network, _, limit, made = made_for(name, 0.7)
    assert network.size(made) <= limit


def test_ranks_of_tucker_use_the_budget_from_the_first_search() -> None:
    network, weights = network_of(
        RULES["tucker2"][0], {"budget": {"max_params_fraction": 0.5}, "layers": RULES["tucker2"][1]}
    )
    for share in (0.3, 0.6):
        limit = int(network.least_size + share * (network.dense_size - network.least_size))
        assert network.size(steer(network, weights, limit)) >= 0.9 * limit


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_term_follows_its_weight_while_the_budget_falls(name: str) -> None:
    network, weights, limit, before = made_for(name, 0.7)
    moved = [weight + 0.05 * weight.std() * torch.randn_like(weight) for weight in weights]
    after = shrink(network, moved, before, limit, lambda *_: 0.0, pressure=1e-9)
    for problem, one, other in zip(network.problems, before, after, strict=True):
        if not one.dense:
            assert not torch.equal(composed(problem, one.factors), composed(problem, other.factors))
    if "tucker2" not in name:
        assert network.size(after) <= limit


def test_a_given_share_is_kept_where_nothing_else_is_left() -> None:
    network, weights = network_of(
        *[
            RULES["a share beside a matrix"][0],
            {"budget": {"max_params_fraction": 0.5}, "layers": RULES["a share beside a matrix"][1]},
        ]
    )
    for made, problem in zip(least_projections(network, weights), network.problems, strict=True):
        assert made.dense or made.ranks[1] > 1, problem.layer.name
        assert made.dense or made.ranks[0] <= 1
