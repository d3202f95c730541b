"""Choosing ranks for all layers at once: by a pressure 2λ/μ, or so that a budget is met (methods L.2, L.7)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import inf, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.csteps.joint import project_jointly
from worker.engine.csteps.parallel import map_layers
from worker.engine.forms.term import Accuracy, Term
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection.curves import curves_of, estimate_pressure

NEARLY = 0.97  # of the limit: what is left is filled rank by rank
STRIDE = 2.0  # between pressures while the limit is not bracketed
TRIES_MAX = 12
LOWERINGS_MAX = 4  # once W has emptied its tails, lower pressures find nothing more
CLOSE = 1.01  # ratio of pressures: nothing between them is worth another try
PROHIBITIVE = 1e30
MOVES_MAX = 4096  # of one term's units into a budget or out of it
POLISH_SWEEPS = 3
Thetas = Sequence[Any]  # Θ of each term of one layer
AfterLayer = Callable[[int, int], None]  # told when a layer is projected: how many are, of how many
Made = TypeVar("Made")


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
        return self.rest + sum(p.size_with(made) for p, made in zip(self.problems, projections, strict=True))

    @property
    def least_size(self) -> int:
        """Size that no choice of ranks can go below."""
        return self.rest + sum(problem.least_size for problem in self.problems)

    @property
    def dense_size(self) -> int:
        """Size of the reference."""
        return self.rest + sum(problem.dense_size for problem in self.problems)


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

    made = _every_layer(one, weights, after_layer)
    return project_jointly(network.problems, weights, made, pressure, mu)


def _every_layer(
    function: Callable[[int], Made], weights: Sequence[Tensor], after_layer: AfterLayer | None = None
) -> list[Made]:
    on_gpu = any(weight.is_cuda for weight in weights)
    sizes = [weight.numel() for weight in weights]
    return map_layers(function, range(len(weights)), sizes=sizes, together=on_gpu, after=after_layer)


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


def fill(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    limit: int,
    *,
    mu: float = inf,
    accuracy: Accuracy = Accuracy.EXACT,
) -> list[Projection]:
    """Use what a budget has left: raise units by the largest energy/cost that still fits, then fit at those units.

    A layer never grows to the size of its dense form, and the limit is never exceeded. Terms that are not graded stay
    as they are, and so do layers that share a term with others.
    """
    filling = _Filling(network, projections, limit - network.size(projections))

    def left_by(index: int) -> dict[int, Tensor]:
        return _energies_left(network.problems[index], weights[index], projections[index])

    for index, offers in enumerate(_every_layer(left_by, weights)):
        for place, energies in offers.items():
            filling.offer(index, place, energies)
    filling.run()
    return at_ranks(network, weights, projections, filling.ranks, mu, accuracy)


def _energies_left(problem: LayerProblem, weight: Tensor, made: Projection) -> dict[int, Tensor]:
    """Energies of what the terms leave, for each term that may still grow."""
    if made.dense or problem.joint:
        return {}
    residual = weight.detach().to(torch.float64) - composed(problem, made.factors)
    settled = {place: choice.term.settled(made.factors[place]) for place, choice in enumerate(problem.choices)}
    return {
        place: term.energies(residual)
        for place, term in settled.items()
        if term.graded and made.ranks[place] < problem.choices[place].rank_high
    }


def together(units: int) -> int:
    """How many of a term's units are moved at once: one, but of the millions of a pruned weight a small part."""
    return max(units // MOVES_MAX, 1)


class _Filling:
    """The queue of units that could still be added, best first."""

    def __init__(self, network: Network, projections: Sequence[Projection], left: int) -> None:
        self._problems = network.problems
        self._projections = projections
        self._left = left
        self._counts = [made.counts(p.choices) for p, made in zip(network.problems, projections, strict=True)]
        self._energies: dict[tuple[int, int], list[float]] = {}
        self._queue: list[tuple[float, int, int, int]] = []
        self.ranks = [list(made.ranks) for made in projections]

    def offer(self, index: int, place: int, energies: Tensor) -> None:
        """Take a term's units into the queue, one at a time."""
        self._energies[index, place] = energies.tolist()
        self._push(index, place, 0)

    def run(self) -> None:
        """Add units until nothing more fits."""
        while self._queue:
            _, index, place, taken = heappop(self._queue)
            added = self._add(index, place, taken)
            if added and self.ranks[index][place] < self._problems[index].choices[place].rank_high:
                self._push(index, place, taken + added)

    def _add(self, index: int, place: int, taken: int) -> int:
        """Add a few units, fewer where they do not fit; returns how many."""
        problem, counts, held = self._problems[index], self._counts[index], self.ranks[index][place]
        known = len(self._energies[index, place])
        number = min(together(known), problem.choices[place].rank_high - held, known - taken)
        while number > 0:
            more = self._term(index, place).counts_at(held + number)
            raised = [more if at == place else each for at, each in enumerate(counts)]
            size = problem.size_of(raised)
            extra = size - problem.size_of(counts)
            if extra <= self._left and size < problem.dense_size:
                self._counts[index], self._left = raised, self._left - extra
                self.ranks[index][place] += number
                return number
            number //= 2
        return 0

    def _term(self, index: int, place: int) -> Term:
        return self._problems[index].choices[place].term.settled(self._projections[index].factors[place])

    def _push(self, index: int, place: int, taken: int) -> None:
        if taken < len(self._energies[index, place]):
            price = self._problems[index].choices[place].price(self._term(index, place).counts_at(1))
            gain = self._energies[index, place][taken] / max(price, 1e-300)
            heappush(self._queue, (-gain, index, place, taken))


def at_ranks(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    ranks: Sequence[Sequence[int]],
    mu: float,
    accuracy: Accuracy = Accuracy.EXACT,
    after_layer: AfterLayer | None = None,
) -> list[Projection]:
    """Fit every layer at fixed units, from the given Θ."""

    def one(index: int) -> Projection:
        problem, projection = network.problems[index], projections[index]
        if projection.dense or problem.joint:
            return projection
        return at_units(problem, weights[index], projection, ranks[index], mu, accuracy)

    return _every_layer(one, weights, after_layer)


def refitted(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    pressure: float,
    mu: float,
    accuracy: Accuracy = Accuracy.EXACT,
    after_layer: AfterLayer | None = None,
) -> list[Projection]:
    """Fit every layer anew at its units, from the given Θ; terms that are not graded choose theirs at the pressure."""

    def one(index: int) -> Projection:
        problem, projection = network.problems[index], projections[index]
        if projection.dense:
            return projection
        start = projection.factors
        held = [_held_by_units(choice, theta) for choice, theta in zip(problem.choices, start, strict=True)]
        if all(held):
            return at_units(problem, weights[index], projection, projection.ranks, mu, accuracy)
        choices = [
            choice.settled(theta).at_rank(theta.units) if by_units else choice
            for choice, theta, by_units in zip(problem.choices, start, held, strict=True)
        ]
        return project(weights[index], choices, pressure, mu=mu, warm=start, sweeps=POLISH_SWEEPS, accuracy=accuracy)

    made = _every_layer(one, weights, after_layer)
    return project_jointly(network.problems, weights, made, pressure, mu)


def _held_by_units(choice: TermChoice, theta: Any) -> bool:
    """Whether a number of units says what a term may be, and no other layer has a part in it."""
    return choice.joint_group is None and (choice.fixed or choice.term.settled(theta).graded)


def at_units(
    problem: LayerProblem,
    weight: Tensor,
    projection: Projection,
    wanted: Sequence[int],
    mu: float,
    accuracy: Accuracy = Accuracy.EXACT,
) -> Projection:
    """Fit a layer's graded and fixed terms at given units; a Θ that was chosen in another way stays as it is."""
    thetas = list(projection.factors)
    free = [
        place
        for place, choice in enumerate(problem.choices)
        if choice.fixed or choice.term.settled(thetas[place]).graded
    ]
    held = [place for place in range(len(thetas)) if place not in free]
    target = weight.detach().to(torch.float64)
    for place in held:
        target = target - problem.choices[place].term.project(thetas[place])
    choices = [problem.choices[place].settled(thetas[place]).at_rank(wanted[place]) for place in free]
    start = [thetas[place] for place in free]
    fitted = project(target, choices, 0.0, mu=mu, warm=start, sweeps=POLISH_SWEEPS, accuracy=accuracy)
    for place, theta in zip(free, fitted.factors, strict=True):
        thetas[place] = theta
    return replace(fitted, factors=tuple(thetas))


def composed(problem: LayerProblem, factors: Thetas) -> Tensor:
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


def nothing_yet(network: Network, weights: Sequence[Tensor]) -> list[Thetas]:
    """Θ = 0 for every layer, as the loop begins."""
    return [
        tuple(choice.term.empty(weight) for choice in problem.choices)
        for problem, weight in zip(network.problems, weights, strict=True)
    ]


def settle_dense(network: Network, projections: Sequence[Projection]) -> list[Projection]:
    """Leave dense every layer whose sum costs no less than its dense form in the metric (never worse)."""
    return [
        Projection(made.factors, 0.0, made.objective, made.sweeps, dense=True)
        if made.dense or problem.size_with(made) >= problem.dense_size
        else made
        for problem, made in zip(network.problems, projections, strict=True)
    ]
