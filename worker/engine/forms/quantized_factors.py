"""A low-rank term whose factors are quantized: a composition of two compressions (methods L.4)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from service.contract.terms import LowRankTermSpec, QuantizeTermSpec
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Geometry, Shape
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.quantized import Codes, QuantizeTerm
from worker.engine.forms.reshape import Reshape
from worker.engine.forms.term import COMPOSED_OVERHEAD_BYTES, Accuracy, Ask, Counts, Facts, Term

ROUNDS_MAX = 3  # of fitting each factor to the other's quantized values
RIDGE_RELATIVE = 1e-9
SMALLEST = 1e-30


@dataclass(frozen=True)
class QuantizedFactors:
    """Θ of a low-rank term with quantized factors.

    Parameters
    ----------
    left, right : Codes
        Of the factors ``(p, r)`` and ``(r, q)``.
    rank : int
        r.
    place : int, optional
        Which of several reshapes they belong to, where the term chooses one.
    """

    left: Codes
    right: Codes
    rank: int
    place: int | None = None

    @property
    def units(self) -> int:
        """The rank."""
        return self.rank

    def tensors(self) -> dict[str, Tensor]:
        """Values and codes of both."""
        sides = {"left": self.left, "right": self.right}
        return {f"{side}_{name}": each for side, codes in sides.items() for name, each in codes.tensors().items()}

    def facts(self) -> Facts:
        """The rank, the choice of the reshape, shapes of both."""
        place = {} if self.place is None else {"place": self.place}
        return {"rank": self.rank, "left": self.left.facts(), "right": self.right.facts()} | place


class QuantizedFactorsTerm(LowRankTerm):
    """One low-rank matrix under one reshape, stored as codes.

    The rank is chosen by the energies, as if the factors were not quantized, at the price of their codes; then each
    factor in turn is fitted to the other's quantized values and quantized again, as long as the error falls.

    Parameters
    ----------
    reshape, geometry, groups, place
        As of the low-rank term.
    then : QuantizeTermSpec
        How the factors are quantized, each with values of its own.
    """

    def __init__(
        self,
        reshape: Reshape,
        geometry: Geometry,
        then: QuantizeTermSpec,
        *,
        groups: int = 1,
        place: int | None = None,
    ) -> None:
        super().__init__(reshape, geometry, groups=groups, place=place)
        self.then = then

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Term:
        """Make the term of a `LowRankTermSpec` that has `then`."""
        assert isinstance(spec, LowRankTermSpec)  # noqa: S101  registered for this spec
        assert spec.then is not None  # noqa: S101
        plain = LowRankTerm.from_spec(spec, geometry)
        assert isinstance(plain, LowRankTerm)  # noqa: S101
        return cls(plain.reshape, geometry, spec.then, groups=plain.groups)

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Term:
        """Make the term again."""
        plain = LowRankTerm.from_facts(facts, geometry)
        assert isinstance(plain, LowRankTerm)  # noqa: S101
        return cls(plain.reshape, geometry, QuantizeTermSpec.model_validate(facts["then"]), groups=plain.groups)

    def facts(self) -> Facts:
        """As of the low-rank term, and how factors are quantized."""
        return super().facts() | {"then": self.then.model_dump(mode="json")}

    def at_place(self, place: int) -> "QuantizedFactorsTerm":
        """Return the same term as one of several reshapes."""
        return QuantizedFactorsTerm(self.reshape, self.geometry, self.then, groups=self.groups, place=place)

    @property
    def overhead_bytes(self) -> int:
        """Two packed factors."""
        return 2 * COMPOSED_OVERHEAD_BYTES

    def counts_at(self, units: int) -> Counts:
        """Counts at a rank: codes and values of both factors."""
        if units == 0:
            return Counts()
        sides = self._quantizers(units)
        stored = [side.least_counts(side.units_max) for side in sides]
        return Counts(
            sum(each.params for each in stored), units * self.macs_per_rank, sum(each.bits for each in stored)
        )

    def details(self, theta: Any) -> Facts:
        """Scheme and number of values of each factor."""
        return {"scheme": self.then.scheme, "values": [theta.left.size, theta.right.size]}

    def empty(self, like: Tensor) -> Any:
        """Rank 0."""
        return self._none(like.device)

    def fit(self, residual: Tensor, ask: Ask, warm: Any = None) -> Any:
        """Make the C step: the rank, then factors from the singular vectors or from the Θ before."""
        residual = residual.to(torch.float64)
        rank = self._select(residual, ask)
        if rank == 0:
            return self.empty(residual)
        matrix = self._matrices(residual)
        same = warm is not None and warm.rank == rank
        starts = []
        if not (same and ask.accuracy is Accuracy.WARM):
            plain = super().fit(residual, replace(ask, low=rank, high=rank))
            before = (None, None) if warm is None or warm.rank == 0 else (warm.left, warm.right)
            left, right = (
                self._quantize(factor, rank, side, start)
                for side, (factor, start) in enumerate(zip((plain.left, plain.right), before, strict=True))
            )
            starts.append((left, right))
        if same:
            left, right = (replace(each, values=each.values.to(residual)) for each in (warm.left, warm.right))
            starts.append((left, right))
        made = [self._alternate(matrix, left, right, rank) for left, right in starts]
        _, left, right = min(made, key=lambda each: each[0])
        return QuantizedFactors(left, right, rank, self.place)

    def project(self, theta: Any) -> Tensor:
        """Δ(Θ) of the values that the codes stand for."""
        return super().project(self._plain(theta))

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Any:
        """Codes of both factors."""
        if facts["rank"] == 0:
            return self._none(torch.device("cpu"))
        sides = []
        for side, quantizer in zip(("left", "right"), self._quantizers(facts["rank"]), strict=True):
            own = {name: tensors[f"{side}_{name}"] for name in ("values", "codes")} if tensors else {}
            sides.append(quantizer.restore(own, facts[side]))
        return QuantizedFactors(sides[0], sides[1], facts["rank"], self.place)

    def emit(self, theta: Any, bias: Tensor | None) -> nn.Module:
        """As the low-rank term, with modules that unpack the factors."""
        return self.emit_of(*self._modules(theta), theta.rank, bias)

    def emit_weight(self, theta: Any) -> nn.Module:
        """As the low-rank term, with modules that unpack the factors."""
        return self.emit_weight_of(*self._modules(theta))

    def _quantizers(self, rank: int) -> tuple[QuantizeTerm, QuantizeTerm]:
        return self._quantizer(rank, 0), self._quantizer(rank, 1)

    def _quantizer(self, rank: int, side: int) -> QuantizeTerm:
        (p, q), lead = self.reshape.matrix, (self.groups,) if self.groups > 1 else ()
        shape: Shape = (*lead, p, rank) if side == 0 else (*lead, rank, q)
        return QuantizeTerm.from_spec(self.then, Geometry("parameter", shape, (), dtype_bits=self.geometry.dtype_bits))

    def _quantize(self, factor: Tensor, rank: int, side: int, start: Codes | None) -> Codes:
        """Quantize a factor from the values before or its quantiles: what is best for one is not for both."""
        quantizer = self._quantizer(rank, side)
        size = quantizer.units_max
        if start is None and self.then.scheme == "codebook":
            values = factor.reshape(-1).sort().values
            places = torch.linspace(0, values.shape[0] - 1, size, device=values.device).round().long()
            start = Codes(values[places][None], torch.zeros(1, 1, dtype=torch.uint8, device=values.device), size)
        return quantizer.fit(factor, Ask(0.0, size, size, accuracy=Accuracy.WARM), start)

    def _plain(self, theta: QuantizedFactors) -> Factors:
        """The factors that codes stand for."""
        if theta.rank == 0:
            return super().empty(theta.left.values)
        left, right = self._quantizers(theta.rank)
        return Factors(left.project(theta.left), right.project(theta.right), theta.place)

    def _modules(self, theta: QuantizedFactors) -> tuple[nn.Module, nn.Module]:
        left, right = self._quantizers(theta.rank)
        return left.emit_weight(theta.left), right.emit_weight(theta.right)

    def _none(self, device: torch.device) -> QuantizedFactors:
        nothing = Codes(
            torch.zeros(1, 0, dtype=torch.float64, device=device), torch.zeros(0, dtype=torch.uint8, device=device), 0
        )
        return QuantizedFactors(nothing, nothing, 0, self.place)

    def _matrices(self, residual: Tensor) -> Tensor:
        if self.groups > 1:
            return self.reshape.to_matrices(residual, self.groups)
        return self.reshape.to_matrix(residual)

    def least_objective(self, residual: Tensor, ask: Ask) -> float:
        """By the energies alone; quantizing only adds to the error."""
        totals = self._totals(residual.to(torch.float64), ask)
        return min(totals.values())

    def _select(self, residual: Tensor, ask: Ask) -> int:
        """Rank of least pressure·C + Σ of the energies that are left."""
        if ask.low == ask.high:
            return ask.high
        totals = self._totals(residual, ask)
        return min(totals, key=totals.__getitem__)

    def _totals(self, residual: Tensor, ask: Ask) -> dict[int, float]:
        """Pressure·C + Σ of the energies that are left, at every rank within the bounds."""
        energies = self.energies(residual)
        left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
        high = min(ask.high, self.rank_max)
        errors = left.tolist()
        ranks = range(min(ask.low, high), high + 1)
        return {rank: ask.pressure * ask.price(self.counts_at(rank)) + errors[rank] for rank in ranks}

    def _alternate(self, matrix: Tensor, left: Codes, right: Codes, rank: int) -> tuple[float, Codes, Codes]:
        """Fit each factor to the other and quantize it, as long as the error falls."""
        of_left, of_right = self._quantizers(rank)
        best = (_error(matrix, of_left.project(left), of_right.project(right)), left, right)
        for _ in range(ROUNDS_MAX):
            right = self._quantize(_solved(of_left.project(best[1]), matrix), rank, 1, best[2])
            left = self._quantize(_solved(of_right.project(right).mT, matrix.mT).mT, rank, 0, best[1])
            made = (_error(matrix, of_left.project(left), of_right.project(right)), left, right)
            if made[0] >= best[0]:
                break
            best = made
        return best


def _solved(basis: Tensor, matrix: Tensor) -> Tensor:
    """Least squares ‖matrix − basis·X‖²; the ridge keeps columns of equal codes apart."""
    gram = basis.mT @ basis
    ridge = RIDGE_RELATIVE * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].clamp_min(SMALLEST)
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1]).to(gram), basis.mT @ matrix)
    return solved


def _error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    return float((matrix - left @ right).square().sum())
