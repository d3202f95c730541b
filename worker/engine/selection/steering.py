"""Choosing ranks for all layers at once: by a pressure 2λ/μ, or so that a budget is met (methods L.2, L.7)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import sqrt

import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection, empty_factors, project
from worker.engine.csteps.spectrum import energies_of
from worker.engine.forms.factors import Factors
from worker.engine.layer_rules import LayerProblem
from worker.engine.selection.curves import curves_of, estimate_pressure

NEARLY = 0.97  # of the limit: what is left is filled rank by rank
STRIDE = 2.0  # between pressures while the limit is not bracketed
TRIES_MAX = 12
LOWERINGS_MAX = 4  # once W has emptied its tails, lower pressures find nothing more
PROHIBITIVE = 1e30
POLISH_SWEEPS = 3
AfterLayer = Callable[[int, int], None]  # told of every layer that is projected: which one, of how many


@dataclass(frozen=True)
class Network:
    """All layer problems, with the size of everything else.

    Parameters
    ----------
    problems : tuple of LayerProblem
        Layers that can be compressed.
    rest : int
        Size of the network without these layers' weights, in the metric of the problems.
    """

    problems: tuple[LayerProblem, ...]
    rest: int

    def size(self, projections: Sequence[Projection]) -> int:
        """Size of the whole network with these projections."""
        return self.rest + sum(layer_size(p, made) for p, made in zip(self.problems, projections, strict=True))

    @property
    def least_size(self) -> int:
        """Size that no choice of ranks can go below."""
        return self.rest + sum(problem.least_size for problem in self.problems)

    @property
    def dense_size(self) -> int:
        """Size of the reference."""
        return self.rest + sum(problem.dense_size for problem in self.problems)


def layer_size(problem: LayerProblem, projection: Projection) -> int:
    """Size of a layer with its projection."""
    return problem.dense_size if projection.dense else problem.size(projection.ranks)


def project_all(
    network: Network,
    weights: Sequence[Tensor],
    pressure: float,
    warm: Sequence[Sequence[Factors]] | None,
    sweeps: int | None,
    after_layer: AfterLayer | None = None,
) -> list[Projection]:
    """Make the C step of every layer.

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
        Told of every layer that is projected.
    """
    literal = sweeps is not None
    made: list[Projection] = []
    for index, (problem, weight) in enumerate(zip(network.problems, weights, strict=True)):
        projection = project(
            weight,
            [choice.past_break_even() for choice in problem.choices] if literal else problem.choices,
            pressure,
            warm=None if warm is None else warm[index],
            sweeps=sweeps,
            rank_total_low=0 if literal else problem.rank_total_low,
            dense_cost=None if literal or problem.fixed else problem.dense_price,
        )
        made.append(projection)
        if after_layer is not None:
            after_layer(index + 1, len(weights))
    return made


def pressure_for(
    network: Network,
    weights: Sequence[Tensor],
    limit: int,
    *,
    start: float | None = None,
    warm: Sequence[Sequence[Factors]] | None = None,
    after_layer: AfterLayer | None = None,
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
    """
    if start is None:
        start = estimate_pressure(curves_of(network.problems, weights), network.rest, limit)
    pressure, factor = start, STRIDE
    feasible: tuple[float, list[Projection]] | None = None
    infeasible: float | None = None
    for tries in range(TRIES_MAX):
        made = project_all(network, weights, pressure, warm, None, after_layer)
        size = network.size(made)
        if size <= limit:
            if feasible is None or size >= network.size(feasible[1]):
                feasible = (pressure, made)
            if size >= NEARLY * limit or (infeasible is None and tries >= LOWERINGS_MAX):
                break
        else:
            infeasible = pressure
        if feasible is None:
            pressure, factor = pressure * factor, factor * STRIDE
        elif infeasible is None:
            pressure /= STRIDE
        else:
            pressure = sqrt(feasible[0] * infeasible)
    if feasible is None:  # only the least ranks are left
        feasible = (start, least_projections(network, weights))
    return feasible


def least_projections(network: Network, weights: Sequence[Tensor]) -> list[Projection]:
    """Fit every layer at its least size in the metric, whatever the cost C says."""
    made = []
    for problem, weight in zip(network.problems, weights, strict=True):
        ranks = problem.least_ranks
        fixed = [choice.at_rank(rank) for choice, rank in zip(problem.choices, ranks, strict=True)]
        dense = problem.size(ranks) > problem.dense_size
        made.append(replace(project(weight, fixed, 0.0, sweeps=POLISH_SWEEPS), dense=dense))
    return made


def fill(
    network: Network, weights: Sequence[Tensor], projections: Sequence[Projection], limit: int
) -> list[Projection]:
    """Use what a budget has left: raise ranks by the largest σ²/cost that still fits, then fit at those ranks.

    A layer never grows to the size of its dense form, and the limit is never exceeded.
    """
    ranks = [list(made.ranks) for made in projections]
    left = limit - network.size(projections)
    queue: list[tuple[float, int, int, int]] = []
    spectra: dict[tuple[int, int], Tensor] = {}
    for index, (problem, weight, made) in enumerate(zip(network.problems, weights, projections, strict=True)):
        if made.dense:
            continue
        residual = weight.detach().to(torch.float64) - composed(problem, made.factors)
        for place, choice in enumerate(problem.choices):
            if made.ranks[place] < choice.rank_high:
                spectra[index, place] = energies_of(choice.term.reshape.to_matrix(residual))
                queue.append(_entry(network, spectra, index, place, 0))
    heapify(queue)
    while queue:
        _, index, place, taken = heappop(queue)
        problem = network.problems[index]
        raised = [rank + (position == place) for position, rank in enumerate(ranks[index])]
        extra = problem.size(raised) - problem.size(ranks[index])
        fits = extra <= left and problem.size(raised) < problem.dense_size
        if not fits or raised[place] > problem.choices[place].rank_high:
            continue
        ranks[index], left = raised, left - extra
        if taken + 1 < len(spectra[index, place]):
            heappush(queue, _entry(network, spectra, index, place, taken + 1))
    return at_ranks(network, weights, projections, ranks)


def at_ranks(
    network: Network, weights: Sequence[Tensor], projections: Sequence[Projection], ranks: Sequence[Sequence[int]]
) -> list[Projection]:
    """Fit every layer at fixed ranks, from the given factors."""
    made = []
    for problem, weight, projection, wanted in zip(network.problems, weights, projections, ranks, strict=True):
        if projection.dense:
            made.append(projection)
            continue
        fixed = [choice.at_rank(rank) for choice, rank in zip(problem.choices, wanted, strict=True)]
        made.append(project(weight, fixed, 0.0, warm=projection.factors, sweeps=POLISH_SWEEPS))
    return made


def composed(problem: LayerProblem, factors: Sequence[Factors]) -> Tensor:
    """Sum of a layer's terms as a dense weight, float64."""
    parts = [choice.term.project(made) for choice, made in zip(problem.choices, factors, strict=True)]
    return torch.stack(parts).sum(dim=0)


def held_against(network: Network, weights: Sequence[Tensor], projections: Sequence[Projection]) -> list[Projection]:
    """Give each projection the error ‖W − Σ Θ‖² to these weights, whatever it was fitted to (W − β/μ)."""
    return [
        made
        if made.dense
        else replace(made, error=float((weight.detach().double() - composed(problem, made.factors)).square().sum()))
        for problem, weight, made in zip(network.problems, weights, projections, strict=True)
    ]


def nothing_yet(network: Network, weights: Sequence[Tensor]) -> list[tuple[Factors, ...]]:
    """Θ = 0 for every layer, as the loop begins."""
    return [
        tuple(empty_factors(choice.term, weight) for choice in problem.choices)
        for problem, weight in zip(network.problems, weights, strict=True)
    ]


def settle_dense(network: Network, projections: Sequence[Projection]) -> list[Projection]:
    """Leave dense every layer whose sum costs no less than its dense form in the metric (never worse)."""
    return [
        Projection(made.factors, 0.0, made.objective, made.sweeps, dense=True)
        if made.dense or problem.size(made.ranks) >= problem.dense_size
        else made
        for problem, made in zip(network.problems, projections, strict=True)
    ]


def _entry(
    network: Network, spectra: dict[tuple[int, int], Tensor], index: int, place: int, taken: int
) -> tuple[float, int, int, int]:
    choice = network.problems[index].choices[place]
    gain = float(spectra[index, place][taken]) / max(choice.price, 1e-300)
    return (-gain, index, place, taken)
