"""Weights of which few are not zero: single ones, filters or channels (methods L.4, L.6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isinf, log2, prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.terms import PruneTermSpec
from worker.engine.csteps.sparse import ball_threshold, falling, largest, number_above
from worker.engine.forms.geometry import CONVOLUTIONS, TRANSPOSED, Geometry
from worker.engine.forms.outputs import input_axis, output_axis
from worker.engine.forms.packing import PackedIndex, choose_index, index_bound, pack_index
from worker.engine.forms.pruned_operators import (
    emit_inputs_kept,
    emit_outputs_kept,
    slice_index_bits,
    slice_index_dtype,
)
from worker.engine.forms.term import Ask, Counts, Facts, NotApplicableError, Term
from worker.engine.forms.unpacked import SlicedWeight, SparseWeight, unpacked

_OPERATORS = {"linear", "matmul", *CONVOLUTIONS, *TRANSPOSED}
_GAP_OVERHEAD_BITS = 1.6  # of a gap code above log₂(n/κ), where positions are random


@dataclass(frozen=True)
class Kept:
    """Θ of a pruned weight.

    Parameters
    ----------
    values : Tensor
        ``(κ,)`` weights, or the weight with κ slices along an axis.
    positions : Tensor
        ``(κ,)``, int32 or int64, rising: of the flattened weight, or along the axis.
    count : int
        Number of places.
    radius : float, optional
        Of the ℓ₁ ball, which the first C step sets and later ones keep.
    layout : PackedIndex, optional
        How the positions lie in the file, of a Θ whose positions are not known yet.
    """

    values: Tensor
    positions: Tensor
    count: int
    radius: float | None = None
    layout: PackedIndex | None = None

    @property
    def units(self) -> int:
        """Number of weights or slices that are kept."""
        return self.positions.numel()

    @cached_property
    def index(self) -> PackedIndex:
        """The smallest way to store single positions."""
        return self.layout if self.layout is not None else choose_index(self.positions, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """Values and positions."""
        return {"values": self.values, "positions": self.positions}

    def facts(self) -> Facts:
        """Shapes, the radius, and how the positions lie in the file."""
        return {
            "values": list(self.values.shape),
            "kept": self.units,
            "count": self.count,
            "radius": self.radius,
            "index": [self.index.bits, self.index.entries],
        }

    def to(self, dtype: torch.dtype) -> "Kept":
        """The same with values of another dtype, on the CPU."""
        return replace(self, values=self.values.cpu().to(dtype), positions=self.positions.cpu())


class PruneTerm(Term):
    """A weight of which κ elements, filters or channels are kept.

    Single weights are graded by w², groups by their squared norms, unless a fraction, a radius or a penalty says how
    much is kept. Stored positions cost less the more there are of them: `counts_at` is the bound that holds for
    every pattern, `counts` of a Θ the truth.

    Parameters
    ----------
    norm, form, group : str
        As the spec names them.
    keep_fraction : float, optional
        κ or the radius of the ℓ₁ ball, as a part.
    alpha : float, optional
        Of a penalty.
    joint : bool
        Whether other layers share κ or the radius.
    unpack : "load" or "call"
        When the emitted module unpacks.
    geometry : Geometry
        The layer.
    """

    type_name = "prune"

    def __init__(
        self,
        geometry: Geometry,
        *,
        norm: str = "l0",
        form: str = "constraint",
        group: str = "weight",
        keep_fraction: float | None = None,
        alpha: float | None = None,
        joint: bool = False,
        unpack: str = "load",
    ) -> None:
        self.geometry = geometry
        self.norm, self.penalty, self.group = norm, form == "penalty", group
        self.keep_fraction, self.alpha, self.joint, self.unpack = keep_fraction, alpha, joint, unpack
        self.axis = output_axis(geometry) if group == "filter" else input_axis(geometry)
        grouped_by_nothing = group != "weight" and self.axis >= len(geometry.weight_shape)
        if grouped_by_nothing or not geometry.weight_shape or not geometry.weight_params:
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, Form.PRUNED)
        self.count = geometry.weight_params if group == "weight" else geometry.weight_shape[self.axis]

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Self:
        """Make the term of a `PruneTermSpec`."""
        assert isinstance(spec, PruneTermSpec)  # noqa: S101  registered for this spec
        return cls.from_facts(spec.model_dump(exclude={"type"}), geometry)

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Self:
        """Make the term again."""
        return cls(geometry, **facts)

    def facts(self) -> Facts:
        """What the spec says."""
        return {
            "norm": self.norm,
            "form": "penalty" if self.penalty else "constraint",
            "group": self.group,
            "keep_fraction": self.keep_fraction,
            "alpha": self.alpha,
            "joint": self.joint,
            "unpack": self.unpack,
        }

    @property
    def form(self) -> Form:
        """Pruned."""
        return Form.PRUNED

    @property
    def key(self) -> object:
        """What is kept or left out together."""
        return ("prune", self.group)

    @property
    def composed(self) -> bool:
        """Single weights, and slices where there is no smaller operator."""
        if self.group == "weight":
            return True
        if self.geometry.kind == "embedding":
            return self.group == "channel"  # rows are picked by their number: a smaller table would need a map
        return self.geometry.kind not in _OPERATORS or self.geometry.groups > 1

    @property
    def graded(self) -> bool:
        """Under an ℓ₀ constraint of its own."""
        return self.norm == "l0" and not self.penalty and not self.joint

    @property
    def units_max(self) -> int:
        """Everything."""
        return self.count

    def units_asked(self, spec: Any) -> tuple[int, int] | None:  # noqa: ARG002
        """κ of a fraction; nothing where a radius, a penalty or the selection chooses it."""
        if self.keep_fraction is None or self.norm == "l1":
            return None
        return self._asked(self.count), self._asked(self.count)

    def counts_at(self, units: int) -> Counts:
        """Counts at a number of units: exact for slices; for single weights no pattern stores more."""
        if self.group == "weight":
            return self._counts(units, 8 * index_bound(units, self.count)) if units else Counts()
        return self._counts(units, units * slice_index_bits(self.count))

    def least_counts(self, low: int) -> Counts:
        """Counts at the lowest number."""
        return self.counts_at(low)

    def counts(self, theta: Kept) -> Counts:
        """Counts of what is stored."""
        if self.group != "weight" or not theta.units:
            return self.counts_at(theta.units)
        return self._counts(theta.units, 8 * theta.index.stored_bytes)

    def details(self, theta: Kept) -> Facts:
        """How much is kept, and what its positions cost."""
        kept = {"group": self.group, "kept": theta.units, "kept_fraction": theta.units / self.count}
        if self.group != "weight":
            return {**kept, "index": "list", "index_bits": theta.units * slice_index_bits(self.count)}
        return {**kept, "index": theta.index.kind, "index_bits": 8 * theta.index.stored_bytes}

    def energies(self, residual: Tensor) -> Tensor:
        """w², or squared norms of the groups."""
        return falling(self._energies(residual).to(torch.float64))

    def empty(self, like: Tensor) -> Kept:
        """Nothing kept."""
        positions = torch.zeros(0, dtype=self._position_dtype, device=like.device)
        shape = [0] if self.group == "weight" else self._sliced(0)
        return Kept(like.new_zeros(shape, dtype=torch.float64), positions, self.count)

    def own_penalty(self, theta: Kept, ask: Ask) -> float:
        """(2/μ)·α times the number of what is kept, or the sum of its norms."""
        if not self.penalty or isinf(ask.mu):
            return 0.0
        size = float(theta.units) if self.norm == "l0" else float(self._norms_of(theta).sum())
        return 2 * (self.alpha or 0.0) / ask.mu * size

    def fit(self, residual: Tensor, ask: Ask, warm: Kept | None = None) -> Kept:
        """Closed form: the largest, those above a threshold, or the projection onto the ball."""
        energies = self._energies(residual)
        if self.penalty:
            return self._fit_penalty(residual, energies, ask)
        if self.norm == "l1":
            radius = warm.radius if warm is not None and warm.radius is not None else self._radius([energies])
            made = self._in_ball(residual, energies, radius, ask.high)
            if self.joint and (warm is None or warm.radius is None):
                return made  # a shared radius is set by all layers together, at their first C step
            return replace(made, radius=radius)
        if ask.low == ask.high:
            return self._take(residual, largest(energies, ask.low))
        number = number_above(energies, ask.low, ask.high, *self._prices(ask))
        return self._take(residual, largest(energies, number))

    @classmethod
    def fit_joint(
        cls, terms: Sequence[Self], residuals: Sequence[Tensor], asks: Sequence[Ask], warm: Sequence[Any] | None
    ) -> list[Kept]:
        """One κ or radius for all layers; a penalty is one threshold anyway."""
        starts = list(warm) if warm is not None else [None] * len(terms)
        triples = list(zip(terms, residuals, asks, starts, strict=True))
        first = terms[0]
        if first.penalty:
            return [term.fit(residual, ask, start) for term, residual, ask, start in triples]
        device = residuals[0].device
        parts = [term._energies(residual).to(device) for term, residual in zip(terms, residuals, strict=True)]
        energies = torch.cat(parts)
        if first.norm == "l1":
            known = [start.radius for start in starts if start is not None and start.radius is not None]
            radius = known[0] if known else first._radius(parts)
            shrinkage = ball_threshold(energies.sqrt(), radius)
            made = [term._shrunk(residual, shrinkage) for term, residual, _, _ in triples]
            return [replace(theta, radius=radius) for theta in made]
        chosen = torch.zeros(energies.numel(), dtype=torch.bool, device=device)
        chosen[largest(energies, first._asked(energies.numel()))] = True
        masks = torch.split(chosen, [part.numel() for part in parts])
        return [
            term._take(residual, mask.nonzero().reshape(-1).to(residual.device))
            for term, residual, mask in zip(terms, residuals, masks, strict=True)
        ]

    def project(self, theta: Kept) -> Tensor:
        """Zeros, and what is kept in its places."""
        shape = self.geometry.weight_shape
        if self.group == "weight":
            flat = theta.values.new_zeros(self.count)
            return flat.index_copy(0, theta.positions.long(), theta.values).reshape(shape)
        return theta.values.new_zeros(shape).index_copy(self.axis, theta.positions.long(), theta.values)

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Kept:
        """Values and positions, or zeros of their shapes."""
        if tensors:
            return Kept(tensors["values"], tensors["positions"], facts["count"], facts["radius"])
        positions = torch.zeros(facts["kept"], dtype=self._position_dtype)
        layout = PackedIndex(*facts["index"])
        return Kept(torch.zeros(facts["values"]), positions, facts["count"], facts["radius"], layout)

    def emit(self, theta: Kept, bias: Tensor | None) -> nn.Module:
        """Emit a smaller operator, and its outputs put in their places or its inputs picked."""
        values, index = theta.values.detach(), theta.positions.to(slice_index_dtype(self.count))
        make = emit_outputs_kept if self.group == "filter" else emit_inputs_kept
        return make(self.geometry, values, index, bias)

    def emit_weight(self, theta: Kept) -> nn.Module:
        """Values as parameters, positions packed."""
        values = theta.values.detach().clone().contiguous()
        if self.group != "weight":
            index = theta.positions.to(slice_index_dtype(self.count))
            return SlicedWeight(values, index, axis=self.axis, length=self.count)
        layout = theta.index
        if theta.layout is None:
            packed = pack_index(theta.positions, layout)
        else:
            packed = torch.zeros(layout.stored_bytes, dtype=torch.uint8)
        shape = list(self.geometry.weight_shape)
        module = SparseWeight(values, packed, bits=layout.bits, entries=layout.entries, shape=shape)
        return unpacked(module, self.unpack)

    # --- sizes ------------------------------------------------------------------------------------------------------

    @property
    def _position_dtype(self) -> torch.dtype:
        return torch.int32 if self.count < 2**31 else torch.int64

    def _asked(self, count: int) -> int:
        return max(round((self.keep_fraction or 0.0) * count), 1)

    def _sliced(self, kept: int) -> list[int]:
        shape = list(self.geometry.weight_shape)
        shape[self.axis] = kept
        return shape

    def _counts(self, units: int, index_bits: int) -> Counts:
        params = units if self.group == "weight" else prod(self._sliced(units))
        macs = 0 if self.composed else self.geometry.dense_macs * units // self.count
        return Counts(params, macs, params * self.geometry.dtype_bits + index_bits)

    # --- fitting ----------------------------------------------------------------------------------------------------

    def _energies(self, residual: Tensor) -> Tensor:
        squares = residual.square()
        if self.group == "weight":
            return squares.reshape(-1)
        energies: Tensor = squares.movedim(self.axis, 0).reshape(self.count, -1).sum(dim=1)
        return energies

    def _norms_of(self, theta: Kept) -> Tensor:
        if self.group == "weight" or not theta.units:
            return theta.values.abs()
        norms: Tensor = theta.values.movedim(self.axis, 0).reshape(theta.units, -1).norm(dim=1)
        return norms

    def _radius(self, energies: Sequence[Tensor]) -> float:
        return (self.keep_fraction or 0.0) * sum(float(each.sqrt().sum()) for each in energies)

    def _prices(self, ask: Ask) -> tuple[Any, Any]:
        """Price of a number of units at the usual size of an index, and of one more: the tangent."""
        plain = self._counts(1, 0)
        unit = ask.pressure * ask.price(plain)
        bit = ask.pressure * ask.price(Counts(bits=1))
        if self.group != "weight":
            unit += bit * slice_index_bits(self.count)
            return (lambda number: unit * number), (lambda _: unit)

        def gap_bits(number: int) -> float:
            return log2(self.count / max(number, 1)) + _GAP_OVERHEAD_BITS

        def total(number: int) -> float:
            return unit * number + bit * min(number * gap_bits(number), self.count if number else 0)

        def one_more(number: int) -> float:
            bitmap = number * gap_bits(number) >= self.count
            return unit + (0.0 if bitmap else bit * max(gap_bits(number) - 1 / 0.6931471805599453, 0.0))

        return total, one_more

    def _fit_penalty(self, residual: Tensor, energies: Tensor, ask: Ask) -> Kept:
        """Threshold at √(2α/μ), or shrinkage by α/μ; what a unit costs beside raises the threshold."""
        weight = 0.0 if isinf(ask.mu) else (self.alpha or 0.0) / ask.mu
        own = 2 * weight if self.norm == "l0" else 0.0
        shrinkage = 0.0 if self.norm == "l0" else weight
        gains = (energies.sqrt() - shrinkage).clamp(min=0).square() if shrinkage else energies
        total, one_more = self._prices(ask)
        number = number_above(
            gains, ask.low, ask.high, lambda number: total(number) + own * number, lambda number: one_more(number) + own
        )
        return self._take(residual, largest(gains, number), shrinkage)

    def _in_ball(self, residual: Tensor, energies: Tensor, radius: float, high: int) -> Kept:
        """Project onto the ball, among weights of which at most `high` are not zero (Kyrillidis et al. 2013)."""
        places = largest(energies, min(high, self.count))
        norms = energies[places].sqrt()
        shrinkage = ball_threshold(norms, radius)
        places = places[norms > shrinkage]
        return self._take(residual, places, shrinkage)

    def _shrunk(self, residual: Tensor, shrinkage: float) -> Kept:
        places = (self._energies(residual).sqrt() > shrinkage).nonzero().reshape(-1)
        return self._take(residual, places, shrinkage)

    def _take(self, residual: Tensor, places: Tensor, shrinkage: float = 0.0) -> Kept:
        axis, whole = (0, residual.reshape(-1)) if self.group == "weight" else (self.axis, residual)
        values = whole.index_select(axis, places).to(torch.float64)
        if shrinkage and places.numel():
            rows = values.movedim(axis, 0).reshape(places.numel(), -1)
            norms = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            shrunk = (rows * (1 - shrinkage / norms).clamp(min=0)).reshape(values.movedim(axis, 0).shape)
            values = shrunk.movedim(0, axis).contiguous()  # as it is once it was saved: products may round otherwise
        return Kept(values, places.to(self._position_dtype), self.count)
