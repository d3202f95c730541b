"""One layer's best sum of a channel and a spatial term at a number of multiply-adds, by trying every kind of split."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from worker.engine.csteps.additive import project
from worker.engine.layer_problem import LayerProblem

SPLITS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # part of the budget that is the first term's
SWEEPS = 10


@dataclass(frozen=True)
class Split:
    """Ranks of the two terms, and the relative error ‖W − Θ₁ − Θ₂‖ / ‖W‖."""

    ranks: tuple[int, ...]
    error: float


def splits_of(problem: LayerProblem, weight: Tensor, macs: int) -> list[Split]:
    """Fit the sum at every split of the budget; the first has the second term alone, the last the first term."""
    first, second = (choice.term.counts_at(1).macs for choice in problem.choices)
    most = macs // first
    found = []
    for rank in sorted({round(most * share) for share in SPLITS}):
        ranks = (rank, min((macs - rank * first) // second, problem.choices[1].term.units_max))
        fixed = [choice.at_rank(units) for choice, units in zip(problem.choices, ranks, strict=True)]
        made = project(weight, fixed, 0.0, sweeps=SWEEPS)
        found.append(Split(ranks, (made.error / float(weight.double().square().sum())) ** 0.5))
    return found


def best_of(splits: Sequence[Split]) -> Split:
    """The split of least error."""
    return min(splits, key=lambda split: split.error)
