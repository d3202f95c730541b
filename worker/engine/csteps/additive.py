"""The C step of one layer: the best sum of low-rank terms under distinct reshapes (methods L.1, L.2).

With μ the penalty and λ the price of a unit of cost C, a layer's C step minimises
λ Σ αₜ rₜ + (μ/2) ‖W − Σ Θₜ‖². Divided by μ/2 this is *pressure*·Σ αₜ rₜ + ‖W − Σ Θₜ‖² with pressure = 2λ/μ, the
form used here. Each term on the others' residual is closed: its rank is the number of σ² above pressure·αₜ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.engine.csteps.spectrum import Spectrum, leading_spectrum
from worker.engine.forms.factors import Factors
from worker.engine.forms.low_rank import LowRankTerm

STALL_RELATIVE = 1e-4  # a sweep that gains less than this part of the objective ends the alternation
SWEEPS_MAX = 10  # the authors' own number; most C steps stall long before


@dataclass(frozen=True)
class TermChoice:
    """A term as the C step sees it.

    Parameters
    ----------
    term : LowRankTerm
        Reshape and costs.
    price : float
        α, the cost C of one more rank.
    rank_low, rank_high : int
        Bounds of the rank; equal where the rank is fixed.
    rank_high_asked : int, optional
        The upper bound of the spec alone, where `rank_high` is lower because more would cost as much as dense.
    """

    term: LowRankTerm
    price: float
    rank_low: int
    rank_high: int
    rank_high_asked: int | None = None

    def at_rank(self, rank: int) -> "TermChoice":
        """Return the same term with its rank fixed."""
        return replace(self, rank_low=rank, rank_high=rank)

    def past_break_even(self) -> "TermChoice":
        """Return the same term bounded by the spec alone, as the published pseudocode has it."""
        return self if self.rank_high_asked is None else replace(self, rank_high=self.rank_high_asked)


@dataclass(frozen=True)
class Projection:
    """Result of a layer's C step.

    Parameters
    ----------
    factors : tuple of Factors
        One for each term, float64; rank 0 where a term fell away.
    error : float
        ‖W − Σ Θ‖².
    objective : float
        pressure·Σ α r + error.
    sweeps : int
        Sweeps of the alternation that were made.
    dense : bool
        Whether keeping W itself was better: cost C_dense, error 0.
    """

    factors: tuple[Factors, ...]
    error: float
    objective: float
    sweeps: int
    dense: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each term."""
        return tuple(factors.rank for factors in self.factors)


def select_rank(energies: Tensor, threshold: float, low: int, high: int) -> int:
    """Rank of one term by the threshold of methods L.2: r* = #{i : σᵢ² > 2λα/μ}, within its bounds."""
    return min(max(int((energies > threshold).sum()), low), high)


def empty_factors(term: LowRankTerm, like: Tensor) -> Factors:
    """Factors of rank 0."""
    p, q = term.reshape.matrix
    return Factors(like.new_zeros((p, 0), dtype=torch.float64), like.new_zeros((0, q), dtype=torch.float64))


def project(
    weight: Tensor,
    choices: Sequence[TermChoice],
    pressure: float,
    *,
    warm: Sequence[Factors] | None = None,
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
        Terms under distinct reshapes, in the order of the alternation.
    pressure : float
        2λ/μ.
    warm : sequence of Factors, optional
        Θ of the step before, one for each term.
    sweeps : int, optional
        A fixed number of sweeps from the warm start alone, as the slides' pseudocode has it. Without it the sweeps
        go on until the decrease stalls, and the result is never worse than that of the best single term.
    rank_total_low : int
        Least sum of the ranks.
    dense_cost : float, optional
        C of the dense layer; given, W itself is one more candidate.

    Returns
    -------
    Projection
    """
    target = weight.detach().to(torch.float64)
    start = list(warm) if warm is not None else [empty_factors(choice.term, target) for choice in choices]
    best = _alternate(target, choices, pressure, start, sweeps)
    if sweeps is None and len([choice for choice in choices if choice.rank_high > 0]) > 1:
        single = min(_singles(target, choices, pressure), key=lambda made: made.objective, default=best)
        if single.objective < best.objective:
            again = _alternate(target, choices, pressure, list(single.factors), None)
            best = again if again.objective <= single.objective else single
    if sum(best.ranks) < rank_total_low:
        best = _raise_ranks(target, choices, pressure, best, rank_total_low)
    if dense_cost is not None and pressure * dense_cost < best.objective:
        return replace(best, dense=True)
    return best


def _alternate(
    target: Tensor, choices: Sequence[TermChoice], pressure: float, factors: list[Factors], sweeps: int | None
) -> Projection:
    """Fit each term in turn to what the others leave; the objective never rises."""
    active = [index for index, choice in enumerate(choices) if choice.rank_high > 0]
    factors = [
        made if index in active else empty_factors(choices[index].term, target) for index, made in enumerate(factors)
    ]
    parts = [choice.term.project(made) for choice, made in zip(choices, factors, strict=True)]
    total = torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(target)
    last = float("inf")
    limit = sweeps if sweeps is not None else SWEEPS_MAX
    limit = min(limit, 1) if len(active) <= 1 else limit  # one term on its own is closed form
    done = 0
    for _ in range(limit):
        for index in active:
            residual = target - (total - parts[index])
            factors[index] = _fit(residual, choices[index], pressure)
            updated = choices[index].term.project(factors[index])
            total = total - parts[index] + updated
            parts[index] = updated
        done += 1
        objective = _objective(target, total, choices, factors, pressure)
        if sweeps is None and last - objective <= STALL_RELATIVE * objective:
            break
        last = objective
    error = float((target - total).square().sum())
    return Projection(tuple(factors), error, _objective(target, total, choices, factors, pressure), done)


def _fit(residual: Tensor, choice: TermChoice, pressure: float) -> Factors:
    """Closed form of one term: the pairs above the threshold, within the bounds."""
    matrix = choice.term.reshape.to_matrix(residual)
    if choice.rank_low == choice.rank_high:
        return leading_spectrum(matrix, at_most=choice.rank_high).factors(choice.rank_high)
    threshold = pressure * choice.price
    spectrum = leading_spectrum(matrix, above=threshold)
    rank = select_rank(spectrum.energies, threshold, choice.rank_low, choice.rank_high)
    if rank > spectrum.energies.shape[0]:
        spectrum = leading_spectrum(matrix, at_most=rank)
    return spectrum.factors(rank)


def _singles(target: Tensor, choices: Sequence[TermChoice], pressure: float) -> list[Projection]:
    """Give each term alone the whole weight, where the others' lower bounds allow rank 0."""
    made = []
    for index, choice in enumerate(choices):
        others_may_be_empty = all(other.rank_low == 0 for place, other in enumerate(choices) if place != index)
        if choice.rank_high == 0 or not others_may_be_empty:
            continue
        factors = [empty_factors(other.term, target) for other in choices]
        factors[index] = _fit(target, choice, pressure)
        total = choice.term.project(factors[index])
        error = float((target - total).square().sum())
        objective = _objective(target, total, choices, factors, pressure)
        made.append(Projection(tuple(factors), error, objective, 1))
    return made


def _raise_ranks(
    target: Tensor, choices: Sequence[TermChoice], pressure: float, made: Projection, rank_total_low: int
) -> Projection:
    """Add the pairs that cost least for what they explain until the layer has its least total rank."""
    while sum(made.ranks) < rank_total_low:
        total = sum((c.term.project(f) for c, f in zip(choices, made.factors, strict=True)), torch.zeros_like(target))
        best_index, best_loss = -1, float("inf")
        for index, choice in enumerate(choices):
            if made.ranks[index] >= choice.rank_high:
                continue
            spectrum: Spectrum = leading_spectrum(choice.term.reshape.to_matrix(target - total), at_most=1)
            loss = pressure * choice.price - float(spectrum.energies[0])
            if loss < best_loss:
                best_index, best_loss = index, loss
        if best_index < 0:
            break
        fixed = [
            choice.at_rank(rank + (index == best_index))
            for index, (choice, rank) in enumerate(zip(choices, made.ranks, strict=True))
        ]
        made = _alternate(target, fixed, pressure, list(made.factors), 1)
    return made


def _objective(
    target: Tensor, total: Tensor, choices: Sequence[TermChoice], factors: Sequence[Factors], pressure: float
) -> float:
    cost = sum(choice.price * made.rank for choice, made in zip(choices, factors, strict=True))
    return pressure * cost + float((target - total).square().sum())
