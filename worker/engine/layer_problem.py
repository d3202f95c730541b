"""A layer that can be compressed, with the sizes that its terms give it."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.contract.plan import Form, ReasonCode
from service.contract.spec import Metric
from worker.engine.csteps.additive import Projection, TermChoice
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.term import Counts
from worker.engine.network.layers import Layer

UNITS: dict[Metric, str] = {"macs": "multiply-adds", "params": "parameters", "bytes": "bytes"}  # of a size, in words


@dataclass(frozen=True)
class DroppedTerm:
    """A term of the rule that is not part of the layer's sum."""

    index: int
    type: str
    form: Form
    reason: ReasonCode


@dataclass(frozen=True)
class LayerProblem:
    """A layer that can be compressed.

    Parameters
    ----------
    layer : Layer
        As it was found.
    geometry : Geometry
        The same as forms see it.
    choices : tuple of TermChoice
        Terms of its sum, priced in C (per million units, the rule's factor applied).
    term_indices : tuple of int
        Position of each choice among the rule's terms.
    rank_total_low : int
        Least sum of the units.
    dense_price : float
        C of the dense layer.
    metric : "macs", "params" or "bytes"
        What size is counted in: the budget's metric, else that of the cost.
    dropped : tuple of DroppedTerm
        Terms that do not take part.
    overheads : tuple of int
        For each choice, what its module takes of a file beside numbers, once it stores any; empty in other metrics.
    """

    layer: Layer
    geometry: Geometry
    choices: tuple[TermChoice, ...]
    term_indices: tuple[int, ...]
    rank_total_low: int
    dense_price: float
    metric: Metric
    dropped: tuple[DroppedTerm, ...] = ()
    overheads: tuple[int, ...] = ()

    @property
    def dense_size(self) -> int:
        """Size of the dense layer without its bias."""
        return dense_size(self.geometry, self.metric)

    def size(self, ranks: Sequence[int]) -> int:
        """Size of the sum at given units, without the bias; for terms whose units alone decide it."""
        return self.size_of([choice.term.counts_at(rank) for choice, rank in zip(self.choices, ranks, strict=True)])

    def size_of(self, counts: Sequence[Counts]) -> int:
        """Size of the sum at given counts of its terms, without the bias; a term that stores nothing fell away."""
        numbers = sum_size(self.geometry, self.metric, [choice.term.composed for choice in self.choices], counts)
        return numbers + self.overhead_of(counts)

    def overhead_of(self, counts: Sequence[Counts]) -> int:
        """What the terms take of a file beside numbers; one that stores nothing has no module."""
        return sum(code for code, each in zip(self.overheads, counts, strict=False) if each.bits > 0)

    def size_with(self, made: Projection) -> int:
        """Size of the layer with a projection."""
        return self.dense_size if made.dense else self.size_of(made.counts(self.choices))

    @property
    def fixed(self) -> bool:
        """Whether the units of every term are given."""
        return all(choice.fixed for choice in self.choices)

    @property
    def given(self) -> bool:
        """Whether the spec decides the size of every term, so that being dense is no candidate."""
        return all(choice.given for choice in self.choices)

    @property
    def joint(self) -> bool:
        """Whether it shares a term with other layers."""
        return any(choice.joint_group is not None for choice in self.choices)

    @property
    def least_ranks(self) -> list[int]:
        """Units of least size that the rule allows."""
        ranks = [choice.rank_low for choice in self.choices]
        missing = self.rank_total_low - sum(ranks)
        alone = [self._size_alone(place, 1) for place in range(len(self.choices))]
        for _, place in sorted(zip(alone, range(len(alone)), strict=True)):
            room = max(min(missing, self.choices[place].rank_high - ranks[place]), 0)
            ranks[place] += room
            missing -= room
        return ranks

    @property
    def least_size(self) -> int:
        """Size at the lowest units that the rule allows, or of the dense layer if that is less."""
        pairs = zip(self.choices, self.least_ranks, strict=True)
        least = [choice.term.least_counts(rank) if rank > 0 else Counts() for choice, rank in pairs]
        return min(self.size_of(least), self.dense_size)

    def _size_alone(self, place: int, units: int) -> int:
        least = self.choices[place].term.least_counts(units)
        return self.size_of([least if at == place else Counts() for at in range(len(self.choices))])


def dense_size(geometry: Geometry, metric: Metric) -> int:
    """Size of a dense layer without its bias."""
    if metric == "macs":
        return geometry.dense_macs
    return geometry.weight_params * geometry.dtype_bits // 8 if metric == "bytes" else geometry.weight_params


def sum_size(geometry: Geometry, metric: Metric, composed: Sequence[bool], counts: Sequence[Counts]) -> int:
    """Size of a sum of terms: what they store, or their multiply-adds with the dense operator of composed ones."""
    if metric == "params":
        return sum(each.params for each in counts)
    if metric == "bytes":
        return sum(-(-each.bits // 8) for each in counts)
    operator = any(rebuilt and each.bits > 0 for rebuilt, each in zip(composed, counts, strict=True))
    return sum(each.macs for each in counts) + (geometry.dense_macs if operator else 0)
