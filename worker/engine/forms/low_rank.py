"""A low-rank term: its cost per rank, and the plain module that its factors become (methods L.3)."""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.terms import LowRankTermSpec
from worker.engine.csteps.spectrum import energies_of, leading_spectrum, select_rank
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Geometry, Pair
from worker.engine.forms.modules import (
    ComposedConv2d,
    ComposedLinear,
    ComposedWeight,
    ContractedLinear,
    SharedDepthwise,
)
from worker.engine.forms.reshape import HEIGHT, IN, OUT, WIDTH, Reshape, SubAxis, compose, named_reshape, reshape_of
from worker.engine.forms.term import Ask, Counts, Facts, NotApplicableError, Term

Split = tuple[tuple[SubAxis, ...], tuple[SubAxis, ...]]


class LowRankTerm(Term):
    """One low-rank matrix under one reshape of one layer's weight.

    Where rows and columns of the matrix follow the weight's own axes the term is computed by two small operators
    in a chain; otherwise its weight is composed at each call and its multiply-adds stay those of the dense layer.

    Parameters
    ----------
    reshape : Reshape
        The reshape R of the term.
    geometry : Geometry
        The layer.
    """

    type_name: ClassVar[str] = "low_rank"

    def __init__(self, reshape: Reshape, geometry: Geometry) -> None:
        self.reshape = reshape
        self.geometry = geometry
        self._key = reshape.key(geometry.weight_shape)
        self._split = self._contraction()
        self._form = self._name()
        self.rank_max = min(reshape.matrix)

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Self:
        """Make the term of a `LowRankTermSpec`."""
        assert isinstance(spec, LowRankTermSpec)  # noqa: S101  registered for this spec
        reshape = reshape_of(spec, geometry.weight_shape)
        if reshape is None:
            form = Form(spec.reshape) if isinstance(spec.reshape, str) else Form.COMPOSED
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, form)
        return cls(reshape, geometry)

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Self:
        """Make the term of a reshape."""
        p, q = facts["matrix"]
        return cls(Reshape(tuple(facts["view"]), tuple(facts["permute"]), (p, q)), geometry)

    def facts(self) -> Facts:
        """The reshape."""
        reshape = self.reshape
        return {"view": list(reshape.view), "permute": list(reshape.permute), "matrix": list(reshape.matrix)}

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
        return self._split is None

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
        """Counts at a rank; those of composing are part of its multiply-adds."""
        params = units * self.params_per_rank
        return Counts(params, units * self.macs_per_rank, params * self.geometry.dtype_bits)

    def least_counts(self, low: int) -> Counts:
        """Counts at the lowest rank."""
        return self.counts_at(low)

    def energies(self, residual: Tensor) -> Tensor:
        """σ² of the residual's matrix."""
        return energies_of(self.reshape.to_matrix(residual))

    def empty(self, like: Tensor) -> Factors:
        """Factors of rank 0."""
        p, q = self.reshape.matrix
        return Factors(like.new_zeros((p, 0), dtype=torch.float64), like.new_zeros((0, q), dtype=torch.float64))

    def fit(self, residual: Tensor, ask: Ask, warm: Factors | None = None) -> Factors:  # noqa: ARG002
        """Closed form: the pairs above the threshold, within the bounds (methods L.2)."""
        matrix = self.reshape.to_matrix(residual)
        if ask.low == ask.high:
            return leading_spectrum(matrix, at_most=ask.high).factors(ask.high)
        threshold = ask.pressure * ask.price(self.counts_at(1))
        spectrum = leading_spectrum(matrix, above=threshold)
        rank = select_rank(spectrum.energies, threshold, ask.low, ask.high)
        if rank > spectrum.energies.shape[0]:
            spectrum = leading_spectrum(matrix, at_most=rank)
        return spectrum.factors(rank)

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Factors:
        """Factors of a rank."""
        if tensors:
            return Factors(tensors["left"], tensors["right"])
        (p, q), rank = self.reshape.matrix, facts["rank"]
        return Factors(torch.zeros(p, rank), torch.zeros(rank, q))

    @property
    def params_per_rank(self) -> int:
        """Parameters that one more rank costs: p + q."""
        return sum(self.reshape.matrix)

    def params(self, rank: int) -> int:
        """Parameters at a rank."""
        return rank * self.params_per_rank

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""
        if self._split is None:
            return self.geometry.weight_params * len(self.geometry.calls)
        return self._linear_macs(self._split) if self.geometry.kind == "linear" else self._conv2d_macs(self._split)

    def macs(self, rank: int) -> int:
        """Multiply-adds at a rank; a composed term keeps those of the dense layer and adds those of composing."""
        if rank == 0:
            return 0
        return rank * self.macs_per_rank + (self.geometry.dense_macs if self.composed else 0)

    def project(self, factors: Factors) -> Tensor:
        """Dense weight that the factors stand for."""
        return compose(factors.left, factors.right, self.reshape, self.geometry.weight_shape)

    def emit(self, factors: Factors, bias: Tensor | None) -> nn.Module:
        """Make the plain module of the term; `bias` goes on its last factor.

        Parameters
        ----------
        factors : Factors
            At rank r ≥ 1, of the layer's dtype.
        bias : Tensor or None
            ``(m,)``, given to exactly one term of a sum.
        """
        with torch.no_grad():
            parameter = None if bias is None else nn.Parameter(bias.detach().clone())
            if self._split is None:
                return self._emit_composed(factors, parameter)
            if self.geometry.kind == "linear":
                return self._emit_linear(self._split, factors, parameter)
            return self._emit_conv2d(self._split, factors, parameter)

    def _contraction(self) -> Split | None:
        split = self.reshape.split(self.geometry.weight_shape)
        if split is None or self.geometry.kind == "linear":
            return split
        whole = all(axis.size == self.geometry.weight_shape[axis.axis] for side in split for axis in side)
        once = len([axis for side in split for axis in side]) == len(self.geometry.weight_shape)
        return split if whole and once else None  # a convolution contracts whole axes only

    def _name(self) -> Form:
        if self._split is None:
            return Form.COMPOSED
        shape = self.geometry.weight_shape
        for name, form in (
            ("matrix", Form.MATRIX),
            ("channel", Form.CHANNEL),
            ("spatial", Form.SPATIAL),
            ("spatial_transposed", Form.SPATIAL_TRANSPOSED),
            ("chunked", Form.CHUNKED),
        ):
            named = named_reshape(name, shape)  # type: ignore[arg-type]
            if named is not None and named.key(shape) == self.key:
                return form
        chunked = self.geometry.kind == "linear" and sum(len(side) for side in self._split) == 3
        return Form.CHUNKED if chunked else Form.CONTRACTED

    # --- linear -----------------------------------------------------------------------------------------------------

    def _linear_macs(self, split: Split) -> int:
        rows, columns = split
        kept, contracted = _size(rows, IN), _size(columns, IN)
        out_rows, out_columns = _size(rows, OUT), _size(columns, OUT)
        per_row = kept * out_columns * contracted + out_columns * kept * out_rows
        return per_row * sum(prod(call.input_shape[:-1]) for call in self.geometry.calls)

    def _emit_linear(self, split: Split, factors: Factors, bias: nn.Parameter | None) -> nn.Module:
        rows, columns = split
        rank = factors.rank
        plain = (_size(rows, OUT), _size(columns, IN)) == self.geometry.weight_shape
        in_r, in_c = [_sub_axes(side, IN) for side in split]
        out_r, out_c = [_sub_axes(side, OUT) for side in split]
        right = factors.right.reshape([rank] + [axis.size for axis in columns])
        right = right.permute([0] + [1 + columns.index(axis) for axis in (*out_c, *in_c)])
        right = right.reshape(rank, prod(a.size for a in out_c), -1).permute(1, 0, 2)  # (o_c, rank, i_c)
        left = factors.left.reshape([axis.size for axis in rows] + [rank])
        left = left.permute([rows.index(axis) for axis in (*out_r, *in_r)] + [len(rows)])
        if plain:
            return nn.Sequential(_linear(right.reshape(rank, -1)), _linear(left.reshape(-1, rank), bias))
        in_axes, out_axes = _sub_axes(rows + columns, IN), _sub_axes(rows + columns, OUT)
        out_order = [*out_c, *out_r]
        return ContractedLinear(
            _linear(right.reshape(-1, prod(a.size for a in in_c))),
            _linear(left.reshape(prod(a.size for a in out_r), -1)),
            bias,
            in_view=[axis.size for axis in in_axes],
            in_permute=[in_axes.index(axis) for axis in (*in_r, *in_c)],
            kept=prod(axis.size for axis in in_r),
            rank=rank,
            out_view=[axis.size for axis in out_order],
            out_permute=[out_order.index(axis) for axis in out_axes],
        )

    # --- 2-D convolution --------------------------------------------------------------------------------------------

    def _oriented(self, split: Split) -> tuple[set[int], bool]:
        """Axes of the first operator, and whether they are the matrix's columns; the second makes the outputs."""
        rows, columns = ({axis.axis for axis in side} for side in split)
        return (columns, True) if OUT in rows else (rows, False)

    def _conv2d_macs(self, split: Split) -> int:
        first, _ = self._oriented(split)
        n, c, kh, kw = self.geometry.weight_shape
        kernel = {HEIGHT: kh, WIDTH: kw}
        first_kernel = prod(kernel[axis] for axis in first & {HEIGHT, WIDTH})
        second_kernel = kh * kw // first_kernel
        second_inputs = 1 if IN in first else c
        total = 0
        for call in self.geometry.calls:
            height_in, width_in = call.input_shape[-2:]
            height_out, width_out = call.output_shape[-2:]
            height = height_out if HEIGHT in first else height_in
            width = width_out if WIDTH in first else width_in
            samples = prod(call.output_shape[:-3])
            total += samples * c * first_kernel * height * width
            total += samples * n * second_kernel * second_inputs * height_out * width_out
        return total

    def _emit_conv2d(self, split: Split, factors: Factors, bias: nn.Parameter | None) -> nn.Module:
        first_axes, columns_first = self._oriented(split)
        rank = factors.rank
        n, c = self.geometry.weight_shape[:2]
        first, second = (factors.right, factors.left.T) if columns_first else (factors.left.T, factors.right)
        sides = (split[1], split[0]) if columns_first else split
        first_tensor = _axes_tensor(first, sides[0], self.geometry.weight_shape)  # (rank, 1|n, 1|c, 1|kh, 1|kw)
        second_tensor = _axes_tensor(second, sides[1], self.geometry.weight_shape)
        own_first = (HEIGHT in first_axes, WIDTH in first_axes)
        own_second = (not own_first[0], not own_first[1])
        if IN in first_axes:
            head: nn.Module = self._conv(first_tensor[:, 0], None, own_first)  # (rank, c, ·, ·)
            tail = second_tensor[:, :, 0].permute(1, 0, 2, 3)  # (n, rank, ·, ·)
        else:
            head = SharedDepthwise(self._conv(first_tensor[:, 0], None, own_first))  # (rank, 1, ·, ·)
            tail = second_tensor.permute(1, 2, 0, 3, 4).reshape(n, c * rank, *second_tensor.shape[3:])
        return nn.Sequential(head, self._conv(tail, bias, own_second))

    def _conv(self, weight: Tensor, bias: nn.Parameter | None, own: tuple[bool, bool]) -> nn.Conv2d:
        """Make a convolution that has the layer's stride, padding and dilation on the axes it owns."""

        def owned(value: Pair, neutral: int) -> Pair:
            return (value[0] if own[0] else neutral, value[1] if own[1] else neutral)

        conv = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            stride=owned(self.geometry.stride, 1),
            padding=owned(self.geometry.padding, 0),
            dilation=owned(self.geometry.dilation, 1),
            bias=bias is not None,
            device="meta",
        )
        conv.weight = nn.Parameter(weight.detach().clone().contiguous())
        if bias is not None:
            conv.bias = bias
        return conv

    # --- composed ---------------------------------------------------------------------------------------------------

    def emit_weight(self, factors: Factors) -> ComposedWeight:
        """Make the module that rebuilds the weight from the factors."""
        permute = self.reshape.permute
        return ComposedWeight(
            factors.left.detach().clone().contiguous(),
            factors.right.detach().clone().contiguous(),
            permuted=[self.reshape.view[axis] for axis in permute],
            inverse=[permute.index(axis) for axis in range(len(permute))],
            weight_shape=list(self.geometry.weight_shape),
        )

    def _emit_composed(self, factors: Factors, bias: nn.Parameter | None) -> nn.Module:
        weight = self.emit_weight(factors)
        if self.geometry.kind == "linear":
            return ComposedLinear(weight, bias)
        geometry = self.geometry
        return ComposedConv2d(
            weight, bias, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation
        )


def _sub_axes(side: tuple[SubAxis, ...], axis: int) -> list[SubAxis]:
    return sorted((sub for sub in side if sub.axis == axis), key=lambda sub: sub.place)


def _size(side: tuple[SubAxis, ...], axis: int) -> int:
    return prod(sub.size for sub in side if sub.axis == axis)


def _axes_tensor(matrix: Tensor, side: tuple[SubAxis, ...], weight_shape: tuple[int, ...]) -> Tensor:
    """Lay a ``(rank, side)`` matrix out over the weight's four axes, with 1 where an axis is not the side's."""
    ordered = sorted(range(len(side)), key=lambda position: side[position].axis)
    tensor = matrix.reshape([matrix.shape[0]] + [axis.size for axis in side])
    tensor = tensor.permute([0] + [1 + position for position in ordered])
    own = {axis.axis for axis in side}
    return tensor.reshape([matrix.shape[0]] + [size if axis in own else 1 for axis, size in enumerate(weight_shape)])


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        linear.bias = bias
    return linear
