"""Networks of 16 bits are trained in 32: an update below the last bit of a 16-bit number would be lost."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

_WIDE_BYTES = 4


def widen(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Turn every parameter and buffer of 16 bits into float32, in place; wider ones stay as they are."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and tensor.element_size() < _WIDE_BYTES:
            tensor.data = tensor.data.float()
    return module


def floating_dtype(module: torch.jit.ScriptModule) -> torch.dtype:
    """Dtype that a network's floating inputs have: that of its first floating parameter."""
    floating = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(floating, torch.float32)


def dtype_bits(module: torch.jit.ScriptModule) -> dict[str, int]:
    """Bits of one number of each parameter, by name."""
    return {name: 8 * parameter.element_size() for name, parameter in module.named_parameters(remove_duplicate=False)}


def as_inputs(tensors: Sequence[Tensor], module: torch.jit.ScriptModule) -> tuple[Tensor, ...]:
    """Floating tensors in the dtype that a network takes; others as they are."""
    dtype = floating_dtype(module)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
