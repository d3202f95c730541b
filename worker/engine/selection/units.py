"""Numbers of units: filling what a budget has left, and fitting Θ at units that are settled."""

from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush
from math import inf
from typing import Any

import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.csteps.joint import project_jointly
from worker.engine.forms.term import Accuracy, Term
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection.network import AfterLayer, Network, composed, every_layer

MOVES_MAX = 4096  # of one term's units into a budget or out of it
POLISH_SWEEPS = 3


def fill(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    limit: int,
    *,
    mu: float = inf,
    accuracy: Accuracy = Accuracy.EXACT,
    expected: bool = False,
) -> list[Projection]:
    """Use what a budget has left: raise units by the largest energy/cost that still fits, then fit at those units.

    A layer never grows to the size of its dense form, and the limit is never exceeded, unless `expected` is set: then
    a term adds as much as its bounds differ, where the bound of its pattern may be far above what it stores. Terms that
    are not graded stay as they are, and so do layers that share a term with others.
    """
    filling = _Filling(network, projections, limit - network.size(projections), expected=expected)

    def left_by(index: int) -> dict[int, Tensor]:
        return _energies_left(network.problems[index], weights[index], projections[index])

    for index, offers in enumerate(every_layer(left_by, weights)):
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

    def __init__(
        self, network: Network, projections: Sequence[Projection], left: int, *, expected: bool = False
    ) -> None:
        self._problems = network.problems
        self._projections = projections
        self._left = left
        self._expected = expected
        self._counts = [made.counts(p.choices) for p, made in zip(network.problems, projections, strict=True)]
        self._energies: dict[tuple[int, int], list[float]] = {}
        self._queue: list[tuple[float, int, int, int]] = []
        self.ranks = [list(made.ranks) for made in projections]

    def offer(self, index: int, place: int, energies: Tensor) -> None:
        """Take a term's units into the queue, one at a time."""
        self._energies[index, place] = energies.tolist()
        if self._expected and self.ranks[index][place] > 0:
            self._counts[index][place] = self._term(index, place).counts_at(self.ranks[index][place])
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

    return every_layer(one, weights, after_layer)


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

    made = every_layer(one, weights, after_layer)
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
