"""Refusal of models that contain an operator outside the list, before anything of theirs runs."""

from collections.abc import Iterator
from typing import Any

import torch

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.allowed_operators import ALLOWED_OPERATORS
from worker.engine.network.graphs import (
    Graph,
    Node,
    Value,
    attribute,
    attribute_chain,
    inline_calls,
    self_value,
    source_line,
    walk,
)


def reject_unsafe_operators(module: torch.jit.ScriptModule) -> None:
    """Refuse a model that holds an operator outside the allowlist.

    Every method, hook and property of every submodule is read, whether anything calls it or not, with nested blocks,
    the subgraphs of `fork`, and the functions and classes that it calls. Nothing of the model is run.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model as it was loaded.

    Raises
    ------
    ProblemError
        `MODEL_REJECTED_UNSAFE`, naming the operator, the method and the source line.
    """
    for name, submodule in module.named_modules():
        if not isinstance(submodule, torch.jit.ScriptModule):
            continue
        for method, graph in _graphs(submodule):
            place = ".".join(part for part in (name, method) if part)
            inlined = graph.copy()
            inline_calls(inlined)
            root = self_value(inlined)
            for node in walk(inlined):
                if not _calls_own_submodule(submodule, root, node):
                    _check(node, place)
                for inner in _carried_nodes(node):
                    _check(inner, place)


def _graphs(module: torch.jit.ScriptModule) -> Iterator[tuple[str, Graph]]:
    compiled = module._c
    for name in compiled._method_names():
        yield name, compiled._get_method(name).graph
    for hook in [*compiled._get_forward_hooks(), *compiled._get_forward_pre_hooks()]:
        yield hook.name, hook.graph
    for prop in compiled._properties():
        for accessor in (prop.getter, prop.setter):
            if accessor is not None:
                yield accessor.name, accessor.graph


def _carried_nodes(node: Node) -> Iterator[Node]:
    """Yield the nodes of the graphs that a node carries (fork, closures), of what they call and carry in turn."""
    for name in node.attributeNames():
        kind = node.kindOf(name)
        carried: list[Any] = [node.g(name)] if kind == "g" else list(node.gs(name)) if kind == "gs" else []
        for graph in carried:
            inlined = graph.copy()
            inline_calls(inlined)
            for inner in walk(inlined):
                yield inner
                yield from _carried_nodes(inner)


def _check(node: Node, place: str) -> None:
    kind = node.kind()
    if kind in {"prim::CallMethod", "prim::CallFunction"}:
        # Inlining has replaced every call whose code is known.
        _refuse(f"a call to {_callee(node)}, whose code cannot be read before it runs", node, place)
    if kind not in ALLOWED_OPERATORS:
        _refuse(f"the operator {kind}", node, place)


def _calls_own_submodule(module: torch.jit.ScriptModule, root: Value, node: Node) -> bool:
    """Tell whether a node calls a submodule through an interface; its methods are read in their own turn."""
    if node.kind() != "prim::CallMethod" or not node.inputsAt(0).type().is_interface_type():
        return False
    chain = attribute_chain(node.inputsAt(0), root)
    return chain is not None and isinstance(attribute(module, chain), torch._C.ScriptModule)


def _callee(node: Node) -> str:
    if node.kind() == "prim::CallMethod":
        return f"{node.inputsAt(0).type().annotation_str}.{node.s('name')}"
    return "a function value"


def _refuse(what: str, node: Node, place: str) -> None:
    line = source_line(node)
    where = f"{place} ({line})" if line else place
    raise ProblemError(
        ErrorCode.MODEL_REJECTED_UNSAFE,
        f"The model contains {what} in {where}. Only tensor mathematics, control flow and containers may run here; "
        "remove it from the model and save the model again.",
    )
