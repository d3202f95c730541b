"""Size against pressure from spectra alone: one sort per term, no projection (methods L.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from worker.engine.csteps.spectrum import energies_of
from worker.engine.layer_rules import LayerProblem

_HALVINGS = 60  # of the logarithm's interval: far below the gap between two energies
_CLEAR = 1 + 1e-6  # of a rank's own threshold, which the bisection ends at: another solver's rounding must not cross it


@dataclass(frozen=True)
class Curve:
    """σ² of each term of one layer on its weight alone.

    Parameters
    ----------
    problem : LayerProblem
        Prices, bounds and sizes.
    energies : tuple of Tensor
        σ² of the weight under each term's reshape, falling, float64.
    """

    problem: LayerProblem
    energies: tuple[Tensor, ...]

    def size(self, pressure: float) -> int:
        """Size of the layer with its best single term, or dense, at a pressure 2λ/μ."""
        best, ranks = float("inf"), [0] * len(self.energies)
        for place, (choice, energies) in enumerate(zip(self.problem.choices, self.energies, strict=True)):
            rank = int((energies > pressure * choice.price).sum())
            least = max(choice.rank_low, self.problem.rank_total_low)
            rank = min(max(rank, least), choice.rank_high)
            objective = pressure * choice.price * rank + float(energies[rank:].sum())
            if objective < best:
                best, ranks = objective, [rank if index == place else 0 for index in range(len(ranks))]
        if pressure * self.problem.dense_price < best and not self.problem.fixed:
            return self.problem.dense_size
        return self.problem.size(ranks)


def curves_of(problems: Sequence[LayerProblem], weights: Sequence[Tensor]) -> list[Curve]:
    """Compute the spectra of every layer."""
    return [
        Curve(
            problem,
            tuple(energies_of(choice.term.reshape.to_matrix(weight.detach())).cpu() for choice in problem.choices),
        )
        for problem, weight in zip(problems, weights, strict=True)
    ]


def estimate_pressure(curves: Sequence[Curve], rest: int, limit: int) -> float:
    """Find the pressure at which the single best terms meet a limit; a start for the sums."""
    tops = [
        float(energies[0]) / choice.price
        for curve in curves
        for choice, energies in zip(curve.problem.choices, curve.energies, strict=True)
        if len(energies) and choice.price > 0
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
