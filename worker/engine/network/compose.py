"""Weights composed by a module: what reads a parameter reads the module's result instead, whatever operator it is."""

from collections.abc import Mapping

import torch

from worker.engine.network.graphs import (
    Graph,
    Node,
    Value,
    attribute,
    attribute_chain,
    constant_before,
    self_value,
)

# A node with the blocks around it, outermost first: (the node that owns the block, which of its blocks).
_Path = tuple[tuple[Node, int], ...]


def compose_parameter(
    module: torch.jit.ScriptModule,
    graphs: Mapping[str, Graph],
    names: set[str],
    attribute_name: str,
    composed: torch.jit.ScriptModule,
) -> None:
    """Let a module's result stand where a parameter stood, in every method and nested block, in lists of tensors too.

    The module is called once in each method that reads the parameter: before the first reader and outside of loops.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model that the graphs belong to; `composed` is its attribute already.
    graphs : mapping of str to Graph
        The module's own graphs by method, inlined.
    names : set of str
        Every qualified name of the parameter.
    attribute_name : str
        The root's attribute that holds `composed`.
    composed : torch.jit.ScriptModule
        Its `forward()` gives the weight.

    Raises
    ------
    KeyError
        No method reads the parameter.
    """
    storage = attribute(module, next(iter(names))).data_ptr()
    read = False
    for graph in graphs.values():
        root = self_value(graph)
        found = [
            (node, _path(node))
            for node in graph.findAllNodes("prim::GetAttr")
            if _reads(module, attribute_chain(node.output(), root), names, storage)
        ]
        if not found:
            continue
        read = True
        call = _call(graph, root, attribute_name, composed, _place(found))
        for node, _ in found:
            made = call.output()
            if node.output().type().kind() == "ListType":
                made = _remade_list(module, graph, root, node, made, storage)
            node.output().replaceAllUsesWith(made)
            if not node.hasUses():
                node.destroy()
    if not read:
        raise KeyError(f"no method reads the parameter {sorted(names)[0]!r}")


def _reads(module: torch.jit.ScriptModule, chain: str | None, names: set[str], storage: int) -> bool:
    if chain is None:
        return False
    if chain in names:
        return True
    held = attribute(module, chain)
    return isinstance(held, list) and any(isinstance(x, torch.Tensor) and x.data_ptr() == storage for x in held)


def _path(node: Node) -> _Path:
    path: list[tuple[Node, int]] = []
    block = node.owningBlock()
    while (owner := block.owningNode()) is not None:
        index = next(at for at, each in enumerate(owner.blocks()) if each.paramNode() == block.paramNode())
        path.append((owner, index))
        block = owner.owningBlock()
    return tuple(reversed(path))


def _place(found: list[tuple[Node, _Path]]) -> Node:
    """Give the node before which all readers can be served: in their innermost common block outside of any loop."""
    routes = []
    for node, path in found:
        outside = next((at for at, (owner, _) in enumerate(path) if owner.kind() == "prim::Loop"), len(path))
        routes.append(([*path, (node, 0)], outside))
    shared = min(outside for _, outside in routes)
    first = routes[0][0]
    depth = 0
    while depth < shared and all(route[depth] == first[depth] for route, _ in routes):
        depth += 1
    # The readers come in program order, so what holds the first one stands before what holds the others.
    return first[depth][0]


def _call(graph: Graph, root: Value, name: str, composed: torch.jit.ScriptModule, before: Node) -> Node:
    owner = graph.create("prim::GetAttr", [root], 1)
    owner.s_("name", name)
    owner.output().setType(composed._c._type())
    owner.insertBefore(before)
    call = graph.create("prim::CallMethod", [owner.output()], 1)
    call.s_("name", "forward")
    call.output().setType(torch._C.TensorType.get())
    call.insertBefore(before)
    call.copyMetadata(before)
    return call


def _remade_list(
    module: torch.jit.ScriptModule, graph: Graph, root: Value, node: Node, composed: Value, storage: int
) -> Value:
    """Build a list attribute anew from its members, with the composed weight in its place."""
    names = {tensor.data_ptr(): name for name, tensor in module.named_parameters(remove_duplicate=False)}
    held = attribute(module, str(attribute_chain(node.output(), root)))
    members: list[Value] = []
    last = node
    for index, tensor in enumerate(held):
        if tensor.data_ptr() == storage:
            members.append(composed)
            continue
        made = (
            _get_attributes(module, graph, root, names[tensor.data_ptr()])
            if tensor.data_ptr() in names
            else [_get_item(graph, node, index)]
        )
        for new in made:
            new.insertAfter(last)
            last = new
        members.append(last.output())
    remade = graph.create("prim::ListConstruct", members, 1)
    remade.output().setType(node.output().type())
    remade.insertAfter(last)
    return remade.output()


def _get_attributes(module: torch.jit.ScriptModule, graph: Graph, root: Value, chain: str) -> list[Node]:
    """Make the nodes that reach a tensor from the root."""
    nodes: list[Node] = []
    value, owner = root, module._c
    for name in chain.split("."):
        owner = owner.getattr(name)
        node = graph.create("prim::GetAttr", [value], 1)
        node.s_("name", name)
        value = node.output()
        value.setType(torch._C.TensorType.get() if isinstance(owner, torch.Tensor) else owner._type())
        nodes.append(node)
    return nodes


def _get_item(graph: Graph, node: Node, index: int) -> Node:
    item = graph.create("aten::__getitem__", [node.output(), constant_before(graph, node, index)], 1)
    item.output().setType(torch._C.TensorType.get())
    return item
