"""Size against pressure from spectra alone: one sort per term, no projection (methods L.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from worker.engine.forms.term import Counts
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
    energies : tuple of Tensor or None
        Falling, float64; None where the term is not graded and counts as its least.
    """

    problem: LayerProblem
    energies: tuple[Tensor | None, ...]

    def size(self, pressure: float) -> int:
        """Size of the layer with its best single graded term and what is not graded, or dense, at 2λ/μ."""
        best, size = float("inf"), self.problem.least_size
        for place, (choice, energies) in enumerate(zip(self.problem.choices, self.energies, strict=True)):
            if energies is None:
                continue
            price = choice.unit_price
            rank = int((energies > pressure * price).sum())
            least = max(choice.rank_low, self.problem.rank_total_low)
            rank = min(max(rank, least), choice.rank_high)
            objective = pressure * price * rank + float(energies[rank:].sum())
            if objective < best:
                best, size = objective, self._size(place, rank)
        if pressure * self.problem.dense_price < best and not self.problem.fixed:
            return self.problem.dense_size
        return size

    def _size(self, place: int, rank: int) -> int:
        counts = []
        for other, (choice, energies) in enumerate(zip(self.problem.choices, self.energies, strict=True)):
            if other == place:
                counts.append(choice.term.counts_at(rank))
            else:
                left_out = energies is not None or choice.rank_low == 0
                counts.append(Counts() if left_out else choice.term.least_counts(choice.rank_low))
        composed = [choice.term.composed for choice in self.problem.choices]
        return sum_size(self.problem.geometry, self.problem.metric, composed, counts)


def curves_of(problems: Sequence[LayerProblem], weights: Sequence[Tensor]) -> list[Curve]:
    """Compute the energies of every layer."""
    return [
        Curve(
            problem,
            tuple(
                choice.term.energies(weight.detach()).cpu() if choice.term.graded else None
                for choice in problem.choices
            ),
        )
        for problem, weight in zip(problems, weights, strict=True)
    ]


def estimate_pressure(curves: Sequence[Curve], rest: int, limit: int) -> float:
    """Find the pressure at which the single best terms meet a limit; a start for the sums."""
    tops = [
        float(energies[0]) / price
        for curve in curves
        for choice, energies in zip(curve.problem.choices, curve.energies, strict=True)
        if energies is not None and len(energies) and (price := choice.unit_price) > 0
    ]
    high = 2 * max([*tops, torch.finfo(torch.float64).tiny])
    low = high * 1e-14
    for _ in range(_HALVINGS):
        middle = exp(0.5 * (log(low) + log(high)))
        if rest + sum(curve.size(middle) for curve in curves) <= limit:
            high = middle
        else:
            low = middle
    return high * _CLEAR
