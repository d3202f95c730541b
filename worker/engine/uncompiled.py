"""PyTorch without its compiler: no job compiles anything, and importing `torch._dynamo` costs a child two seconds."""

from inspect import unwrap

import torch
from torch import _compile
from torch.utils._python_dispatch import TorchDispatchMode

import worker.engine.network.costs  # noqa: F401  what dispatch modes there are in a job

_SGD_STEP = unwrap(torch.optim.SGD.step)


class PlainSGD(torch.optim.SGD):
    """`torch.optim.SGD`, whose own step imports the compiler to tell it where a graph ends."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        _SGD_STEP(self, closure)


def leave_compiler_out() -> None:
    """Make optimizers and dispatch modes run as they are, where they would import the compiler to be told to.

    `torch._compile` looks for this answer beside the function before it asks the compiler for it; where a later PyTorch
    looks elsewhere, the compiler is imported as ever, and nothing else changes.
    """
    for owner in (torch.optim.Optimizer, *_subclasses(TorchDispatchMode)):
        for attribute in vars(owner).values():
            if getattr(getattr(attribute, "__code__", None), "co_filename", None) == _compile.__file__:
                attribute.__wrapped__.__dict__.setdefault("__dynamo_disable", attribute.__wrapped__)


def _subclasses(of: type) -> list[type]:
    direct: list[type] = of.__subclasses__()
    return [*direct, *(each for subclass in direct for each in _subclasses(subclass))]
