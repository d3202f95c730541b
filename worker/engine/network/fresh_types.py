"""Scripting as if nothing had been scripted before in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.jit import _recursive, _state


@contextmanager
def fresh_types() -> Iterator[None]:
    """Script into an empty unit, so that the names of types are those of a fresh process.

    Types are numbered on within a process, and names of other lengths make files of other sizes.
    """
    fresh: list[tuple[Any, str, Any]] = [
        (_state, "_jit_caching_layer", WeakKeyDictionary()),
        (_state, "_jit_function_overload_caching", WeakKeyDictionary()),
        (_recursive, "concrete_type_store", _recursive.ConcreteTypeStore()),
    ]
    unit = torch._C.CompilationUnit()
    fresh += [(place, "_python_cu", unit) for place in (_state, _recursive)]
    before = [(place, name, getattr(place, name)) for place, name, _ in fresh]
    _set(fresh)
    try:
        yield
    finally:
        _set(before)


def _set(values: list[tuple[Any, str, Any]]) -> None:
    for place, name, value in values:
        setattr(place, name, value)
