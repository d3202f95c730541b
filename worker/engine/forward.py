"""One call of a network that may be anybody's: its outputs as a flat tuple, its failures as problems."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError

_MESSAGE_CHARACTERS_MAX = 1200
# What a forward raises by a `raise` of its own is torch.jit.Error, which is none of Python's own kinds.
RAISED = (torch.jit.Error, RuntimeError, ValueError, TypeError, LookupError, AssertionError)


def require_tensor_arguments(module: torch.jit.ScriptModule) -> None:
    """Refuse a network whose ``forward`` needs something else than tensors: data are arrays, one for each argument.

    Raises
    ------
    ProblemError
        ``MODEL_UNSUPPORTED`` with the argument and its type.
    """
    for argument in module._c._get_method("forward").schema.arguments[1:]:
        kind = argument.type
        if kind.kind() == "OptionalType":
            kind = kind.getElementType()
        if kind.kind() != "TensorType" and not argument.has_default_value():
            raise ProblemError(
                ErrorCode.MODEL_UNSUPPORTED,
                f"forward's argument '{argument.name}' is {argument.type.annotation_str}; expected tensors alone, or a "
                "default for what is none. Wrap the model in one whose forward takes each tensor as an argument of its "
                "own and makes the rest of them, and save that",
            )


def call(module: torch.jit.ScriptModule, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run ``forward`` and flatten what it returns; see `call_nested`."""
    return flatten(call_nested(module, inputs))


def call_seeded(module: torch.jit.ScriptModule, inputs: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
    """Run ``forward`` with the generators at a seed, so that networks that draw random numbers draw the same."""
    torch.manual_seed(seed)
    return call(module, inputs)


def call_nested(module: torch.jit.ScriptModule, inputs: Sequence[Tensor]) -> Any:
    """Run ``forward``; what it returns may be a tensor, or tuples, lists and dicts of tensors.

    Raises
    ------
    ProblemError
        ``MODEL_RAISED`` with the end of the network's own message; ``MODEL_UNSUPPORTED`` when an output is no tensor.
        Running out of memory is left as it is, for the caller to try a smaller batch.
    """
    try:
        return module(*inputs)
    except RAISED as error:
        if out_of_memory(error):
            raise
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
        raise ProblemError(ErrorCode.MODEL_RAISED, f"forward raised for inputs {shapes}: {message_of(error)}") from None


def message_of(error: BaseException) -> str:
    """The end of what a network's own code raised."""
    return str(error).strip()[-_MESSAGE_CHARACTERS_MAX:]


def flatten(raw: Any) -> tuple[Tensor, ...]:
    """Tensors of a nested output, in order; a dict's by its own order."""
    if isinstance(raw, Tensor):
        return (raw,)
    if isinstance(raw, dict):
        return tuple(tensor for value in raw.values() for tensor in flatten(value))
    if isinstance(raw, (tuple, list)):
        return tuple(tensor for value in raw for tensor in flatten(value))
    if raw is None:
        return ()
    raise ProblemError(
        ErrorCode.MODEL_UNSUPPORTED,
        f"forward returned a {type(raw).__name__}; expected tensors, or tuples, lists or dicts of tensors",
    )


def map_tensors(raw: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of a nested output and keep its structure."""
    if isinstance(raw, Tensor):
        return change(raw)
    if isinstance(raw, dict):
        return {key: map_tensors(value, change) for key, value in raw.items()}
    if isinstance(raw, (tuple, list)):
        made = [map_tensors(value, change) for value in raw]
        return made if isinstance(raw, list) else type(raw)(*made) if hasattr(raw, "_fields") else tuple(made)
    return raw


def names_of(raw: Any, prefix: str = "") -> list[str]:
    """Name the tensors of a nested output in the order of `flatten`: a dict's keys, a tuple's positions, dotted."""
    if isinstance(raw, Tensor):
        return [prefix]
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, (tuple, list)) else ()
    return [name for key, value in items for name in names_of(value, f"{prefix}.{key}" if prefix else str(key))]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on the device or under the process's limit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
