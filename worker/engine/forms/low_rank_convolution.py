"""A low-rank term on convolutions of any number of axes, with groups, transposed: costs and plain modules (L.3)."""

from math import prod

from torch import nn

from worker.engine.forms.factor_operators import GROUP, RANK, FactorAxes, Source, convolution
from worker.engine.forms.geometry import TRANSPOSED, Geometry, Shape
from worker.engine.forms.modules import SharedDepthwise
from worker.engine.forms.reshape import Split, SubAxis


def contracts(split: Split, geometry: Geometry, block: Shape) -> bool:
    """Tell whether two convolutions in a chain compute a low-rank matrix under a parting of the weight's axes.

    Parameters
    ----------
    split : (rows, columns)
        Of one group's weight.
    geometry : Geometry
        The layer.
    block : tuple of int
        Shape of one group's weight.
    """
    axes = [axis for side in split for axis in side]
    if len(axes) != len(block) or any(axis.size != block[axis.axis] for axis in axes):
        return False  # a convolution contracts whole axes only
    channels = [{axis.axis for axis in side if axis.axis < 2} for side in split]
    if all(len(each) == 1 for each in channels):
        return True
    if geometry.kind in TRANSPOSED:
        return 1 in block[:2]
    return geometry.groups == 1 or block[1] == 1


class ConvolutionChain:
    """A low-rank matrix over the axes of a convolution's weight, as two convolutions in a chain.

    The first has the kernel's axes on the side of the matrix without the outputs (of a transposed convolution: with the
    inputs), with the layer's stride, padding and dilation there; the second has the others.

    Parameters
    ----------
    split : (rows, columns)
        Of one group's weight, which `contracts` allows.
    geometry : Geometry
        The layer.
    block : tuple of int
        Shape of one group's weight.
    """

    def __init__(self, split: Split, geometry: Geometry, block: Shape) -> None:
        self.geometry = geometry
        self.block = block
        self.transposed = geometry.kind in TRANSPOSED
        self._in, self._out = (0, 1) if self.transposed else (1, 0)
        rows, columns = ({axis.axis for axis in side} for side in split)
        self._columns_first = self._second_is(rows)
        first = columns if self._columns_first else rows
        self._sides = split
        kernel = range(2, len(block))
        self._own = [axis in first for axis in kernel]
        self._kernel = tuple(block[2:])
        self._channels_shared = self._in not in first and block[self._in] > 1

    def _second_is(self, rows: set[int]) -> bool:
        """Whether the rows are the second operator's: it makes the outputs, and a transposed one's first the inputs."""
        inputs, outputs = self._in in rows, self._out in rows
        if not self.transposed:
            return outputs
        return inputs == (self.block[self._in] == 1) if inputs == outputs else not inputs

    @property
    def macs_per_rank(self) -> int:
        """Multiply-adds that one more rank costs, summed over the layer's calls."""
        axes = len(self._kernel)
        inputs, outputs = self.block[self._in] * self.geometry.groups, self.block[self._out] * self.geometry.groups
        first = prod(size for size, own in zip(self._kernel, self._own, strict=True) if own)
        second = prod(self._kernel) // first
        shared = inputs if self._channels_shared else 1
        total = 0
        for call in self.geometry.calls:
            before, after = call.input_shape[-axes:], call.output_shape[-axes:]
            between = prod(new if own else old for old, new, own in zip(before, after, self._own, strict=True))
            head, tail = (prod(before), between) if self.transposed else (between, prod(after))
            samples = prod(call.output_shape[: -axes - 1])
            total += samples * (inputs * first * head + outputs * second * shared * tail)
        return total

    def emit(self, left: Source, right: Source, rank: int, bias: nn.Parameter | None) -> nn.Module:
        """Make both convolutions."""
        groups = self.geometry.groups
        factors = (
            FactorAxes(left, self._sides[0], True, groups, rank),
            FactorAxes(right, self._sides[1], False, groups, rank),
        )
        first, second = reversed(factors) if self._columns_first else factors
        rest = [not own for own in self._own]
        if self._channels_shared:
            n, c = self.block[:2]
            filters = self._shaped(first, (RANK,), (rank, 1), self._own, None, groups=1)
            tail = self._shaped(second, (self._axis(self._out), self._axis(self._in), RANK), (n, c * rank), rest, bias)
            return nn.Sequential(SharedDepthwise(filters, len(self._kernel)), tail)
        head = self._operator(first, self._in, self._own, None)
        return nn.Sequential(head, self._operator(second, self._out, rest, bias))

    def _operator(self, factor: FactorAxes, channel: int, own: list[bool], bias: nn.Parameter | None) -> nn.Module:
        """Make the convolution between the layer's channels on one side and the ranks of each group on the other."""
        groups, rank, size = self.geometry.groups, factor.rank, self.block[channel]
        takes_inputs = channel == self._in
        transposed = self.transposed and any(own)
        if takes_inputs == transposed:  # the layer's channels are the weight's first axis
            order, leading = (GROUP, self._axis(channel), RANK), (groups * size, rank)
        else:
            order, leading = (GROUP, RANK, self._axis(channel)), (groups * rank, size)
        return self._shaped(factor, order, leading, own, bias, transposed=transposed)

    def _shaped(
        self,
        factor: FactorAxes,
        order: tuple[SubAxis, ...],
        leading: tuple[int, int],
        own: list[bool],
        bias: nn.Parameter | None,
        *,
        groups: int | None = None,
        transposed: bool = False,
    ) -> nn.Module:
        kernel = tuple(size if mine else 1 for size, mine in zip(self._kernel, own, strict=True))
        spatial = [self._axis(axis) for axis in range(2, len(self.block))]
        weight = factor.arranged((*order, *spatial), (*leading, *kernel))
        groups = self.geometry.groups if groups is None else groups
        shape = (*leading, *kernel)
        return convolution(weight, shape, bias, self.geometry, own, groups=groups, transposed=transposed)

    def _axis(self, axis: int) -> SubAxis:
        """The one factor that an axis of a group's weight is."""
        return next(sub for side in self._sides for sub in side if sub.axis == axis)
