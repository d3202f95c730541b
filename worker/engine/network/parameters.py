"""The parameters of a model: their names, which of them are one, and what holds them a second time."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from worker.engine.network.graphs import Value, attribute, attribute_chain

Shape = tuple[int, ...]


class Parameters:
    """Every parameter by its qualified name; one that has several names is known by the first.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model; it stays as it is.
    """

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self._module = module
        self._tensors = all_parameters(module)
        first: dict[tuple[int, Shape, Shape], str] = {}
        self._first = {name: first.setdefault(_identity(tensor), name) for name, tensor in self._tensors.items()}
        self._by_address = {
            tensor.data_ptr(): self._first[name] for name, tensor in self._tensors.items() if tensor.numel()
        }

    def __iter__(self) -> Iterator[str]:
        """First names, in the model's order."""
        return iter([name for name, first in self._first.items() if name == first])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Tensor of a name."""
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether a name is a parameter's."""
        return name in self._tensors

    def first(self, name: str | None) -> str | None:
        """First name of the parameter that has this name; None for what is none."""
        return self._first.get(name) if name is not None else None

    def names(self, name: str) -> tuple[str, ...]:
        """Every name of the parameter that has this name."""
        return tuple(each for each, first in self._first.items() if first == self._first[name])

    def overlapping(self) -> set[str]:
        """First names of parameters that share memory with another one without being the same."""
        spans = sorted((*_span(self._tensors[name]), name) for name in self if self._tensors[name].numel())
        found: set[str] = set()
        for (_, end, name), (start, _, other) in pairwise(spans):
            if start < end:
                found |= {name, other}
        return found

    def behind(self, value: Value, root: Value) -> list[str]:
        """Name the parameters that an attribute holds: itself, or members of a list (recurrent layers keep one)."""
        chain = attribute_chain(value, root)
        if chain is None:
            return []
        if chain in self._first:
            return [self._first[chain]]
        if value.type().kind() != "ListType":
            return []
        held = attribute(self._module, chain)
        addresses = [item.data_ptr() for item in held if isinstance(item, torch.Tensor) and item.numel()]
        return [self._by_address[address] for address in addresses if address in self._by_address]


def all_parameters(module: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    """Return every parameter by its qualified name; one that has two names appears under both."""
    return dict(module.named_parameters(remove_duplicate=False))


def count_distinct(tensors: Iterable[torch.Tensor]) -> int:
    """Sum numel over tensors, counting those that are the same memory once."""
    return sum({_identity(tensor): tensor.numel() for tensor in tensors}.values())


def _identity(tensor: torch.Tensor) -> tuple[int, Shape, Shape]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
