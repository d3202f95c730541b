"""Graphs made plain: branches that can go one way alone, and fused operators that have an unfused path beside them.

`nn.MultiheadAttention` and `nn.TransformerEncoderLayer` hold both in one graph. In eval mode without gradients they
hand all their weights to one fused operator, which can hold no factors; the reason not to is a text, empty where the
fused operator may run. `nn.TransformerEncoder` turns its input into a nested tensor for them alone.
"""

from collections.abc import Callable, Iterator

import torch

from worker.engine.network.graphs import Block, Graph, Node, Value, constant_before, is_tensor

FUSED_ATTENTION = frozenset({"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"})
_FUSED = FUSED_ATTENTION | {"aten::_nested_tensor_from_mask"}
# What torch.nn.MultiheadAttention itself sets when it is made and never again.
_FIXED_FLAGS = frozenset({"_qkv_same_embed_dim"})
_ROUNDS_MAX = 20


def simplify(graph: Graph) -> None:
    """Fold what can go one way alone, in place: `x is x`, equal results of both arms, constant conditions.

    Self-attention asks whether query, key and value are the same tensor; folded, one of its three ways of projecting
    the input is left, and all three give the same.
    """
    if not _identities(graph):
        return
    graph.setInsertPoint(graph.return_node())
    _propagate_constants(graph)
    for _ in range(_ROUNDS_MAX):
        merged = _merge_equal_views(graph) | _merge_equal_results(graph)
        if not (merged | _fold_identities(graph)):
            break
        _propagate_constants(graph)
    torch._C._jit_pass_dce(graph)


def fix_flags(graph: Graph, value_of: Callable[[Node], bool | None]) -> None:
    """Write torch's own fixed flags as constants, in place.

    Parameters
    ----------
    graph : Graph
        Inlined.
    value_of : callable
        From a `prim::GetAttr` node to the flag's value; None where it has none.
    """
    for node in [node for node in graph.findAllNodes("prim::GetAttr") if node.s("name") in _FIXED_FLAGS]:
        value = value_of(node)
        if value is not None:
            node.output().replaceAllUsesWith(constant_before(graph, node, value))
            node.destroy()


def fused_nodes(graph: Graph) -> list[Node]:
    """List the fused operators of attention that have an unfused path beside them."""
    return [node for node in _asked_for(graph) if node.kind() in FUSED_ATTENTION]


def take_plain_paths(graph: Graph, chosen: Callable[[Node], bool] = lambda _: True) -> bool:
    """Let attention run its unfused path, in place; where any does, inputs are not nested either.

    Parameters
    ----------
    graph : Graph
        Inlined.
    chosen : callable
        From a fused operator to whether it shall be off; all by default.

    Returns
    -------
    bool
        Whether anything was changed.
    """
    off = [node for node in fused_nodes(graph) if chosen(node)]
    if not off:
        return False
    off += [node for node in _asked_for(graph) if node.kind() not in FUSED_ATTENTION]
    for reason in [reason for node in off for reason in _reasons(node)]:
        made = constant_before(graph, reason.node(), "the layer is compressed")
        reason.replaceAllUsesWith(made)
    _propagate_constants(graph)
    torch._C._jit_pass_dce(graph)
    return True


def _propagate_constants(graph: Graph) -> None:
    torch._C._jit_pass_constant_propagation_immutable_types(graph)  # type: ignore[attr-defined]


def _asked_for(graph: Graph) -> list[Node]:
    return [node for kind in sorted(_FUSED) for node in graph.findAllNodes(kind) if _reasons(node)]


def _reasons(node: Node) -> list[Value]:
    """Find the texts that must be empty for a node to run, the outermost first."""
    found: list[Value] = []
    block: Block = node.owningBlock()
    while (owner := block.owningNode()) is not None and owner.kind() != "prim::Return":
        if owner.kind() == "prim::If" and next(iter(owner.blocks())).returnNode() == block.returnNode():
            found.extend(_empty_text(owner.inputsAt(0)))
        block = owner.owningBlock()
    return found[::-1][:1]


def _empty_text(condition: Value) -> Iterator[Value]:
    """Yield the text of a condition `not text`."""
    node = condition.node()
    for kind in ("aten::__not__", "aten::gt", "aten::len"):
        if node.kind() != kind:
            return
        text = node.inputsAt(0)
        node = text.node()
    if text.type().kind() == "StringType" and text.node().kind() == "prim::If":
        yield text


def _merge_equal_views(graph: Graph) -> bool:
    """Make one of several equal views of one tensor, where somebody asks whether tensors are the same."""
    if not any(is_tensor(node.inputsAt(0)) and is_tensor(node.inputsAt(1)) for node in _identities(graph)):
        return False
    return _merge_views_in(graph)


def _merge_views_in(block: Graph | Block) -> bool:
    changed = False
    first: dict[tuple[str, ...], Node] = {}
    for node in list(block.nodes()):
        for inner in node.blocks():
            changed |= _merge_views_in(inner)
        if node.kind() not in {"aten::unsqueeze", "aten::transpose"}:
            continue
        kept = first.setdefault((node.kind(), *(value.debugName() for value in node.inputs())), node)
        if kept is not node and node.output().uses():
            node.output().replaceAllUsesWith(kept.output())
            changed = True
    return changed


def _merge_equal_results(graph: Graph) -> bool:
    """Read the first of several results of a branch that are the same in both arms."""
    changed = False
    for node in [node for node in graph.findAllNodes("prim::If") if node.outputsSize() > 1]:
        arms = [[value.debugName() for value in block.outputs()] for block in node.blocks()]
        first: dict[tuple[str, ...], Value] = {}
        for given, result in zip(zip(*arms, strict=True), list(node.outputs()), strict=True):
            kept = first.setdefault(given, result)
            if kept is not result and kept.debugName() != result.debugName() and result.uses():
                result.replaceAllUsesWith(kept)
                changed = True
    return changed


def _identities(graph: Graph) -> list[Node]:
    return [*graph.findAllNodes("aten::__is__"), *graph.findAllNodes("aten::__isnot__")]


def _fold_identities(graph: Graph) -> bool:
    found = [node for node in _identities(graph) if node.inputsAt(0).debugName() == node.inputsAt(1).debugName()]
    for node in found:
        node.output().replaceAllUsesWith(constant_before(graph, node, node.kind() == "aten::__is__"))
        node.destroy()
    return bool(found)
