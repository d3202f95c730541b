"""Attributes dropped from single submodules: torch drops them by class, and submodules share classes."""

from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.network.graphs import attribute, attribute_chain, method_names, self_value
from worker.engine.network.parameters import all_parameters, count_distinct


def without_parameters(module: torch.jit.ScriptModule, names: Sequence[str]) -> torch.jit.ScriptModule:
    """Rebuild a frozen module without some of its parameters.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        Frozen: its root alone has methods, all calls inlined.
    names : sequence of str
        Qualified names of parameters that no method reads and that hold nothing.

    Returns
    -------
    torch.jit.ScriptModule
        The submodules on the way to these parameters are of classes of their own, all others the same objects. The
        module itself where that would part parameters that are one.
    """
    if not names:
        return module
    rebuilt = _rebuilt(module._c, names)
    made: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(rebuilt)  # type: ignore[no-untyped-call]
    for method in method_names(made):
        graph = rebuilt._get_method(method).graph
        root = self_value(graph)
        for node in graph.findAllNodes("prim::GetAttr"):
            chain = attribute_chain(node.output(), root)
            if chain is not None and node.output().type().kind() == "ClassType":
                node.output().setType(attribute(made, chain)._type())
        graph.lint()
    before, after = (count_distinct(all_parameters(each).values()) for each in (module, made))
    return made if before == after else module


def _rebuilt(compiled: Any, names: Sequence[str]) -> Any:
    """Clone one submodule under a class of its own; the clone's submodules are put in by hand."""
    inner = [name for name, _ in torch._C.ModuleDict(compiled).items()]
    own = [name for name in names if "." not in name]
    made = torch._C._hack_do_not_use_clone_module_with_class(compiled, [], [*inner, *own])  # type: ignore[attr-defined]
    for name in inner:
        below = [each.removeprefix(f"{name}.") for each in names if each.startswith(f"{name}.")]
        child = _rebuilt(compiled.getattr(name), below) if below else compiled.getattr(name)
        made._register_attribute(name, child._type(), child)
    return made
