"""The resolved spec: the written rules for what needs neither model nor data."""

from typing import Any

import pytest

from service.contract.resolve import resolve_at_submit
from service.contract.spec import parse_spec

BUDGET: dict[str, Any] = {"budget": {"max_macs_fraction": 0.3}}


def resolve(spec: dict[str, Any]) -> dict[str, Any]:
    return resolve_at_submit(parse_spec(spec))


def steps(count: int) -> dict[str, Any]:
    return {**BUDGET, "method": {"type": "learning_compression", "mu": {"steps": count}}}


@pytest.mark.parametrize("count", [2, 5, 25, 100])
def test_every_number_of_steps_covers_the_same_range_of_mu(count: int) -> None:
    growth = resolve(steps(count))["method"]["mu"]["growth"]
    assert growth ** (count - 1) == pytest.approx(700)


def test_given_growth_stands() -> None:
    spec = {**BUDGET, "method": {"type": "learning_compression", "mu": {"growth": 1.1}}}
    assert resolve(spec)["method"]["mu"]["growth"] == 1.1


@pytest.mark.parametrize(("count", "per_step", "epochs"), [(1, 1, 5), (5, 2, 10), (25, 3, 30)])
def test_fine_tuning_takes_as_many_epochs_as_all_l_steps(count: int, per_step: int, epochs: int) -> None:
    spec = {**steps(count), "training": {"epochs_per_step": per_step}}
    assert resolve(spec)["fine_tune"]["epochs"] == epochs
    assert resolve({**spec, "fine_tune": {"epochs": 0}})["fine_tune"]["epochs"] == 0


@pytest.mark.parametrize(
    ("spec", "cost"),
    [
        (BUDGET, "macs"),
        ({"budget": {"max_params": 10}}, "params"),
        ({"method": {"type": "learning_compression", "lambda": 2.0}}, "params"),
        ({**BUDGET, "cost": "params"}, "params"),
        ({**BUDGET, "cost": {"macs": 1, "params": 2}}, {"macs": 1.0, "params": 2.0, "bytes": 0.0}),
    ],
)
def test_cost(spec: dict[str, Any], cost: object) -> None:
    assert resolve(spec)["cost"] == cost


def test_resolving_again_changes_nothing() -> None:
    resolved = resolve(BUDGET)
    assert resolve(resolved) == resolved


@pytest.mark.parametrize("term", [{}, {"rank": 3}, {"type": "low_rank", "then": {"type": "quantize", "values": 4}}])
def test_a_low_rank_term_without_a_reshape_takes_the_best_of_each_layer(term: dict[str, Any]) -> None:
    (resolved,) = resolve({**BUDGET, "layers": [{"terms": [term]}]})["layers"][0]["terms"]
    assert (resolved["type"], resolved["reshape"]) == ("low_rank", "best")
