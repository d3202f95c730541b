"""What a form must know of a layer: the operator, its weight's shape, its strides, and the sizes it was called with."""

from dataclasses import dataclass
from math import prod
from typing import Literal

Pair = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """Shapes of one call of the layer for one sample."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """One linear or 2-D convolution layer without its numbers.

    Parameters
    ----------
    kind : "linear" or "conv2d"
        The operator.
    weight_shape : tuple of int
        ``(m, n)`` of a linear layer, ``(n, c, kh, kw)`` of a convolution.
    calls : tuple of Call
        Every call of one forward pass of one sample; a layer in a loop has several.
    stride, padding, dilation : (int, int)
        Of a convolution.
    """

    kind: Literal["linear", "conv2d"]
    weight_shape: tuple[int, ...]
    calls: tuple[Call, ...]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def weight_params(self) -> int:
        """Number of elements of the weight."""
        return prod(self.weight_shape)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense layer, summed over its calls."""
        inner = prod(self.weight_shape[1:])
        return sum(prod(call.output_shape) * inner for call in self.calls)
