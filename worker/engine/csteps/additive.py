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

from worker.engine.forms.term import Ask, Counts, Price, Term

STALL_RELATIVE = 1e-4  # a sweep that gains less than this part of the objective ends the alternation
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
    """

    pressure: float
    mu: float = inf


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
    """

    term: Term
    price: Price
    rank_low: int
    rank_high: int
    rank_high_asked: int | None = None
    joint_group: str | None = None

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

    def past_break_even(self) -> "TermChoice":
        """Return the same term bounded by the spec alone, as the published pseudocode has it."""
        return self if self.rank_high_asked is None else replace(self, rank_high=self.rank_high_asked)

    def ask(self, moment: Moment) -> Ask:
        """What the term is asked for."""
        return Ask(moment.pressure, self.rank_low, self.rank_high, moment.mu, self.price)

    def cost(self, theta: Any) -> float:
        """C of a Θ."""
        return self.price(self.term.counts(theta)) if theta.units > 0 else 0.0


@dataclass(frozen=True)
class Projection:
    """Result of a layer's C step.

    Parameters
    ----------
    factors : tuple of Theta
        Θ of each term, float64; empty where a term fell away.
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

    Returns
    -------
    Projection
    """
    moment = Moment(pressure, mu)
    target = weight.detach().to(torch.float64)
    start = list(warm) if warm is not None else [choice.term.empty(target) for choice in choices]
    best = _alternate(target, choices, moment, start, sweeps)
    if sweeps is None and len([choice for choice in choices if choice.rank_high > 0]) > 1:
        single = min(_singles(target, choices, moment), key=lambda made: made.objective, default=best)
        if single.objective < best.objective:
            again = _alternate(target, choices, moment, list(single.factors), None)
            best = again if again.objective <= single.objective else single
    if sum(best.ranks) < rank_total_low:
        best = _raise_ranks(target, choices, moment, best, rank_total_low)
    if dense_cost is not None and pressure * dense_cost < best.objective:
        return replace(best, dense=True)
    return best


def _alternate(
    target: Tensor, choices: Sequence[TermChoice], moment: Moment, thetas: list[Any], sweeps: int | None
) -> Projection:
    """Fit each term in turn to what the others leave; with closed forms the objective never rises.

    A term that only approximates its C step (a quantized factor, a local optimum) may raise it: then the sweep before
    stands, unless the number of sweeps is given.
    """
    active = [index for index, choice in enumerate(choices) if choice.rank_high > 0]
    thetas = [made if index in active else choices[index].term.empty(target) for index, made in enumerate(thetas)]
    parts = [choice.term.project(made) for choice, made in zip(choices, thetas, strict=True)]
    total = torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(target)
    limit = sweeps if sweeps is not None else SWEEPS_MAX
    limit = min(limit, 1) if len(active) <= 1 else limit  # one term on its own is closed form
    best: Projection | None = None
    for done in range(1, limit + 1):
        for index in active:
            residual = target - (total - parts[index])
            thetas[index] = choices[index].term.fit(residual, choices[index].ask(moment), thetas[index])
            updated = choices[index].term.project(thetas[index])
            total = total - parts[index] + updated
            parts[index] = updated
        made = _made(target, total, choices, thetas, moment, done)
        if sweeps is None and best is not None and best.objective - made.objective <= STALL_RELATIVE * made.objective:
            return made if made.objective <= best.objective else replace(best, sweeps=done)
        best = made
    return best if best is not None else _made(target, total, choices, thetas, moment, 0)


def _made(
    target: Tensor, total: Tensor, choices: Sequence[TermChoice], thetas: Sequence[Any], moment: Moment, sweeps: int
) -> Projection:
    error = float((target - total).square().sum())
    pairs = list(zip(choices, thetas, strict=True))
    cost = sum(choice.cost(theta) for choice, theta in pairs)
    own = sum(choice.term.own_penalty(theta, choice.ask(moment)) for choice, theta in pairs)
    return Projection(tuple(thetas), error, moment.pressure * cost + own + error, sweeps)


def _singles(target: Tensor, choices: Sequence[TermChoice], moment: Moment) -> list[Projection]:
    """Give each term alone the whole weight, where the others' lower bounds allow that they are empty."""
    made = []
    for index, choice in enumerate(choices):
        others_may_be_empty = all(other.rank_low == 0 for place, other in enumerate(choices) if place != index)
        if choice.rank_high == 0 or not others_may_be_empty:
            continue
        thetas = [other.term.empty(target) for other in choices]
        thetas[index] = choice.term.fit(target, choice.ask(moment))
        made.append(_made(target, choice.term.project(thetas[index]), choices, thetas, moment, 1))
    return made


def _raise_ranks(
    target: Tensor, choices: Sequence[TermChoice], moment: Moment, made: Projection, rank_total_low: int
) -> Projection:
    """Add the units that cost least for what they explain until the layer has its least total."""
    while sum(made.ranks) < rank_total_low:
        parts = [choice.term.project(theta) for choice, theta in zip(choices, made.factors, strict=True)]
        residual = target - torch.stack(parts).sum(dim=0)
        best_index, best_loss = -1, inf
        for index, choice in enumerate(choices):
            term = choice.term.settled(made.factors[index])
            if made.ranks[index] >= choice.rank_high or not term.graded:
                continue
            loss = moment.pressure * choice.price(term.counts_at(1)) - float(term.energies(residual)[0])
            if loss < best_loss:
                best_index, best_loss = index, loss
        if best_index < 0:
            break
        fixed = [
            choice.at_rank(rank + (index == best_index)) if choice.term.graded else choice
            for index, (choice, rank) in enumerate(zip(choices, made.ranks, strict=True))
        ]
        made = _alternate(target, fixed, moment, list(made.factors), 1)
    return made
