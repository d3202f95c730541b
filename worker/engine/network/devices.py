"""Devices that a model's code names, rewritten to the device of the run."""

import re
from collections.abc import Iterator

import torch

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.graphs import (
    Graph,
    Node,
    Value,
    attribute_chain,
    constant_before,
    method_names,
    open_graph,
    read_graph,
    self_value,
    source_line,
    walk,
)

_TEXT = re.compile(r"(cpu|cuda)(:\d+)?")
_PARTS_MAX = 100


def move_devices(module: torch.jit.ScriptModule, target: torch.device) -> None:
    """Rewrite the devices that tracing or scripting has written into a model, constants and attributes.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        Fresh from a file; edited in place.
    target : torch.device
        Where it shall run.

    Raises
    ------
    ProblemError
        `MODEL_UNSUPPORTED` with the source line, where a device is computed or written into an operator.
    """
    for method in method_names(module):
        graph = read_graph(module, method)
        _move_attributes(module, graph, target)
        if any(_names_other_device(node, target) for node in walk(graph)):
            _rewrite(open_graph(module, method), target, method)


def _move_attributes(module: torch.jit.ScriptModule, graph: Graph, target: torch.device) -> None:
    root = self_value(graph)
    for node in graph.findAllNodes("prim::GetAttr"):
        chain = attribute_chain(node.output(), root)
        if chain is None or node.output().type().kind() != "DeviceObjType":
            continue
        owner = module._c
        *path, name = chain.split(".")
        for part in path:
            owner = owner.getattr(part)
        owner.setattr(name, target)


def _names_other_device(node: Node, target: torch.device) -> bool:
    if node.kind() in {"aten::cuda", "aten::cpu"}:
        return bool(node.kind() != f"aten::{target.type}")
    if node.kind() == "aten::device":
        return target.type not in {"cuda", None} and any("cuda" in text for text in _computed_from(node.inputsAt(0)))
    device = _device_constant(node)
    return device is not None and (device.type, device.index or 0) != (target.type, target.index or 0)


def _computed_from(value: Value) -> Iterator[str]:
    """Yield the constant texts that a computed text is made of."""
    if value.node().kind() == "prim::Constant":
        return
    pending, seen = [value], 0
    while pending and seen < _PARTS_MAX:
        node = pending.pop().node()
        seen += 1
        if node.kind() == "prim::Constant":
            text = node.output().toIValue()
            if isinstance(text, str):
                yield text
        else:
            pending.extend(node.inputs())


def _device_constant(node: Node) -> torch.device | None:
    if node.kind() != "prim::Constant" or not node.outputsSize():
        return None
    value = node.output().toIValue()
    if isinstance(value, torch.device):
        return value
    feeds_device = isinstance(value, str) and any(use.user.kind() == "aten::device" for use in node.output().uses())
    return torch.device(value) if feeds_device and _TEXT.fullmatch(value) else None


def _rewrite(graph: Graph, target: torch.device, method: str) -> None:
    for node in [node for node in walk(graph) if _names_other_device(node, target)]:
        device = _device_constant(node)
        if device is None or device.type not in {"cpu", "cuda"}:
            line = source_line(node)
            raise ProblemError(
                ErrorCode.MODEL_UNSUPPORTED,
                f"The model moves tensors to a fixed device with {device or node.kind()} in {method}"
                f"{f' ({line})' if line else ''}, and here it runs on {target}. Write x.to(other.device) instead, "
                "so that tensors follow the input, and save the model again.",
            )
        moved = target if node.output().type().kind() == "DeviceObjType" else str(target)
        node.output().replaceAllUsesWith(constant_before(graph, node, moved))
        node.destroy()
    graph.lint()
