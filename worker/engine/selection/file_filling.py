"""Filling a budget in bytes by the file's real size: write it, add what still fits, write it again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from torch import Tensor

from worker.engine.csteps.additive import Projection
from worker.engine.layer_problem import LayerProblem
from worker.engine.selection.network import Network, settle_dense
from worker.engine.selection.steering import NEARLY, pressure_for
from worker.engine.selection.units import fill

EXPORTS_MAX = 10
ENOUGH = 0.998  # of the limit; later `NEARLY` of it will do
PATIENT_EXPORTS = 5
STEP_BACK = 0.9  # of what a round that went too far says would have fitted
Measure = Callable[[Sequence[Projection]], int]  # bytes of the file that projections become


def fill_file(
    network: Network,
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    limit: int,
    measure: Measure,
    *,
    mu: float = inf,
) -> tuple[list[Projection], int]:
    """Use what a budget has left of the file, as files are measured; the limit is exceeded where no round meets it.

    Parameters
    ----------
    network : Network
        The problems, with the code of their terms as it is expected.
    weights : sequence of Tensor
        W (or W − β/μ) of each problem.
    projections : sequence of Projection
        Where to start from.
    limit : int
        Bytes of the file.
    measure : callable
        Gives the file's size.
    mu : float
        μ, for penalties that are a term's own.

    Returns
    -------
    tuple of list of Projection and int
        The largest that was found within the limit, else the smallest; and its size.
    """
    filling = _FileFilling(network, weights, limit, mu)
    made = list(projections)
    for exports in range(1, EXPORTS_MAX + 1):
        filling.take(made, measure(made))
        following = filling.next(ENOUGH if exports < PATIENT_EXPORTS else NEARLY)
        if following is None:
            break
        made = following
    return filling.best, filling.best_size


class _FileFilling:
    """What has been written so far; the network's `rest` is such that its size for the best is that of the file."""

    def __init__(self, network: Network, weights: Sequence[Tensor], limit: int, mu: float) -> None:
        self.best: list[Projection] = []  # the largest within the limit; the smallest while there is none
        self.best_size = 0
        self._network, self._weights, self._limit, self._mu = network, weights, limit, mu
        self._room = 0.0  # what the next round may add to the best
        self._aim = limit  # of sizes that are chosen anew
        self._grown = self._chosen_anew = False  # how the next one is made

    def take(self, made: list[Projection], size: int) -> None:
        """Learn from a file; one that has grown within the limit is better even where its code got shorter."""
        fits, fitted = size <= self._limit, bool(self.best) and self.best_size <= self._limit
        if fits and fitted and not self._grown and size <= self.best_size:
            self._room = 0.0
        elif fits or not self.best or (not fitted and size < self.best_size):
            self.best, self.best_size = made, size
            self._room = float(self._limit - size)
        elif fitted:
            self._room *= STEP_BACK * (self._limit - self.best_size) / (size - self.best_size)
        if not fits and self._chosen_anew:
            self._aim -= size - self._limit
        rest = self._network.rest + self.best_size - self._network.size(self.best)
        self._network = replace(self._network, rest=rest)

    def next(self, enough: float) -> list[Projection] | None:
        """Choose what to write next; None where that much of the limit is used, or nothing better is left to try."""
        if self.best_size > self._limit:
            return self._anew()
        if self.best_size >= enough * self._limit:
            return None
        whole = self._network.size(self.best) + int(self._room)
        made = fill(self._network, self._weights, self.best, whole, mu=self._mu, expected=True)
        self._grown = _sizes(made) != _sizes(self.best)
        if self._grown:
            return made
        by_units = all(_by_units(p, each) for p, each in zip(self._network.problems, self.best, strict=True))
        return None if by_units or self._chosen_anew or self.best_size >= NEARLY * self._limit else self._anew()

    def _anew(self) -> list[Projection]:
        """Choose all sizes again, by a pressure: of a file that is too large, and for terms that are not graded."""
        self._grown, self._chosen_anew = False, True
        start = [each.factors for each in self.best]
        _, made = pressure_for(self._network, self._weights, self._aim, warm=start, mu=self._mu)
        return settle_dense(self._network, fill(self._network, self._weights, made, self._aim, mu=self._mu))


def _sizes(projections: Sequence[Projection]) -> list[tuple[bool, tuple[int, ...]]]:
    return [(each.dense, each.ranks) for each in projections]


def _by_units(problem: LayerProblem, made: Projection) -> bool:
    """Whether nothing but numbers of units is left to be chosen."""
    pairs = zip(problem.choices, made.factors, strict=True)
    return made.dense or all(choice.given or choice.term.settled(theta).graded for choice, theta in pairs)
