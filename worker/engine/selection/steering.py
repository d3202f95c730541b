"""Choosing ranks for all layers at once: by a pressure 2λ/μ, or so that a budget is met (methods L.2, L.7)."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

from torch import Tensor

from worker.engine.csteps.additive import Projection, project
from worker.engine.csteps.joint import project_jointly
from worker.engine.forms.term import Accuracy
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection.curves import curves_of, estimate_pressure
from worker.engine.selection.network import AfterLayer, Network, Thetas, every_layer
from worker.engine.selection.units import POLISH_SWEEPS

NEARLY = 0.97  # of the limit: what is left is filled rank by rank
STRIDE = 2.0  # between pressures while the limit is not bracketed
TRIES_MAX = 12
LOWERINGS_MAX = 4  # once W has emptied its tails, lower pressures find nothing more
CLOSE = 1.01  # ratio of pressures: nothing between them is worth another try
PROHIBITIVE = 1e30


def project_all(
    network: Network,
    weights: Sequence[Tensor],
    pressure: float,
    warm: Sequence[Thetas] | None,
    sweeps: int | None,
    after_layer: AfterLayer | None = None,
    *,
    mu: float = inf,
    accuracy: Accuracy = Accuracy.EXACT,
) -> list[Projection]:
    """Make the C step of every layer: on the CPU side by side, on a GPU together.

    Parameters
    ----------
    network : Network
        The problems.
    weights : sequence of Tensor
        W (or W − β/μ) of each problem.
    pressure : float
        2λ/μ.
    warm : sequence, optional
        Θ of the step before.
    sweeps : int, optional
        Fixed number of sweeps: the literal C step of the slides. Dense is no candidate in it, a rank may pass
        break-even and a layer may fall to rank 0; what the final network needs is seen to when the loop is over.
    after_layer : callable, optional
        Told in the calling thread how many layers are projected.
    mu : float
        μ, for penalties that are a term's own.
    accuracy : Accuracy
        Of the closed forms.
    """

    def one(index: int) -> Projection:
        start = None if warm is None else warm[index]
        return _project_one(network.problems[index], weights[index], pressure, mu, start, sweeps, accuracy)

    made = every_layer(one, weights, after_layer)
    return project_jointly(network.problems, weights, made, pressure, mu)


def _project_one(
    problem: LayerProblem,
    weight: Tensor,
    pressure: float,
    mu: float,
    warm: Thetas | None,
    sweeps: int | None,
    accuracy: Accuracy,
) -> Projection:
    literal = sweeps is not None
    return project(
        weight,
        [choice.past_break_even() for choice in problem.choices] if literal else problem.choices,
        pressure,
        mu=mu,
        warm=warm,
        sweeps=sweeps,
        rank_total_low=0 if literal else problem.rank_total_low,
        dense_cost=None if literal or problem.given else problem.dense_price,
        accuracy=accuracy,
    )


def pressure_for(
    network: Network,
    weights: Sequence[Tensor],
    limit: int,
    *,
    start: float | None = None,
    warm: Sequence[Thetas] | None = None,
    after_layer: AfterLayer | None = None,
    mu: float = inf,
    accuracy: Accuracy = Accuracy.EXACT,
) -> tuple[float, list[Projection]]:
    """Find a pressure whose ranks meet the limit and use nearly all of it.

    The curve pressure ↦ size needs no training: ranks are thresholds on σ²/α. Returned is the feasible side, so the
    size never exceeds the limit; what it leaves is for `fill`.

    Parameters
    ----------
    network : Network
        The problems.
    weights : sequence of Tensor
        W (or W − β/μ) of each problem.
    limit : int
        Size that must not be exceeded; at least the network's least size.
    start : float, optional
        A pressure to start from; without it, that of the single best terms.
    warm : sequence, optional
        Θ of the step before.
    after_layer : callable, optional
        Told of every layer that is projected, at every pressure that is tried.
    mu : float
        μ, for penalties that are a term's own.
    accuracy : Accuracy
        Of the closed forms.
    """
    rough = False
    if start is None:
        curves = curves_of(network.problems, weights)
        start, rough = estimate_pressure(curves, network.rest, limit), not all(curve.known for curve in curves)
    pressure, factor = start, STRIDE
    feasible: tuple[float, list[Projection]] | None = None
    infeasible: float | None = None
    for tries in range(TRIES_MAX):
        made = project_all(network, weights, pressure, warm, None, after_layer, mu=mu, accuracy=accuracy)
        size = network.size(made)
        if size <= limit:
            if feasible is None or size >= network.size(feasible[1]):
                feasible = (pressure, made)
            done = _saturated(network, made) or (tries >= LOWERINGS_MAX and not rough)
            if size >= NEARLY * limit or (infeasible is None and done):
                break
        else:
            infeasible = pressure
        if feasible is None:
            pressure, factor = pressure * factor, factor * STRIDE
        elif infeasible is None:
            pressure, factor = pressure / factor, factor * (STRIDE if rough else 1)
        elif feasible[0] <= CLOSE * infeasible:
            break
        else:
            pressure = sqrt(feasible[0] * infeasible)
    if feasible is None:  # only the least ranks are left
        feasible = (start, least_projections(network, weights, mu))
    return feasible


def _saturated(network: Network, projections: Sequence[Projection]) -> bool:
    """Whether no lower pressure makes the network larger: every term has all of its units, or they are given."""
    return all(
        made.dense
        or all(
            choice.given or rank >= choice.rank_high for choice, rank in zip(problem.choices, made.ranks, strict=True)
        )
        for problem, made in zip(network.problems, projections, strict=True)
    )


def least_projections(network: Network, weights: Sequence[Tensor], mu: float = inf) -> list[Projection]:
    """Fit every layer at its least size in the metric, whatever the cost C says; what the spec gives stays as it is."""
    made = []
    for problem, weight in zip(network.problems, weights, strict=True):
        choices = [
            choice if choice.given else choice.at_rank(rank)
            for choice, rank in zip(problem.choices, problem.least_ranks, strict=True)
        ]
        low = problem.rank_total_low
        made.append(project(weight, choices, PROHIBITIVE, mu=mu, sweeps=POLISH_SWEEPS, rank_total_low=low))
    joined = project_jointly(network.problems, weights, made, PROHIBITIVE, mu)
    return [
        replace(least, dense=problem.size_with(least) > problem.dense_size)
        for problem, least in zip(network.problems, joined, strict=True)
    ]
