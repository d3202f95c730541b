"""Formulas for recurrent kernels that are one operator: torch.utils.flop_counter has none for them and counts 0."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from worker.engine.network.parameters import Shape


def _one_direction(given: Shape, *weights: Any, out_shape: Any = None, **_: Any) -> int:  # noqa: ARG001
    """FLOPs of one layer in one direction, whose first two weights are matrices: of the inputs and of the state."""
    return _flops(given, weights[:2])


def _all_layers(given: Shape, weights: Sequence[Shape], *_: Any, out_shape: Any = None, **__: Any) -> int:  # noqa: ARG001
    """FLOPs of all layers and directions, projections included: every matrix is used once for each element."""
    return _flops(given, weights)


def _flops(given: Shape, weights: Sequence[Shape]) -> int:
    elements = prod(given[:-1])  # of all sequences; packed ones have them in one axis
    return 2 * elements * sum(prod(shape) for shape in weights if len(shape) > 1)


RECURRENT_KERNELS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten.mkldnn_rnn_layer: _one_direction,
        torch.ops.aten._cudnn_rnn: _all_layers,
        torch.ops.aten.miopen_rnn: _all_layers,
    }
)
