"""A low-rank term on convolutions of any number of axes, with groups, transposed: costs and plain modules (L.3)."""

from dataclasses import dataclass
from math import prod

from torch import nn

from worker.engine.forms.factor_operators import (
    GROUP,
    RANK,
    FactorAxes,
    Source,
    convolution,
    size_on,
    sub_axes,
)
from worker.engine.forms.geometry import TRANSPOSED, Geometry, Shape
from worker.engine.forms.modules import ContractedConvolution
from worker.engine.forms.reshape import Split, SubAxis

Side = tuple[SubAxis, ...]


@dataclass(frozen=True)
class _Order:
    """Which side of the matrix the first convolution has, and the multiply-adds of one rank."""

    columns_first: bool
    macs: int


class ConvolutionChain:
    """A low-rank matrix over the axes of a convolution's weight, as two convolutions.

    The first contracts its part of the inputs over the kernel's axes on its side of the matrix, with the layer's
    stride, padding and dilation there, and makes its part of the outputs; the second the rest. Where the first has all
    inputs and the second all outputs they are a plain chain; otherwise the other parts of the channels go along as a
    batch. The order is the cheaper one.

    Parameters
    ----------
    split : (rows, columns)
        Of one group's weight.
    geometry : Geometry
        The layer.
    block : tuple of int
        Shape of one group's weight.

    Raises
    ------
    ValueError
        No such two convolutions compute the term: an axis of the kernel is on both sides, or groups do not allow it.
    """

    def __init__(self, split: Split, geometry: Geometry, block: Shape) -> None:
        self.split = split
        self.geometry = geometry
        self.block = block
        self.transposed = geometry.kind in TRANSPOSED
        self._in, self._out = (0, 1) if self.transposed else (1, 0)
        kernel = {axis.axis: axis.size for side in split for axis in side if axis.axis > 1}
        if any(block[axis] != size for axis, size in kernel.items()):
            raise ValueError("an axis of the kernel is on both sides")
        orders = [self._order(columns_first=first) for first in (True, False) if self._possible(columns_first=first)]
        if not orders:
            raise ValueError("groups need all inputs on one side and all outputs on the other")
        self._best = min(orders, key=lambda order: order.macs)

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""
        return self._best.macs

    def emit(self, left: Source, right: Source, rank: int, bias: nn.Parameter | None) -> nn.Module:
        """Make both convolutions, with the permutations around them where channels are split."""
        rows, columns = self.split
        groups = self.geometry.groups
        factors = (FactorAxes(left, rows, True, groups, rank), FactorAxes(right, columns, False, groups, rank))
        first, second = reversed(factors) if self._best.columns_first else factors
        in_1, in_2 = sub_axes(first.side, self._in), sub_axes(second.side, self._in)
        out_1, out_2 = sub_axes(first.side, self._out), sub_axes(second.side, self._out)
        contracted, kept, outer, inner = (prod(axis.size for axis in each) for each in (in_1, in_2, out_1, out_2))
        plain = kept == outer == 1
        head = self._operator(first, (in_1, contracted), ([*out_1, RANK], outer * rank), None)
        tail = self._operator(second, ([*in_2, RANK], kept * rank), (out_2, inner), bias if plain else None)
        if plain:
            return nn.Sequential(head, tail)
        in_axes, out_axes = sub_axes(rows + columns, self._in), sub_axes(rows + columns, self._out)
        out_order = [*out_1, *out_2]
        return ContractedConvolution(
            head,
            tail,
            bias,
            axes=len(self.block) - 2,
            in_view=[axis.size for axis in in_axes],
            in_permute=[in_axes.index(axis) for axis in (*in_2, *in_1)],
            kept=kept,
            contracted=contracted,
            outer=outer,
            rank=rank,
            out_view=[axis.size for axis in out_order],
            out_permute=[out_order.index(axis) for axis in out_axes],
        )

    def _sides(self, *, columns_first: bool) -> tuple[Side, Side]:
        rows, columns = self.split
        return (columns, rows) if columns_first else (rows, columns)

    def _possible(self, *, columns_first: bool) -> bool:
        first, second = self._sides(columns_first=columns_first)
        return self.geometry.groups == 1 or size_on(second, self._in) == size_on(first, self._out) == 1

    def _order(self, *, columns_first: bool) -> _Order:
        first, second = self._sides(columns_first=columns_first)
        axes, groups = len(self.block) - 2, self.geometry.groups
        own = self._own(first)
        kernel = prod(size for size, mine in zip(self.block[2:], own, strict=True) if mine)
        of_first = self.block[self._in] * groups * size_on(first, self._out) * kernel
        of_second = self.block[self._out] * groups * size_on(second, self._in) * (prod(self.block[2:]) // kernel)
        total = 0
        for call in self.geometry.calls:
            before, after = call.input_shape[-axes:], call.output_shape[-axes:]
            between = prod(new if mine else old for old, new, mine in zip(before, after, own, strict=True))
            head, tail = (prod(before), between) if self.transposed else (between, prod(after))
            total += prod(call.output_shape[: -axes - 1]) * (of_first * head + of_second * tail)
        return _Order(columns_first, total)

    def _own(self, side: Side) -> list[bool]:
        """For each axis of the kernel whether a side has it."""
        held = {axis.axis for axis in side}
        return [axis in held for axis in range(2, len(self.block))]

    def _operator(
        self,
        factor: FactorAxes,
        inputs: tuple[list[SubAxis], int],
        outputs: tuple[list[SubAxis], int],
        bias: nn.Parameter | None,
    ) -> nn.Module:
        """Make a convolution of a factor: the axes of its inputs and outputs in each group, and their numbers."""
        own = self._own(factor.side)
        groups = self.geometry.groups
        transposed = self.transposed and any(own)
        leading, following = (inputs, outputs) if transposed else (outputs, inputs)
        kernel = tuple(size if mine else 1 for size, mine in zip(self.block[2:], own, strict=True))
        shape = (groups * leading[1], following[1], *kernel)
        spatial = [axis for number in range(2, len(self.block)) for axis in sub_axes(factor.side, number)]
        weight = factor.arranged((GROUP, *leading[0], *following[0], *spatial), shape)
        return convolution(weight, shape, bias, self.geometry, own, groups=groups, transposed=transposed)
