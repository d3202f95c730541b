"""A budget that falls while the network learns: the units go that the loss misses least.

Energies alone (σ² per cost) say how far a weight moves, not what that does to the loss: measured on LeNet300 at 6.8 %
of the parameters they ask for ranks (9, 17), where (12, 9) has a test error lower by 0.7 points after the same
training. So ranks begin above the budget, and whenever it falls every term is tried with fewer units: what the loss
rises by, per energy that is lost, weighs the energies of its units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import inf

import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection
from worker.engine.forms.term import Accuracy, Term
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection.network import AfterLayer, Network, composed
from worker.engine.selection.units import at_ranks, at_units, refitted, together

SLACK = 1.6  # the budget begins at so many times its end, or halfway to the dense network where that is less
FALLS_FROM, FALLS_TO = 0.3, 0.8  # of the steps; before, ranks are free within the wider budget
FLOOR = 0.3  # of what energies cost on average: counts for every term besides its own trial
_TINIEST = 1e-12  # of a loss or an energy
LossOf = Callable[[int, Tensor | None], float]  # with a layer's W changed by a tensor; None changes nothing


def falling_limit(limit: int, dense_size: int, share: float) -> int:
    """Budget after a share of the steps: wide, then falling by equal ratios to the limit itself."""
    slack = max(min(SLACK, (limit + dense_size) / (2 * limit)), 1.0)
    left = min(max((FALLS_TO - share) / (FALLS_TO - FALLS_FROM), 0.0), 1.0)
    return int(limit * slack**left)


def shrink(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    limit: int,
    loss_of: LossOf,
    *,
    pressure: float = 0.0,
    mu: float = inf,
    accuracy: Accuracy = Accuracy.EXACT,
    after_layer: AfterLayer | None = None,
) -> list[Projection]:
    """Fit Θ anew at its units, less those that the loss misses least per cost, so that the size meets the limit.

    Parameters
    ----------
    network : Network
        The problems.
    weights : sequence of Tensor
        W (or W − β/μ) of each problem.
    projections : sequence of Projection
        Θ of the step before.
    limit : int
        Size that should not be exceeded; where graded terms do not suffice, it is.
    loss_of : callable
        Loss of the network with its own W, but for one layer's, to which a change is added. W is what was trained;
        where all layers are Θ at once, the loss of that would drown what one unit is worth.
    pressure : float
        2λ/μ, for terms that are not graded: they choose their sizes themselves.
    mu : float
        μ, for penalties that are a term's own.
    accuracy : Accuracy
        Of the closed forms.
    after_layer : callable, optional
        Told of every layer that is fitted, before and after units have gone.
    """
    made = refitted(network, weights, projections, pressure, mu, accuracy, after_layer)
    size = network.size(made)
    if size <= limit:
        return made
    trials = _Trials(network, weights, made, 1 - limit / size, loss_of, mu)
    dropping = _Dropping(network, trials.begun, size - limit)
    for index, place, value in trials.values():
        dropping.offer(index, place, value)
    dropping.run()
    started = [each if used else kept for each, kept, used in zip(trials.begun, made, dropping.opened, strict=True)]
    return at_ranks(network, weights, started, dropping.ranks, mu, accuracy, after_layer)


@dataclass
class _Trials:
    """What the loss rises by where one term has fewer units; dense layers are tried with as many as are allowed."""

    network: Network
    weights: Sequence[Tensor]
    made: Sequence[Projection]
    share: float
    loss_of: LossOf
    mu: float

    def __post_init__(self) -> None:
        self.begun = [
            _opened(problem, weight, each, self.mu) if each.dense else each
            for problem, weight, each in zip(self.network.problems, self.weights, self.made, strict=True)
        ]

    def values(self) -> list[tuple[int, int, list[float]]]:
        """Loss that each unit of each term is worth, the last units first; place −1 stands for being dense."""
        base = self.loss_of(0, None)
        found: list[tuple[int, int, list[float]]] = []
        trials: list[_Trial] = []
        for index, (problem, before, begun) in enumerate(
            zip(self.network.problems, self.made, self.begun, strict=True)
        ):
            if problem.joint or begun.dense:
                continue
            if before.dense:
                found.append((index, -1, [max(self._loss(index, begun, None) - base, _TINIEST)]))
                continue
            made = (self._trial(index, place, base) for place in range(len(problem.choices)))
            trials += [each for each in made if each is not None]
        floor = _floor(trials)
        return [*found, *((each.index, each.place, each.values(floor)) for each in trials)]

    def _trial(self, index: int, place: int, base: float) -> "_Trial | None":
        """Try a term with fewer units, unless it has none to spare."""
        problem, begun = self.network.problems[index], self.begun[index]
        term = problem.choices[place].term.settled(begun.factors[place])
        units, least = begun.ranks[place], _least(problem, begun, place)
        if not term.graded or problem.choices[place].fixed or units <= least:
            return None
        fewer = list(begun.ranks)
        fewer[place] = max(units - max(round(units * self.share), 1), least)
        tried = at_units(problem, self.weights[index], begun, fewer, self.mu)
        rise, lost = self._loss(index, tried, begun) - base, tried.error - begun.error
        energies = term.energies(term.project(begun.factors[place]).to(torch.float64))[least:units]
        return _Trial(index, place, max(rise, 0.0), max(lost, _TINIEST), energies.flip(0).tolist())

    def _loss(self, index: int, tried: Projection, before: Projection | None) -> float:
        problem = self.network.problems[index]
        held = self.weights[index] if before is None else composed(problem, before.factors)
        return self.loss_of(index, composed(problem, tried.factors) - held)


@dataclass(frozen=True)
class _Trial:
    """What the loss rose by, and the energy that was lost, as a term had fewer units; energies of its last units."""

    index: int
    place: int
    rise: float
    lost: float
    energies: list[float]

    def values(self, floor: float) -> list[float]:
        """Loss that each unit is worth."""
        slope = self.rise / self.lost + floor
        return [slope * energy for energy in self.energies]


def _floor(trials: Sequence[_Trial]) -> float:
    """Least that an energy is worth: while W learns, the loss falls in many a trial of a term that it needs.

    Worth nothing, such a term would give all its units at once: measured on a small ResNet at 15 % of the
    multiply-adds, a layer of the last block was left rank 1 to 3, with an error of 3.6 %; with a floor it is 2.8 %.
    """
    if not trials:
        return 0.0
    rises, lost = sum(each.rise for each in trials), sum(each.lost for each in trials)
    return max(FLOOR * rises / lost, _TINIEST)


class _Dropping:
    """The queue of units that could go, the one that is worth least per cost first."""

    def __init__(self, network: Network, projections: Sequence[Projection], excess: int) -> None:
        self._problems = network.problems
        self._projections = projections
        self._excess = excess
        self._values: dict[tuple[int, int], list[float]] = {}
        self._queue: list[tuple[float, int, int, int]] = []
        self._counts = [made.counts(p.choices) for p, made in zip(network.problems, projections, strict=True)]
        self.ranks = [list(made.ranks) for made in projections]
        self.opened = [False] * len(projections)  # dense layers that became sums

    def offer(self, index: int, place: int, values: list[float]) -> None:
        """Take a term's units into the queue, one at a time."""
        self._values[index, place] = values
        self._push(index, place, 0)

    def run(self) -> None:
        """Drop units until the excess is gone."""
        while self._queue and self._excess > 0:
            _, index, place, taken = heappop(self._queue)
            if place < 0:
                self.opened[index] = True
                self._excess -= self._saved_by_opening(index)
                continue
            dropped = self._drop(index, place, taken)
            if dropped:
                self._push(index, place, taken + dropped)

    def _drop(self, index: int, place: int, taken: int) -> int:
        """Drop a few units, fewer where those are enough; returns how many."""
        problem, before, held = self._problems[index], self._counts[index], self.ranks[index]
        known = len(self._values[index, place])
        number = min(together(known), sum(held) - problem.rank_total_low, known - taken)
        if number <= 0:
            return 0
        while True:
            fewer = self._term(index, place).counts_at(held[place] - number)
            after = [fewer if at == place else each for at, each in enumerate(before)]
            saved = problem.size_of(before) - problem.size_of(after)
            if number == 1 or saved <= self._excess:
                break
            number //= 2
        held[place] -= number
        self._counts[index], self._excess = after, self._excess - saved
        return number

    def _term(self, index: int, place: int) -> Term:
        return self._problems[index].choices[place].term.settled(self._projections[index].factors[place])

    def _saved_by_opening(self, index: int) -> int:
        return self._problems[index].dense_size - self._problems[index].size_of(self._counts[index])

    def _push(self, index: int, place: int, taken: int) -> None:
        values, problem = self._values[index, place], self._problems[index]
        if taken >= len(values):
            return
        if place < 0:
            pairs = zip(problem.choices, self._counts[index], strict=True)
            price = problem.dense_price - sum(choice.price(each) for choice, each in pairs)
        else:
            term, units = self._term(index, place), self.ranks[index][place]
            price = problem.choices[place].price(term.counts_at(1)) if units > 0 else 0.0
        if price > 0:
            heappush(self._queue, (values[taken] / price, index, place, taken))


def _opened(problem: LayerProblem, weight: Tensor, made: Projection, mu: float) -> Projection:
    """A dense layer as the sum with the most units of its first graded term that are still cheaper, if there is one."""
    if problem.given or problem.joint:
        return made
    for place, choice in enumerate(problem.choices):
        term = choice.term.settled(choice.term.empty(weight))
        ranks = [each.rank_low for each in problem.choices]
        ranks[place] = choice.rank_high
        if term.graded and choice.rank_high > 0:
            opened = at_units(problem, weight, replace(made, dense=False), ranks, mu)
            if problem.size_with(opened) < problem.dense_size:
                return opened
    return made


def _least(problem: LayerProblem, made: Projection, place: int) -> int:
    """Units that a term must keep for the rule's bounds."""
    others = sum(made.ranks) - made.ranks[place]
    return max(problem.choices[place].rank_low, problem.rank_total_low - others, 0)
