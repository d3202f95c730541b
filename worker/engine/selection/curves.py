"""Size against pressure from spectra alone: one sort per term, no projection (methods L.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from worker.engine.csteps.parallel import map_layers
from worker.engine.forms.term import Counts, Term
from worker.engine.layer_problem import LayerProblem, sum_size

_HALVINGS = 60  # of the logarithm's interval: far below the gap between two energies
_CLEAR = 1 + 1e-6  # of a rank's own threshold, which the bisection ends at: another solver's rounding must not cross it


@dataclass(frozen=True)
class Curve:
    """Energies of each graded term of one layer on its weight alone: σ² of a low-rank matrix.

    Parameters
    ----------
    problem : LayerProblem
        Prices, bounds and sizes.
    terms : tuple of Term
        Its terms; one that chooses among several stands as the first of them.
    energies : tuple of Tensor or None
        Falling, float64; None where the term is not graded and counts as its least.
    norm : float
        ‖W‖².
    """

    problem: LayerProblem
    terms: tuple[Term, ...]
    energies: tuple[Tensor | None, ...]
    norm: float

    @classmethod
    def of(cls, problem: LayerProblem, weight: Tensor) -> "Curve":
        """Compute a layer's energies."""
        weight = weight.detach()
        terms = tuple(choice.term.settled(choice.term.empty(weight)) for choice in problem.choices)
        energies = tuple(term.energies(weight.double()).cpu() if term.graded else None for term in terms)
        return cls(problem, terms, energies, float(weight.double().square().sum()))

    @property
    def known(self) -> bool:
        """Whether energies or the spec tell the size of every term; others count as their least."""
        pairs = zip(self.problem.choices, self.energies, strict=True)
        return all(choice.given or choice.fixed or energies is not None for choice, energies in pairs)

    def size(self, pressure: float) -> int:
        """Size of the layer with its best single graded term and what is not graded, or dense, at 2λ/μ."""
        best, size = float("inf"), self.problem.least_size
        for place, (choice, energies) in enumerate(zip(self.problem.choices, self.energies, strict=True)):
            if energies is None:
                continue
            price = choice.price(self.terms[place].counts_at(1))
            rank = int((energies > pressure * price).sum())
            least = max(choice.rank_low, self.problem.rank_total_low)
            rank = min(max(rank, least), choice.rank_high)
            objective = pressure * price * rank + float(energies[rank:].sum())
            if objective < best:
                best, size = objective, self._size(place, rank)
        if pressure * self.problem.dense_price < best and not self.problem.given:
            return self.problem.dense_size
        return size

    @property
    def top(self) -> float:
        """Pressure above which every term that is not fixed is empty, about."""
        tops = []
        for choice, term, energies in zip(self.problem.choices, self.terms, self.energies, strict=True):
            price = choice.price(term.counts_at(1) if energies is not None else term.least_counts(1))
            largest = self.norm if energies is None else float(energies[0]) if len(energies) else 0.0
            if price > 0 and not choice.fixed:
                tops.append(largest / price)
        return max(tops, default=0.0)

    def _size(self, place: int, rank: int) -> int:
        counts = []
        for other, (choice, term) in enumerate(zip(self.problem.choices, self.terms, strict=True)):
            if other == place:
                counts.append(term.counts_at(rank))
            else:
                counts.append(term.least_counts(choice.rank_low) if choice.rank_low > 0 else Counts())
        composed = [term.composed for term in self.terms]
        numbers = sum_size(self.problem.geometry, self.problem.metric, composed, counts)
        return numbers + self.problem.overhead_of(counts)


def curves_of(problems: Sequence[LayerProblem], weights: Sequence[Tensor]) -> list[Curve]:
    """Compute the energies of every layer: on the CPU side by side, on a GPU together."""
    on_gpu = any(weight.is_cuda for weight in weights)
    sizes = [weight.numel() for weight in weights]
    return map_layers(lambda i: Curve.of(problems[i], weights[i]), range(len(weights)), sizes=sizes, together=on_gpu)


def estimate_pressure(curves: Sequence[Curve], rest: int, limit: int) -> float:
    """Find the pressure at which the single best terms meet a limit; a start for the sums."""
    tops = [curve.top for curve in curves]
    high = 2 * max([*tops, torch.finfo(torch.float64).tiny])
    low = high * 1e-14
    for _ in range(_HALVINGS):
        middle = exp(0.5 * (log(low) + log(high)))
        if rest + sum(curve.size(middle) for curve in curves) <= limit:
            high = middle
        else:
            low = middle
    return high * _CLEAR
