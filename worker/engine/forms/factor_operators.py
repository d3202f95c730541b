"""Small operators made of a low-rank term's factors; where modules give the factors, of these modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from worker.engine.forms.geometry import Geometry, Shape
from worker.engine.forms.modules import ArrangedFactor, WeightedConvolution, WeightedEmbedding, WeightedLinear
from worker.engine.forms.reshape import SubAxis

Source = Tensor | nn.Module  # a factor, or a module whose forward() gives it
GROUP, RANK = SubAxis(-1, 0, 0, 0), SubAxis(-2, 0, 0, 0)  # axes of a factor that are none of the weight's

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class FactorAxes:
    """A factor as a tensor with named axes.

    Parameters
    ----------
    source : Tensor or Module
        ``(p, r)`` or ``(r, q)``, or such matrices for each group.
    side : tuple of SubAxis
        The weight's axes that p or q is made of.
    rank_last : bool
        True of a left factor.
    groups, rank : int
        Length of the axes `GROUP` and `RANK`.
    """

    source: Source
    side: tuple[SubAxis, ...]
    rank_last: bool
    groups: int
    rank: int

    def arranged(self, order: Sequence[SubAxis], shape: Sequence[int]) -> Source:
        """Bring the axes into an order and read them as a shape.

        Axes that the factor lacks are passed over; those that the order lacks have length 1.
        """
        axes = [GROUP, *self.side, RANK] if self.rank_last else [GROUP, RANK, *self.side]
        sizes = {GROUP: self.groups, RANK: self.rank}
        view = [sizes.get(axis, axis.size) for axis in axes]
        permute = [axes.index(axis) for axis in order if axis in axes]
        permute += [place for place in range(len(axes)) if place not in permute]
        if isinstance(self.source, Tensor):
            value = self.source.reshape(view).permute(permute).reshape(tuple(shape))
            return value.detach().clone(memory_format=torch.contiguous_format)
        return ArrangedFactor(self.source, view=view, permute=permute, shape=list(shape))


def linear(weight: Source, shape: tuple[int, int], bias: nn.Parameter | None = None) -> nn.Module:
    """Make a linear layer of a weight ``(m, n)``."""
    if not isinstance(weight, Tensor):
        return WeightedLinear(weight, bias)
    made = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = bias
    return made


def embedding(weight: Source, shape: tuple[int, int]) -> nn.Module:
    """Make an embedding of a table ``(rows, width)``."""
    if not isinstance(weight, Tensor):
        return WeightedEmbedding(weight)
    made = nn.Embedding(*shape, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def convolution(
    weight: Source,
    shape: Shape,
    bias: nn.Parameter | None,
    geometry: Geometry,
    own: Sequence[bool],
    *,
    groups: int = 1,
    transposed: bool = False,
) -> nn.Module:
    """Make a convolution that has the layer's stride, padding and dilation on the axes that it owns.

    Parameters
    ----------
    weight : Tensor or Module
        ``(n, c/groups, k…)``, of a transposed one ``(c, n/groups, k…)``.
    shape : tuple of int
        Of the weight.
    bias : Parameter or None
        ``(n,)``.
    geometry : Geometry
        The layer.
    own : sequence of bool
        For each axis of the kernel.
    groups : int
        Of the convolution itself.
    transposed : bool
        Whether it is one.
    """
    stride, dilation = _owned(geometry.stride, own, 1), _owned(geometry.dilation, own, 1)
    output_padding = _owned(geometry.output_padding, own, 0) if transposed else (0,) * len(own)
    same = geometry.padding == "same"
    padding = _owned((0,) * len(own) if isinstance(geometry.padding, str) else geometry.padding, own, 0)
    if not isinstance(weight, Tensor):
        before = [zeros for axis in reversed(range(len(own))) for zeros in _around(shape[2 + axis], dilation[axis])]
        return WeightedConvolution(
            weight,
            bias,
            stride=list(stride),
            padding=list(padding),
            before=before if same else [],
            dilation=list(dilation),
            transposed=transposed,
            output_padding=list(output_padding),
            groups=groups,
        )
    channels = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    made = (_TRANSPOSED if transposed else _CONVOLUTIONS)[len(own)](
        *channels,
        tuple(shape[2:]),
        stride=stride,
        padding="same" if same else padding,
        dilation=dilation,
        groups=groups,
        bias=bias is not None,
        device="meta",
        **({"output_padding": output_padding} if transposed else {}),
    )
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = bias
    return made


def _owned(values: Shape, own: Sequence[bool], neutral: int) -> Shape:
    return tuple(value if mine else neutral for value, mine in zip(values, own, strict=True))


def _around(size: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after an axis that padding "same" stands for; an odd one goes to the end."""
    total = dilation * (size - 1)
    return total // 2, total - total // 2


def size_on(side: tuple[SubAxis, ...], axis: int) -> int:
    """Length of what a side has of one of the weight's axes."""
    return prod(sub.size for sub in side if sub.axis == axis)


def sub_axes(side: tuple[SubAxis, ...], axis: int) -> list[SubAxis]:
    """What a side has of one of the weight's axes, in the axis's own order."""
    return sorted((sub for sub in side if sub.axis == axis), key=lambda sub: sub.place)
