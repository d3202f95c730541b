"""How a convolution steps: strides, padding, dilation and groups, as its graph writes them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from worker.engine.network.graphs import Node, Value, constant
from worker.engine.network.parameters import Shape

# Positions of stride, padding, dilation, output_padding, groups; of the last three of a transposed one by name.
_Places = tuple[int, int, int, int | None, int]
_PLAIN: _Places = (3, 4, 5, None, 6)
_GENERAL: _Places = (3, 4, 5, 7, 8)
_TRANSPOSED: _Places = (3, 4, 7, 5, 6)


@dataclass(frozen=True)
class Strides:
    """One number for each axis of the kernel; a padding of "same" is kept where it is not the same on both sides."""

    stride: Shape = ()
    padding: Shape | str = ()
    dilation: Shape = ()
    output_padding: Shape = ()
    groups: int = 1


def strides_of(module: torch.jit.ScriptModule, node: Node, root: Value, kernel: Shape) -> Strides | None:
    """Read a convolution's numbers; None where they are computed while the model runs.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model.
    node, root : Node, Value
        The convolution, and the method's `self`.
    kernel : tuple of int
        Sizes of the kernel.
    """
    if node.kind() in {"aten::_convolution", "aten::convolution"}:
        places = _GENERAL
    else:
        places = _TRANSPOSED if node.kind().startswith("aten::conv_transpose") else _PLAIN
    try:
        stride, padding, dilation, output_padding, groups = (
            0 if at is None else constant(module, node.inputsAt(at), root) for at in places
        )
    except LookupError:
        return None
    axes = len(kernel)
    spread = _each(dilation, axes)
    zeros = _named_padding(padding, kernel, spread) if isinstance(padding, str) else _each(padding, axes)
    return Strides(_each(stride, axes), zeros, spread, _each(output_padding, axes), int(groups))


def _each(value: int | Iterable[int], axes: int) -> Shape:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _named_padding(mode: str, kernel: Shape, dilation: Shape) -> Shape | str:
    """Zeros on each side for "same" and "valid"; an odd total is not symmetric and has no such number."""
    if mode == "valid":
        return (0,) * len(kernel)
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    return tuple(total // 2 for total in totals) if all(total % 2 == 0 for total in totals) else mode
