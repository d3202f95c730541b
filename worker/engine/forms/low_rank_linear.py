"""A low-rank term on linear layers, products with a weight, and embeddings: costs and plain modules (methods L.3)."""

from math import prod

from torch import nn

from worker.engine.forms.factor_operators import RANK, FactorAxes, Source, embedding, linear, size_on, sub_axes
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.modules import ContractedLinear
from worker.engine.forms.reshape import Split, SubAxis


class LinearChain:
    """A low-rank matrix over factors of a linear layer's axes, as two contractions.

    The first contracts its part of the input's axis and makes its part of the output's, the second the rest; the
    order is the cheaper one.

    Parameters
    ----------
    split : (rows, columns)
        The weight's axes on both sides of the matrix.
    geometry : Geometry
        Of kind "linear", whose weight is ``(m, n)``, or "matmul", whose weight is ``(n, m)``.
    """

    def __init__(self, split: Split, geometry: Geometry) -> None:
        self.split = split
        self.geometry = geometry
        self._out, self._in = (1, 0) if geometry.kind == "matmul" else (0, 1)
        columns_first, rows_first = self._per_vector(split[1], split[0]), self._per_vector(*split)
        self._columns_first = columns_first <= rows_first
        self._macs_per_vector = min(columns_first, rows_first)

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""
        return self._macs_per_vector * sum(prod(call.input_shape[:-1]) for call in self.geometry.calls)

    def emit(self, left: Source, right: Source, rank: int, bias: nn.Parameter | None) -> nn.Module:
        """Make the two linear layers, with the permutations around them where axes are split."""
        rows, columns = self.split
        factors = (FactorAxes(left, rows, True, 1, rank), FactorAxes(right, columns, False, 1, rank))
        first, second = reversed(factors) if self._columns_first else factors
        in_1, in_2 = sub_axes(first.side, self._in), sub_axes(second.side, self._in)
        out_1, out_2 = sub_axes(first.side, self._out), sub_axes(second.side, self._out)
        contracted, kept, outer, inner = (prod(axis.size for axis in each) for each in (in_1, in_2, out_1, out_2))
        head_shape, tail_shape = (outer * rank, contracted), (inner, kept * rank)
        head = first.arranged((*out_1, RANK, *in_1), head_shape)
        tail = second.arranged((*out_2, *in_2, RANK), tail_shape)
        if kept == outer == 1:
            return nn.Sequential(linear(head, head_shape), linear(tail, tail_shape, bias))
        in_axes, out_axes = sub_axes(rows + columns, self._in), sub_axes(rows + columns, self._out)
        out_order = [*out_1, *out_2]
        return ContractedLinear(
            linear(head, head_shape),
            linear(tail, tail_shape),
            bias,
            in_view=[axis.size for axis in in_axes],
            in_permute=[in_axes.index(axis) for axis in (*in_2, *in_1)],
            kept=kept,
            contracted=contracted,
            outer=outer,
            rank=rank,
            out_view=[axis.size for axis in out_order],
            out_permute=[out_order.index(axis) for axis in out_axes],
        )

    def _per_vector(self, first: tuple[SubAxis, ...], second: tuple[SubAxis, ...]) -> int:
        kept, outer = size_on(second, self._in), size_on(first, self._out)
        return kept * outer * size_on(first, self._in) + outer * kept * size_on(second, self._out)


class EmbeddingChain:
    """A low-rank table as an embedding of short rows and a matrix.

    Parameters
    ----------
    split : (rows, columns)
        Both sides of the matrix, each one axis of the table.
    geometry : Geometry
        Of kind "embedding", whose weight is ``(rows, width)``.
    """

    def __init__(self, split: Split, geometry: Geometry) -> None:
        self.split = split
        self.geometry = geometry

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls: those of the matrix."""
        return sum(prod(call.output_shape) for call in self.geometry.calls)

    def emit(self, left: Source, right: Source, rank: int, bias: nn.Parameter | None) -> nn.Module:
        """Make the embedding and the linear layer."""
        rows, columns = self.split
        factors = (FactorAxes(left, rows, True, 1, rank), FactorAxes(right, columns, False, 1, rank))
        table, matrix = factors if any(axis.axis == 0 for axis in rows) else tuple(reversed(factors))
        length, width = self.geometry.weight_shape
        return nn.Sequential(
            embedding(table.arranged((*sub_axes(table.side, 0), RANK), (length, rank)), (length, rank)),
            linear(matrix.arranged((*sub_axes(matrix.side, 1), RANK), (width, rank)), (width, rank), bias),
        )
