"""A low-rank term: its set under one reshape, its C step, its counts, and the plain module it becomes (methods L.3)."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.terms import LowRankTermSpec, NamedReshape
from worker.engine.csteps.group_spectrum import group_energies, group_spectrum
from worker.engine.csteps.spectrum import energies_of, least_objective, select_rank
from worker.engine.csteps.warm import best_factors
from worker.engine.forms.factor_operators import Source
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import CONVOLUTIONS, TRANSPOSED, Geometry, Shape
from worker.engine.forms.low_rank_convolution import ConvolutionChain
from worker.engine.forms.low_rank_linear import EmbeddingChain, LinearChain
from worker.engine.forms.modules import ComposedOfModules, ComposedWeight, Factor
from worker.engine.forms.reshape import Reshape, Split, compose, named_reshape, reshape_of
from worker.engine.forms.term import Ask, Counts, Facts, NotApplicableError, Term
from worker.engine.forms.unpacked import UnpackedOnce

STORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CAST_OVERHEAD_BYTES = 1024  # two modules that cast; measured on emitted files
_FORMS: tuple[tuple[NamedReshape, Form], ...] = (
    ("matrix", Form.MATRIX),
    ("channel", Form.CHANNEL),
    ("spatial", Form.SPATIAL),
    ("spatial_transposed", Form.SPATIAL_TRANSPOSED),
    ("chunked", Form.CHUNKED),
)


class Chain(Protocol):
    """Two small operators that compute a low-rank term."""

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""

    def emit(self, left: Source, right: Source, rank: int, bias: nn.Parameter | None) -> nn.Module:
        """Make the module input → output; the bias goes on the last factor."""


class LowRankTerm(Term):
    """One low-rank matrix under one reshape of one layer's weight, or one of each group with a common rank.

    Where rows and columns of the matrix follow the weight's own axes the term is computed by two small operators
    in a chain; otherwise its weight is composed at each call and its multiply-adds stay those of the dense layer.

    Parameters
    ----------
    reshape : Reshape
        The reshape R of the term; of one group's weight where `groups` is above 1.
    geometry : Geometry
        The layer.
    groups : int
        Number of matrices: 1, or the convolution's groups.
    store_dtype : "float16" or "bfloat16", optional
        How the factors are stored; None is the layer's own dtype.
    place : int, optional
        Which of a layer's several reshapes it is; its Θ carry it.
    """

    type_name: ClassVar[str] = "low_rank"
    takes_float32: ClassVar[bool] = True

    def __init__(
        self,
        reshape: Reshape,
        geometry: Geometry,
        *,
        groups: int = 1,
        store_dtype: str | None = None,
        place: int | None = None,
    ) -> None:
        self.reshape = reshape
        self.geometry = geometry
        self.groups = groups
        self.store_dtype = store_dtype
        self.place = place
        self.block = _block(geometry, groups)
        split = reshape.split(self.block)
        self._key = (groups, reshape.key(self.block))
        self._chain = _chain(split, geometry, self.block, groups)
        self._form = self._name(split)
        self.rank_max = min(reshape.matrix)

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Term:
        """Make the term of a `LowRankTermSpec` that names one reshape."""
        assert isinstance(spec, LowRankTermSpec)  # noqa: S101  registered for this spec
        transposed = geometry.kind in TRANSPOSED
        for groups in dict.fromkeys((geometry.groups, 1) if not isinstance(spec.reshape, str) else (geometry.groups,)):
            reshape = reshape_of(spec, _block(geometry, groups), transposed=transposed)
            if reshape is not None:
                return cls(reshape, geometry, groups=groups, store_dtype=spec.store_dtype)
        form = Form(spec.reshape) if isinstance(spec.reshape, str) else Form.COMPOSED
        raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, form)

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Term:
        """Make the term of a reshape."""
        p, q = facts["matrix"]
        reshape = Reshape(tuple(facts["view"]), tuple(facts["permute"]), (p, q))
        return cls(reshape, geometry, groups=facts["groups"], store_dtype=facts["store_dtype"])

    def facts(self) -> Facts:
        """The reshape, the groups, how factors are stored."""
        reshape = self.reshape
        return {
            "view": list(reshape.view),
            "permute": list(reshape.permute),
            "matrix": list(reshape.matrix),
            "groups": self.groups,
            "store_dtype": self.store_dtype,
        }

    @property
    def form(self) -> Form:
        """As the reshape and the layer have it."""
        return self._form

    @property
    def key(self) -> object:
        """The set of low-rank matrices under the reshape."""
        return self._key

    @property
    def composed(self) -> bool:
        """Whether the multiply-adds stay those of the dense layer."""
        return self._chain is None

    @property
    def graded(self) -> bool:
        """Ranks are chosen one by one by σ²."""
        return True

    @property
    def units_max(self) -> int:
        """The full rank."""
        return self.rank_max

    def units_asked(self, spec: Any) -> tuple[int, int] | None:
        """The rank, or its bounds."""
        if spec.rank is not None:
            return spec.rank, spec.rank
        if spec.min_rank is None and spec.max_rank is None:
            return None
        return spec.min_rank or 0, self.rank_max if spec.max_rank is None else spec.max_rank

    def counts_at(self, units: int) -> Counts:
        """Counts at a rank."""
        params = units * self.params_per_rank
        return Counts(params, units * self.macs_per_rank, params * self.bits_per_param)

    def least_counts(self, low: int) -> Counts:
        """Counts at the lowest rank."""
        return self.counts_at(low)

    @property
    def bits_per_param(self) -> int:
        """Bits of one stored number of the factors."""
        return self.geometry.dtype_bits if self.store_dtype is None else 16

    @property
    def overhead_bytes(self) -> int:
        """More where factors are cast at each call."""
        return super().overhead_bytes + (0 if self.store_dtype is None else CAST_OVERHEAD_BYTES)

    @property
    def params_per_rank(self) -> int:
        """Parameters that one more rank costs: p + q in each group."""
        return self.groups * sum(self.reshape.matrix)

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""
        return 0 if self._chain is None else self._chain.macs_per_rank  # a weight is composed once, not at each call

    def energies(self, residual: Tensor) -> Tensor:
        """σ² of the residual's matrix, summed over the groups."""
        if self.groups > 1:
            return group_energies(self.reshape.to_matrices(residual, self.groups))
        return energies_of(self.reshape.to_matrix(residual))

    def empty(self, like: Tensor) -> Factors:
        """Factors of rank 0."""
        (p, q), lead = self.reshape.matrix, self._lead
        made = [like.new_zeros((*lead, *shape), dtype=torch.float64) for shape in ((p, 0), (0, q))]
        return Factors(made[0], made[1], self.place)

    def fit(self, residual: Tensor, ask: Ask, warm: Factors | None = None) -> Factors:
        """Closed form: the pairs above the threshold, within the bounds (methods L.2)."""
        return self._stored(self._fitted(residual, ask, warm))

    def least_objective(self, residual: Tensor, ask: Ask) -> float:
        """By the energies alone; where the groups of a layer share the rank there is no bound."""
        if self.groups > 1:
            return float("-inf")
        threshold = ask.pressure * ask.price(self.counts_at(1))
        return least_objective(self.reshape.to_matrix(residual), threshold, ask.low, ask.high, ask.accuracy)

    def _fitted(self, residual: Tensor, ask: Ask, warm: Factors | None) -> Factors:
        threshold = ask.pressure * ask.price(self.counts_at(1))
        if self.groups > 1:
            whole = group_spectrum(self.reshape.to_matrices(residual, self.groups))
            return whole.factors(select_rank(whole.energies, threshold, ask.low, ask.high))
        matrix = self.reshape.to_matrix(residual)
        return best_factors(matrix, threshold, ask.low, ask.high, ask.accuracy, warm)

    def _stored(self, factors: Factors) -> Factors:
        """Round to the dtype of the file, so that what the loop pulls towards is what is stored."""
        if self.store_dtype is None:
            return replace(factors, place=self.place)
        dtype = STORE_DTYPES[self.store_dtype]
        left, right = (value.to(dtype).to(value.dtype) for value in (factors.left, factors.right))
        return Factors(left, right, self.place)

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Factors:
        """Factors of a rank."""
        if tensors:
            return Factors(tensors["left"], tensors["right"], self.place)
        (p, q), rank = self.reshape.matrix, facts["rank"]
        return Factors(torch.zeros(*self._lead, p, rank), torch.zeros(*self._lead, rank, q), self.place)

    def at_place(self, place: int) -> "LowRankTerm":
        """Return the same term as one of several reshapes."""
        return LowRankTerm(self.reshape, self.geometry, groups=self.groups, store_dtype=self.store_dtype, place=place)

    def project(self, factors: Factors) -> Tensor:
        """Dense weight that the factors stand for."""
        shape = self.geometry.weight_shape
        if self.groups > 1:
            return self.reshape.to_weight_of_groups(torch.matmul(factors.left, factors.right), shape)
        return compose(factors.left, factors.right, self.reshape, shape)

    def emit(self, factors: Factors, bias: Tensor | None) -> nn.Module:
        """Make the plain module of the term; `bias` goes on its last factor.

        Parameters
        ----------
        factors : Factors
            At rank r ≥ 1, of the layer's dtype.
        bias : Tensor or None
            ``(m,)``, given to exactly one term of a sum.
        """
        return self.emit_of(*self._sources(factors), factors.rank, bias)

    def emit_weight(self, factors: Factors) -> nn.Module:
        """Make the module that rebuilds the weight from the factors, once for evaluation."""
        left, right = self._sources(factors)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            clones = [value.detach().clone(memory_format=torch.contiguous_format) for value in (left, right)]
            return UnpackedOnce(ComposedWeight(clones[0], clones[1], **self._composition()))
        assert isinstance(left, nn.Module)  # noqa: S101  both come from the same place
        assert isinstance(right, nn.Module)  # noqa: S101
        return self.emit_weight_of(left, right)

    def emit_of(self, left: Source, right: Source, rank: int, bias: Tensor | None) -> nn.Module:
        """As `emit`, of factors that may be modules whose ``forward()`` gives them.

        Raises
        ------
        NotImplementedError
            The term is composed.
        """
        if self._chain is None:
            raise NotImplementedError
        with torch.no_grad():
            parameter = None if bias is None else nn.Parameter(bias.detach().clone())
            return self._chain.emit(left, right, rank, parameter)

    def emit_weight_of(self, left: nn.Module, right: nn.Module) -> nn.Module:
        """As `emit_weight`, of modules whose ``forward()`` gives the factors."""
        return UnpackedOnce(ComposedOfModules(left, right, **self._composition()))

    @property
    def _lead(self) -> tuple[int, ...]:
        return (self.groups,) if self.groups > 1 else ()

    def _sources(self, factors: Factors) -> tuple[Source, Source]:
        if self.store_dtype is None:
            return factors.left, factors.right
        dtype = STORE_DTYPES[self.store_dtype]
        left, right = (Factor(value.to(dtype), value.dtype) for value in (factors.left, factors.right))
        return left, right

    def _composition(self) -> dict[str, list[int]]:
        """How the product of the factors becomes the weight."""
        reshape, groups = self.reshape, list(self._lead)
        permute = [*range(len(groups)), *(axis + len(groups) for axis in reshape.permute)]
        view = [*groups, *reshape.view]
        return {
            "permuted": [view[axis] for axis in permute],
            "inverse": [permute.index(axis) for axis in range(len(permute))],
            "weight_shape": list(self.geometry.weight_shape),
        }

    def _name(self, split: Split | None) -> Form:
        if self._chain is None or split is None:
            return Form.COMPOSED
        if self.geometry.kind == "embedding":
            return Form.EMBEDDING
        key, transposed = self.reshape.key(self.block), self.geometry.kind in TRANSPOSED
        for name, form in _FORMS:
            named = named_reshape(name, self.block, transposed=transposed)
            if named is not None and named.key(self.block) == key:
                return form
        pair = [prod(each.size for each in split[0] if each.axis == axis) for axis in (0, 1)]
        kronecker = named_reshape("kronecker", self.block, kronecker=(pair[0], pair[1]))
        if self.geometry.kind in {"linear", "matmul"} and sum(len(side) for side in split) == 3:
            return Form.CHUNKED
        parted = all(1 < part < size for part, size in zip(pair, self.block, strict=False))
        if parted and kronecker is not None and kronecker.key(self.block) == key:
            return Form.KRONECKER
        return Form.CONTRACTED

    def params(self, rank: int) -> int:
        """Parameters at a rank."""
        return rank * self.params_per_rank

    def macs(self, rank: int) -> int:
        """Multiply-adds at a rank; a composed term keeps those of the dense layer."""
        if rank == 0:
            return 0
        return rank * self.macs_per_rank + (self.geometry.dense_macs if self.composed else 0)


def _block(geometry: Geometry, groups: int) -> Shape:
    """Shape of one group's weight."""
    return (geometry.weight_shape[0] // groups, *geometry.weight_shape[1:])


def _chain(split: Split | None, geometry: Geometry, block: Shape, groups: int) -> Chain | None:
    """Operators that compute a term, or None where its weight must be composed."""
    if split is None:
        return None
    if geometry.kind in {"linear", "matmul"}:
        return LinearChain(split, geometry)
    if geometry.kind == "embedding":
        whole = all({axis.axis for axis in side} in ({0}, {1}) for side in split)
        return EmbeddingChain(split, geometry) if whole else None
    if geometry.kind not in (*CONVOLUTIONS, *TRANSPOSED) or groups != geometry.groups:
        return None
    try:
        return ConvolutionChain(split, geometry, block)
    except ValueError:
        return None
