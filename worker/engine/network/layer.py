"""One layer of a model, as it was found."""

from dataclasses import dataclass

import torch

from service.contract.plan import ReasonCode
from worker.engine.network.parameters import Shape

COMPRESSIBLE_KINDS = frozenset(
    {"linear", "matmul", "conv1d", "conv2d", "conv3d", "embedding", "parameter"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer of the user's model.

    Attributes
    ----------
    name : str
        The user's own module name ("layer1.0.conv1"); the parameter's name where a function is used with a bare one,
        and for kind "parameter".
    kind : str
        One of `COMPRESSIBLE_KINDS` can be compressible: "matmul" is x·W, "parameter" a weight that several different
        operators read, or one that has no kind of its own. Others are named by operator ("norm", "lstm", …), "other"
        where several operators share a module's parameters.
    weight, bias : str or None
        Qualified names; the weight is None where it is computed or a constant. The bias is None where the sites have
        none, and where a branch must not hold it: it is computed, or differs between the sites of one weight. It is
        then added behind the branch, and its parameter is counted in a layer of its own.
    weight_shape : tuple of int
        Empty where the weight is not a parameter.
    stride, dilation, output_padding : tuple of int
        Of a convolution, one for each axis of its kernel; empty for other kinds.
    padding : tuple of int or "same"
        Zeros on each side; "same" where the total is odd.
    groups : int
        1 but for grouped convolutions.
    dtype_bits : int
        Bits of one number of the weight.
    names : tuple of str
        Every qualified name of the weight.
    owner : str or None
        For a parameter that was named by itself: the layer that counts its numbers otherwise.
    params : int
        numel of weight and bias. What an earlier layer has counted is not counted again, so that the sum over
        all layers is the model's total.
    call_shapes : tuple of (tuple of int, tuple of int)
        (input shape, output shape) of each call in one forward of the sample, batch dimension kept; empty
        before a census.
    calls : int
        How often one forward runs the layer, at all its sites.
    macs : int or None
        Multiply-adds of one sample, summed over the calls, bias not counted; None before a census or if unknown.
    reason : ReasonCode or None
        Why the layer stays dense; None if it can be replaced.
    """

    name: str
    kind: str
    weight: str | None
    bias: str | None
    weight_shape: Shape
    stride: Shape = ()
    padding: Shape | str = ()
    dilation: Shape = ()
    output_padding: Shape = ()
    groups: int = 1
    dtype_bits: int = 32
    names: tuple[str, ...] = ()
    owner: str | None = None
    params: int = 0
    call_shapes: tuple[tuple[Shape, Shape], ...] = ()
    calls: int = 0
    macs: int | None = None
    reason: ReasonCode | None = None

    @property
    def input_shape(self) -> Shape | None:
        """The input's shape in the first call."""
        return self.call_shapes[0][0] if self.call_shapes else None

    @property
    def output_shape(self) -> Shape | None:
        """The output's shape in the first call."""
        return self.call_shapes[0][1] if self.call_shapes else None

    @property
    def input_hw(self) -> tuple[Pair, ...]:
        """(height, width) of the input of each call; for `conv2d`."""
        return tuple((shape[-2], shape[-1]) for shape, _ in self.call_shapes)

    @property
    def output_hw(self) -> tuple[Pair, ...]:
        """(height, width) of the output of each call; for `conv2d`."""
        return tuple((shape[-2], shape[-1]) for _, shape in self.call_shapes)

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of vectors that each call maps; for `linear`."""
        return tuple(torch.Size(shape[:-1]).numel() for shape, _ in self.call_shapes)
