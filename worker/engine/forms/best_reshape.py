"""The best of a layer's reshapes: a low-rank term whose C step also chooses how the weight is read as a matrix.

The reshape is one more variable of the C step, discrete like the rank: each candidate's closed form is made, and the
one of least pressure·C(Θ) + ‖W − Δ(Θ)‖² stands. The choice is part of Θ and may change from step to step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from service.contract.plan import Form
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.term import Ask, Counts, Facts, Term


class BestReshapeTerm(Term):
    """A low-rank matrix under one of several reshapes.

    Parameters
    ----------
    candidates : sequence of Term
        One for each reshape: low-rank terms that carry their place in this sequence, all composed or none.
    """

    type_name: ClassVar[str] = "low_rank"

    takes_float32: ClassVar[bool] = True

    def __init__(self, candidates: Sequence[LowRankTerm]) -> None:
        self.candidates = tuple(candidates)
        self.geometry = candidates[0].geometry

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Term:
        """Not made alone: what a spec asks for decides the candidates."""
        raise NotImplementedError

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Term:
        """Not made alone: facts of the candidates decide their classes."""
        raise NotImplementedError

    def facts(self) -> Facts:
        """Every candidate's."""
        return {"candidates": [each.facts() for each in self.candidates]}

    @property
    def form(self) -> Form:
        """Of the first candidate; `form_of` knows better."""
        return self.candidates[0].form

    def form_of(self, theta: Any) -> Form:
        """Of the reshape that was chosen."""
        return self.settled(theta).form_of(theta)

    @property
    def key(self) -> object:
        """The union of the candidates' sets."""
        return ("best", frozenset(each.key for each in self.candidates))

    @property
    def composed(self) -> bool:
        """All candidates are, or none."""
        return self.candidates[0].composed

    @property
    def overhead_bytes(self) -> int:
        """Of the reshape that takes most."""
        return max(each.overhead_bytes for each in self.candidates)

    @property
    def units_max(self) -> int:
        """The highest rank of any candidate."""
        return max(each.units_max for each in self.candidates)

    def units_asked(self, spec: Any) -> tuple[int, int] | None:
        """The rank, or its bounds."""
        asked = [each.units_asked(spec) for each in self.candidates]
        bounds = [each for each in asked if each is not None]
        return (bounds[0][0], max(high for _, high in bounds)) if bounds else None

    def least_counts(self, low: int) -> Counts:
        """Least of each count among the candidates that reach the rank."""
        counts = [each.counts_at(low) for each in self.candidates if each.units_max >= low]
        least = (min(getattr(each, name) for each in counts) for name in ("params", "macs", "bits"))
        return Counts(*least)

    def counts(self, theta: Any) -> Counts:
        """Counts under the reshape that was chosen."""
        return self.settled(theta).counts(theta)

    def settled(self, theta: Any) -> LowRankTerm:
        """Return the term of the reshape that was chosen; it is graded."""
        return self.candidates[theta.place or 0]

    def details(self, theta: Any) -> Facts:
        """As the chosen term says."""
        return self.settled(theta).details(theta)

    def empty(self, like: Tensor) -> Any:
        """Rank 0, of the first candidate."""
        return self.candidates[0].empty(like)

    def fit(self, residual: Tensor, ask: Ask, warm: Any = None) -> Any:
        """Closed form under each reshape; the least objective stands, and of equals the one before, then the first.

        Fixed at one rank, the reshape is chosen by price and error too. A reshape whose energies say that it cannot
        come below what stands is not fitted.
        """
        best, least = None, float("inf")
        former = None if warm is None or warm.units == 0 else warm.place
        for place, bounded in sorted(self._asks(ask), key=lambda pair: pair[0] != former):
            candidate = self.candidates[place]
            if best is not None and candidate.least_objective(residual, bounded) >= least:
                continue
            made = candidate.fit(residual, bounded, warm if place == former else None)
            error = float((residual - candidate.project(made)).square().sum())
            objective = ask.pressure * ask.price(candidate.counts(made)) + error if made.units else error
            if objective < least:
                best, least = made, objective
        return self.empty(residual) if best is None else best

    def _asks(self, ask: Ask) -> list[tuple[int, Ask]]:
        """What each candidate that can take part is asked: no more than costs less than the dense weight."""
        reaching = [place for place, each in enumerate(self.candidates) if each.units_max >= ask.low]
        highs = {place: min(ask.high, self.candidates[place].units_max) for place in reaching}
        bounded = {place: min(high, self._highest(self.candidates[place], ask)) for place, high in highs.items()}
        cheap = {place: high for place, high in bounded.items() if high >= ask.low}
        return [(place, replace(ask, high=high)) for place, high in (cheap or highs).items()]

    def _highest(self, candidate: LowRankTerm, ask: Ask) -> int:
        """Highest rank whose price is below the dense weight's."""
        weight = self.geometry.weight_params
        macs = 0 if candidate.composed else self.geometry.dense_macs
        dense = ask.price(Counts(weight, macs, weight * self.geometry.dtype_bits))
        low, high = 0, candidate.units_max
        while dense > 0 and low < high:  # the price grows with the rank
            middle = (low + high + 1) // 2
            low, high = (middle, high) if ask.price(candidate.counts_at(middle)) < dense else (low, middle - 1)
        return high

    def least_objective(self, residual: Tensor, ask: Ask) -> float:
        """Least of the candidates' bounds."""
        asks = self._asks(ask)
        return min((self.candidates[place].least_objective(residual, each) for place, each in asks), default=0.0)

    def project(self, theta: Any) -> Tensor:
        """Δ(Θ) under the reshape that was chosen."""
        return self.settled(theta).project(theta)

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Any:
        """Θ of the reshape that was chosen."""
        return self.candidates[facts.get("place", 0)].restore(tensors, facts)

    def emit(self, theta: Any, bias: Tensor | None) -> nn.Module:
        """As the chosen term does."""
        return self.settled(theta).emit(theta, bias)

    def emit_weight(self, theta: Any) -> nn.Module:
        """As the chosen term does."""
        return self.settled(theta).emit_weight(theta)


def best_of(made: Sequence[LowRankTerm]) -> Term:
    """Make the term that chooses among reshapes: distinct ones, and factored ones alone where there are any."""
    distinct = list({each.key: each for each in reversed(made)}.values())[::-1]
    factored = [each for each in distinct if not each.composed]
    candidates = [each.at_place(place) for place, each in enumerate(factored or distinct)]
    return candidates[0] if len(candidates) == 1 else BestReshapeTerm(candidates)
