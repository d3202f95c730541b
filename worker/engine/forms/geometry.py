"""What a form must know of a layer: the operator, its weight's shape, its strides, and the sizes it was called with."""

from dataclasses import dataclass
from math import prod

Pair = tuple[int, int]
Shape = tuple[int, ...]

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Call:
    """Shapes of one call of the layer for one sample."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """One layer without its numbers.

    Parameters
    ----------
    kind : str
        The operator: "linear", "matmul" (x·W, so that W is a linear layer's weight transposed), "conv1d" to "conv3d",
        "conv_transpose1d" to "conv_transpose3d", "embedding", or "parameter" for a weight whose operators are not
        looked at.
    weight_shape : tuple of int
        ``(m, n)`` of a linear layer, ``(n, m)`` of a matmul, ``(n, c/groups, k…)`` of a convolution,
        ``(c, n/groups, k…)`` of a transposed one, ``(rows, width)`` of an embedding.
    calls : tuple of Call
        Every call of one forward pass of one sample; a layer in a loop has several.
    stride, padding, dilation, output_padding : tuple of int
        Of a convolution, one for each axis of its kernel; a padding of "same" is the operator's own, for totals that
        are odd.
    groups : int
        Of a convolution.
    macs : int, optional
        Multiply-adds as they were counted, where shapes do not say them ("parameter").
    dtype_bits : int
        Bits of one stored number of the weight.
    """

    kind: str
    weight_shape: Shape
    calls: tuple[Call, ...]
    stride: Shape = (1, 1)
    padding: Shape | str = (0, 0)
    dilation: Shape = (1, 1)
    output_padding: Shape = (0, 0)
    groups: int = 1
    macs: int | None = None
    dtype_bits: int = 32

    @property
    def weight_params(self) -> int:
        """Number of elements of the weight."""
        return prod(self.weight_shape)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense layer, summed over its calls."""
        if self.macs is not None:
            return self.macs
        if self.kind in {"embedding", "parameter"}:
            return 0
        if self.kind == "matmul":
            return sum(prod(call.output_shape) * self.weight_shape[0] for call in self.calls)
        inner = prod(self.weight_shape[1:])
        if self.kind in TRANSPOSED:
            return sum(prod(call.input_shape) * inner for call in self.calls)
        return sum(prod(call.output_shape) * inner for call in self.calls)

    @property
    def kernel(self) -> Shape:
        """Sizes of a convolution's kernel; empty for other kinds."""
        return self.weight_shape[2:] if self.kind in (*CONVOLUTIONS, *TRANSPOSED) else ()
