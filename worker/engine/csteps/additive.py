"""The C step of one layer: the best sum of terms (methods L.1, L.2, L.4).

With μ the penalty and λ the price of a unit of cost C, a layer's C step minimises
λ Σ C(Θₜ) + (μ/2) ‖W − Σ Δₜ(Θₜ)‖². Divided by μ/2 this is *pressure*·Σ C(Θₜ) + ‖W − Σ Δₜ(Θₜ)‖² with pressure = 2λ/μ,
the form used here. Each term on the others' residual is closed: a low-rank matrix keeps the σ² above pressure·α.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from worker.engine.csteps.spectrum import in_working_dtype
from worker.engine.forms.term import Accuracy, Ask, Counts, Price, Term

STALL_RELATIVE = 1e-5  # a sweep that gains less than this part of the objective ends the alternation
STALL_WARM = 4e-5  # the same where the next step goes on from this one
SWEEPS_MAX = 10  # the authors' own number; most C steps stall long before


@dataclass(frozen=True)
class Moment:
    """Where in the loop a C step is made.

    Parameters
    ----------
    pressure : float
        2λ/μ.
    mu : float
        μ; infinite where no step is under way (direct compression).
    accuracy : Accuracy
        Of the closed forms.
    """

    pressure: float
    mu: float = inf
    accuracy: Accuracy = Accuracy.EXACT


@dataclass(frozen=True)
class TermChoice:
    """A term as the C step sees it.

    Parameters
    ----------
    term : Term
        The compression and its counts.
    price : Price
        C of counts.
    rank_low, rank_high : int
        Bounds of the term's units (of a low-rank matrix its rank); equal where they are fixed.
    rank_high_asked : int, optional
        The upper bound of the spec alone, where `rank_high` is lower because more would cost as much as dense.
    joint_group : str, optional
        Equal for the terms of several layers whose C step is made at once.
    given : bool
        Whether the spec decides the size, by a number of units or by what weighs against them (a radius, a penalty).
    """

    term: Term
    price: Price
    rank_low: int
    rank_high: int
    rank_high_asked: int | None = None
    joint_group: str | None = None
    given: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the units are given."""
        return self.rank_low == self.rank_high

    @property
    def unit_price(self) -> float:
        """α: C of one more unit of a graded term."""
        return self.price(self.term.counts_at(1))

    def at_rank(self, rank: int) -> "TermChoice":
        """Return the same term with its units fixed."""
        return replace(self, rank_low=rank, rank_high=rank)

    def settled(self, theta: Any) -> "TermChoice":
        """Return the same with the term as a Θ has settled it."""
        return replace(self, term=self.term.settled(theta))

    def past_break_even(self) -> "TermChoice":
        """Return the same term bounded by the spec alone, as the published pseudocode has it."""
        return self if self.rank_high_asked is None else replace(self, rank_high=self.rank_high_asked)

    def ask(self, moment: Moment) -> Ask:
        """What the term is asked for."""
        return Ask(moment.pressure, self.rank_low, self.rank_high, moment.mu, self.price, moment.accuracy)

    def cost(self, theta: Any) -> float:
        """C of a Θ."""
        return self.price(self.term.counts(theta)) if theta.units > 0 else 0.0


@dataclass(frozen=True)
class Projection:
    """Result of a layer's C step.

    Parameters
    ----------
    factors : tuple of Theta
        Θ of each term; empty where a term fell away.
    error : float
        ‖W − Σ Δ(Θ)‖².
    objective : float
        pressure·Σ C(Θ) + error.
    sweeps : int
        Sweeps of the alternation that were made.
    dense : bool
        Whether keeping W itself was better: cost C_dense, error 0.
    """

    factors: tuple[Any, ...]
    error: float
    objective: float
    sweeps: int
    dense: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """Units of each term: the rank of a low-rank matrix."""
        return tuple(factors.units for factors in self.factors)

    def counts(self, choices: Sequence[TermChoice]) -> list[Counts]:
        """Counts of each term."""
        pairs = zip(choices, self.factors, strict=True)
        return [choice.term.counts(theta) if theta.units > 0 else Counts() for choice, theta in pairs]


def project(
    weight: Tensor,
    choices: Sequence[TermChoice],
    pressure: float,
    *,
    mu: float = inf,
    warm: Sequence[Any] | None = None,
    sweeps: int | None = None,
    rank_total_low: int = 0,
    dense_cost: float | None = None,
    accuracy: Accuracy = Accuracy.EXACT,
) -> Projection:
    """Make the C step of one layer.

    Parameters
    ----------
    weight : Tensor
        The layer's weight (minus β/μ under multipliers), any shape, any floating dtype.
    choices : sequence of TermChoice
        Distinct terms, in the order of the alternation.
    pressure : float
        2λ/μ.
    mu : float
        μ, for penalties that are a term's own.
    warm : sequence of Theta, optional
        Θ of the step before, one for each term.
    sweeps : int, optional
        A fixed number of sweeps from the warm start alone, as the slides' pseudocode has it. Without it the sweeps
        go on until the decrease stalls, and the result is never worse than that of the best single term.
    rank_total_low : int
        Least sum of the units.
    dense_cost : float, optional
        C of the dense layer; given, W itself is one more candidate.
    accuracy : Accuracy
        Of the closed forms. A term that is alone is exact whatever is asked: no later sweep would mend it.

    Returns
    -------
    Projection
    """
    active = [choice for choice in choices if choice.rank_high > 0]
    if accuracy is Accuracy.WARM and (len(active) <= 1 or warm is None):
        accuracy = Accuracy.SINGLE
    moment = Moment(pressure, mu, accuracy)
    single = all(choice.term.takes_float32 for choice in active)
    target = in_working_dtype(weight.detach(), accuracy) if single else weight.detach().to(torch.float64)
    start = list(warm) if warm is not None else [choice.term.empty(target) for choice in choices]
    best = _alternate(target, choices, moment, start, sweeps)
    if sweeps is None and len(active) > 1:
        alone = min(_singles(target, choices, moment, best.objective), key=lambda made: made.objective, default=best)
        if alone.objective < best.objective:
            again = _alternate(target, choices, moment, list(alone.factors), None)
            best = again if again.objective <= alone.objective else alone
    if sum(best.ranks) < rank_total_low:
        best = _raise_ranks(target, choices, moment, best, rank_total_low)
    if dense_cost is not None and pressure * dense_cost < best.objective:
        return replace(best, dense=True)
    return best


def _alternate(
    target: Tensor, choices: Sequence[TermChoice], moment: Moment, thetas: Sequence[Any], sweeps: int | None
) -> Projection:
    """Fit each term in turn to what the others leave, until the decrease stalls or for a given number of sweeps.

    With closed forms the objective never rises. A term that only approximates its C step (a quantized factor, a local
    optimum) may raise it, and so may an extrapolation: then the sweep before stands, unless the number is given.
    """
    active = [index for index, choice in enumerate(choices) if choice.rank_high > 0]
    begin = [made if index in active else choices[index].term.empty(target) for index, made in enumerate(thetas)]
    under_way = _Alternation(target, choices, moment, active, begin)
    limit = sweeps if sweeps is not None else SWEEPS_MAX
    limit = min(limit, 1) if len(active) <= 1 else limit  # one term on its own is closed form
    extrapolates = sweeps is None and all(choices[index].term.graded for index in active)
    stall = STALL_WARM if moment.accuracy is Accuracy.WARM else STALL_RELATIVE
    best: Projection | None = None
    for done in range(1, limit + 1):
        under_way.sweep(extrapolates=extrapolates)
        made = under_way.projection(done)
        if sweeps is None and best is not None and best.objective - made.objective <= stall * made.objective:
            if made.objective <= best.objective:
                return made
            if not under_way.extrapolated:
                return replace(best, sweeps=done)
            under_way = _Alternation(target, choices, moment, active, best.factors)
            continue
        best = made
    return best if best is not None else under_way.projection(0)


class _Alternation:
    """The sum of a layer's terms under way.

    Sweeps converge linearly, the slower the more two terms can explain the same. The first term of a sweep is
    therefore fitted to what the others leave where they are heading to: R + ω(R − R of the sweep before), with
    Nesterov's ω = 2s/(s + 3) after s sweeps. Every Θ stays a closed form of some residual, and after the last term's
    the objective is that of any other sum.
    """

    def __init__(
        self,
        target: Tensor,
        choices: Sequence[TermChoice],
        moment: Moment,
        active: Sequence[int],
        thetas: Sequence[Any],
    ) -> None:
        self._choices = choices
        self._moment = moment
        self._active = active
        self._thetas = list(thetas)
        self._parts: dict[int, Tensor] = {}
        self._gap = target  # target − Σ parts
        if len(active) > 1:  # of a single term nothing is left by others
            for index in active:
                self._put(index, thetas[index])
        self._sweeps = 0
        self._former: Tensor | None = None
        self.extrapolated = False

    def sweep(self, *, extrapolates: bool) -> None:
        """Fit every term once."""
        weight = 2 * self._sweeps / (self._sweeps + 3)
        self.extrapolated = extrapolates and weight > 0
        for place, index in enumerate(self._active):
            residual = self._take(index)
            if place == 0 and extrapolates and len(self._active) > 1:
                asked = residual if self._former is None else residual.lerp(self._former, -weight)
                self._former = residual
            else:
                asked = residual
            choice = self._choices[index]
            self._thetas[index] = choice.term.fit(asked, choice.ask(self._moment), self._thetas[index])
            self._put(index, self._thetas[index])
        self._sweeps += 1

    def projection(self, sweeps: int) -> Projection:
        """Make the projection of the sum as it stands."""
        return _made(self._gap, self._choices, self._thetas, self._moment, sweeps)

    def _take(self, index: int) -> Tensor:
        """Take a part out of the sum; returns what the others leave."""
        part = self._parts.pop(index, None)
        if part is not None:
            self._gap += part
        return self._gap

    def _put(self, index: int, theta: Any) -> None:
        part = self._choices[index].term.project(theta).to(self._gap.dtype)
        self._parts[index] = part
        self._gap = self._gap - part  # a new tensor: the residual may be part of Θ


def _made(gap: Tensor, choices: Sequence[TermChoice], thetas: Sequence[Any], moment: Moment, sweeps: int) -> Projection:
    error = float(gap.square().sum())
    pairs = list(zip(choices, thetas, strict=True))
    own = sum(choice.term.own_penalty(theta, choice.ask(moment)) for choice, theta in pairs)
    cost = moment.pressure * sum_cost(choices, thetas)
    return Projection(tuple(thetas), error, cost + own + error, sweeps)


def sum_cost(choices: Sequence[TermChoice], thetas: Sequence[Any]) -> float:
    """C of a sum: of each Θ, and of the dense operator where any weight is composed."""
    pairs = list(zip(choices, thetas, strict=True))
    cost = sum(choice.cost(theta) for choice, theta in pairs)
    composed = next((choice for choice, theta in pairs if choice.term.composed and theta.units > 0), None)
    if composed is None:
        return cost
    return cost + composed.price(Counts(macs=composed.term.geometry.dense_macs))


def _singles(target: Tensor, choices: Sequence[TermChoice], moment: Moment, objective: float) -> list[Projection]:
    """Give each term alone the whole weight, where the others' lower bounds allow that they are empty.

    A term is left out where it cannot come below `objective`.
    """
    made = []
    for index, choice in enumerate(choices):
        others_may_be_empty = all(other.rank_low == 0 for place, other in enumerate(choices) if place != index)
        if choice.rank_high == 0 or not others_may_be_empty:
            continue
        if choice.term.least_objective(target, choice.ask(moment)) >= objective:
            continue
        thetas = [other.term.empty(target) for other in choices]
        thetas[index] = choice.term.fit(target, choice.ask(moment))
        made.append(_made(target - choice.term.project(thetas[index]), choices, thetas, moment, 1))
    return made


def _raise_ranks(
    target: Tensor, choices: Sequence[TermChoice], moment: Moment, made: Projection, rank_total_low: int
) -> Projection:
    """Add the units that cost least for what they explain until the layer has its least total."""
    while (total := sum(made.ranks)) < rank_total_low:
        index = _cheapest_unit(target, choices, moment, made)
        if index is None:
            break
        raised = []
        for place, (choice, theta) in enumerate(zip(choices, made.factors, strict=True)):
            settled = choice.settled(theta)
            if settled.term.graded:
                raised.append(settled.at_rank(theta.units + (place == index)))
            else:
                raised.append(replace(choice, rank_low=max(choice.rank_low, int(place == index))))
        made = _alternate(target, raised, moment, list(made.factors), 1)
        if sum(made.ranks) <= total:
            break
    return made


def _cheapest_unit(target: Tensor, choices: Sequence[TermChoice], moment: Moment, made: Projection) -> int | None:
    """Find the graded term whose next unit is best; without one, the first other term that may grow."""
    parts = [choice.term.project(theta) for choice, theta in zip(choices, made.factors, strict=True)]
    residual = target - torch.stack(parts).sum(dim=0)
    losses: dict[int, float] = {}
    for index, (choice, theta) in enumerate(zip(choices, made.factors, strict=True)):
        term = choice.term.settled(theta)
        if term.graded and theta.units < choice.rank_high:
            unit_price = choice.price(term.counts_at(1))
            losses[index] = moment.pressure * unit_price - float(term.energies(residual)[0])
    if losses:
        return min(losses, key=lambda index: losses[index])
    empty = [index for index, rank in enumerate(made.ranks) if rank == 0 and choices[index].rank_high > 0]
    return empty[0] if empty else None
