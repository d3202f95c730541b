"""Reading TorchScript graphs: methods, nodes in nested blocks, attribute chains, constants."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

# torch._C has no complete stubs for its graph classes; these names say which one is meant.
Graph: TypeAlias = Any
Block: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any

_Inside = tuple[int, ...]  # where a value stands in a tuple, and in the tuples inside of that
_TRANSPARENT = frozenset({"prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::_unwrap_optional"})


def method_names(module: torch.jit.ScriptModule) -> list[str]:
    """List the methods of the root module, `forward` first, the others in their own order."""
    names = list(module._c._method_names())
    return sorted(names, key=lambda name: name != "forward")


def read_graph(module: torch.jit.ScriptModule, method: str) -> Graph:
    """Copy a method's graph with all calls inlined; the module stays as it is."""
    graph = module._c._get_method(method).graph.copy()
    inline_calls(graph)
    return graph


def open_graph(module: torch.jit.ScriptModule, method: str) -> Graph:
    """Inline a method's own graph in place, ready to be edited."""
    graph = module._c._get_method(method).graph
    inline_calls(graph)
    return graph


def inline_calls(graph: Graph) -> None:
    """Inline every call in place, calls inside the called code too.

    The pass inlines what a called graph itself calls only while the executor may optimise, which a run for equal
    bytes turns off.
    """
    with torch.jit.optimized_execution(True):  # type: ignore[attr-defined]
        torch._C._jit_pass_inline(graph)


def walk(block: Graph | Block) -> Iterator[Node]:
    """Yield every node of a graph or block, nested blocks included, in program order."""
    pending = [iter(block.nodes())]
    while pending:
        node = next(pending[-1], None)
        if node is None:
            pending.pop()
            continue
        yield node
        pending.extend(iter(inner.nodes()) for inner in reversed(list(node.blocks())))


def constant_before(graph: Graph, node: Node, content: Any) -> Value:
    """Insert a constant before a node.

    The point of insertion goes back to the end of the graph: a pass that finds it at a destroyed node ends the process.
    """
    graph.setInsertPoint(node)
    made = graph.insertConstant(content)
    graph.setInsertPoint(graph.return_node())
    return made


def self_value(graph: Graph) -> Value:
    """Return the graph's first input: the module that the method belongs to."""
    return next(iter(graph.inputs()))


def see_through(value: Value) -> Value:
    """Step back over what leaves a tensor as it is: casts, and branches whose other arm raises."""
    while (before := _before(value)) is not None:
        value = before
    return value


def _before(value: Value) -> Value | None:
    node = value.node()
    if node.kind() in _TRANSPARENT:
        return node.inputsAt(0)
    if node.kind() != "prim::If":
        return None
    at = next(index for index, each in enumerate(node.outputs()) if each.debugName() == value.debugName())
    arms = [list(block.outputs())[at] for block in node.blocks()]
    made = [arm for arm in arms if arm.node().kind() != "prim::Uninitialized"]
    return made[0] if len(made) == 1 else None


def attribute_chain(value: Value, root: Value) -> str | None:
    """Return the dotted name of an attribute reached from `root` by `prim::GetAttr` alone, else None."""
    names: list[str] = []
    value = see_through(value)
    while value.debugName() != root.debugName():
        node = value.node()
        if node.kind() != "prim::GetAttr":
            return None
        names.append(node.s("name"))
        value = node.inputsAt(0)
    return ".".join(reversed(names)) or None


def attribute(module: torch.jit.ScriptModule, chain: str) -> Any:
    """Look up a dotted attribute on the compiled module (parameters, buffers, plain values, submodules)."""
    found: Any = module._c
    for name in chain.split("."):
        found = found.getattr(name)
    return found


def constant(module: torch.jit.ScriptModule, value: Value, root: Value) -> Any:
    """Evaluate a value that does not depend on the inputs: constants, lists of them, attributes.

    Raises
    ------
    LookupError
        The value is computed while the model runs.
    """
    value = see_through(value)
    node = value.node()
    if node.kind() == "prim::Constant":
        return value.toIValue()
    if node.kind() in {"prim::ListConstruct", "prim::TupleConstruct"}:
        return [constant(module, item, root) for item in node.inputs()]
    chain = attribute_chain(value, root)
    if chain is None:
        raise LookupError(f"{node.kind()} is computed while the model runs")
    return attribute(module, chain)


def is_tensor(value: Value) -> bool:
    """Tell whether a value is typed as a plain (not optional) tensor."""
    return bool(value.type().kind() == "TensorType")


def branch_of(end: Node) -> Node | None:
    """Give the `prim::If` whose arm ends at a `prim::Return`."""
    owner = end.owningBlock().owningNode()
    return owner if owner is not None and owner.kind() == "prim::If" else None


def is_read(value: Value) -> bool:
    """Tell whether the graph's outputs may depend on a value; if not, it may never be computed."""
    pending: list[tuple[Value, _Inside]] = [(value, ())]
    seen: set[tuple[str, _Inside]] = set()
    while pending:
        current, inside = pending.pop()
        if (current.debugName(), inside) in seen:
            continue
        seen.add((current.debugName(), inside))
        for use in current.uses():
            made = _made_with(use, inside)
            if made is None:
                return True
            pending.extend(made)
    return False


def _made_with(use: Any, inside: _Inside) -> list[tuple[Value, _Inside]] | None:
    """List what a use makes of a value; None where it does more than that."""
    node, kind = use.user, use.user.kind()
    if kind == "prim::TupleConstruct":
        return [(node.output(), (use.offset, *inside))]
    if kind == "prim::TupleUnpack" and inside:
        return [(node.outputsAt(inside[0]), inside[1:])]
    if kind == "prim::TupleIndex" and inside:
        at = node.inputsAt(1).toIValue()
        return [] if isinstance(at, int) and 0 <= at != inside[0] else [(node.output(), inside[1:])]
    if kind == "prim::Return" and (branch := branch_of(node)) is not None:
        return [(branch.outputsAt(use.offset), inside)]
    if kind.startswith("aten::") and not kind.endswith("_"):
        return [(made, ()) for made in node.outputs()]
    return None


def source_line(node: Node) -> str:
    """Return where in the user's own source a node stands, as 'file, line n: code', or '' when unknown."""
    lines = [line for line in node.sourceRange().splitlines() if line.strip()]
    place = next((line.strip() for line in lines if line.lstrip().startswith("File ")), "")
    marked = next((index for index, line in enumerate(lines) if "HERE" in line and "~" in line), 0)
    code = lines[marked - 1].strip() if marked else ""
    return f"{place}: {code}" if place and code else place or code
