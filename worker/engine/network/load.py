"""TorchScript in: load a file as a fresh module on one device."""

import io
import re
from pathlib import Path

import torch

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.graphs import (
    Graph,
    Node,
    constant_before,
    method_names,
    open_graph,
    read_graph,
    source_line,
    walk,
)

_REASON_CHARACTERS = 500


def load_model(source: Path | bytes, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load a network: a TorchScript file with a `forward`; see `load_script`.

    Raises
    ------
    ProblemError
        `MODEL_CORRUPT` if torch cannot load it, `MODEL_UNSUPPORTED` if it has no `forward` or is tied to
        another device.
    """
    module = load_script(source, device)
    if "forward" not in module._c._method_names():
        raise ProblemError(
            ErrorCode.MODEL_UNSUPPORTED,
            "The model has no forward method; export one with torch.jit.script or torch.jit.trace.",
        )
    return module


def load_script(source: Path | bytes, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load a TorchScript file as a fresh module whose tensors and device constants are on one device.

    Parameters
    ----------
    source : Path or bytes
        The file, or its content.
    device : torch.device or str
        Where parameters, buffers and the devices written in the model's code go.

    Returns
    -------
    torch.jit.ScriptModule
        A module that shares nothing with any other and has never run.

    Raises
    ------
    ProblemError
        `MODEL_CORRUPT` if torch cannot load it, `MODEL_UNSUPPORTED` if it is tied to another device.
    """
    target = torch.device(device)
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        module: torch.jit.ScriptModule = torch.jit.load(opened, map_location=target)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError, EOFError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        raise ProblemError(
            ErrorCode.MODEL_CORRUPT,
            f"torch {torch.__version__} cannot load the file as TorchScript: {trim_reason(error)}. "
            "Save the model again with torch.jit.save and upload that file.",
        ) from error
    _move_device_constants(module, target)
    return module


def reload(module: torch.jit.ScriptModule, device: torch.device | str | None = None) -> torch.jit.ScriptModule:
    """Save a module to memory and load it again.

    An executed method keeps its plan, so an edited module must take this road before it is run or compared.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The module; it stays as it is.
    device : torch.device or str, optional
        Where the copy goes; by default every tensor stays where it is.

    Returns
    -------
    torch.jit.ScriptModule
        A fresh module with the same code, values and training flags.
    """
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    loaded: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device)  # type: ignore[no-untyped-call]
    return loaded


def trim_reason(error: BaseException) -> str:
    """Keep of an error's message what a user can act on: the last lines, without torch's C++ frames."""
    text = str(error).split("\nException raised from ")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    marked = max((index for index, line in enumerate(lines) if line.endswith("<--- HERE")), default=-1)
    # After the last marked line of source come the rest of that source, indented, and then the message.
    message = [line for line in lines[marked + 1 :] if not (marked >= 0 and line.startswith(" "))]
    reason = " ".join(line.strip() for line in message if not line.startswith("frame #")).rstrip(".")
    return reason if len(reason) <= _REASON_CHARACTERS else f"… {reason[-_REASON_CHARACTERS:]}"


def _move_device_constants(module: torch.jit.ScriptModule, target: torch.device) -> None:
    """Rewrite the devices that tracing or scripting has written into the code."""
    for method in method_names(module):
        if any(_names_other_device(node, target) for node in walk(read_graph(module, method))):
            _rewrite_devices(open_graph(module, method), target, method)


def _names_other_device(node: Node, target: torch.device) -> bool:
    if node.kind() in {"aten::cuda", "aten::cpu"}:
        return bool(node.kind() != f"aten::{target.type}")
    device = _device_constant(node)
    return device is not None and (device.type, device.index or 0) != (target.type, target.index or 0)


def _device_constant(node: Node) -> torch.device | None:
    if node.kind() != "prim::Constant" or not node.outputsSize():
        return None
    value = node.output().toIValue()
    if isinstance(value, torch.device):
        return value
    feeds_device = isinstance(value, str) and any(use.user.kind() == "aten::device" for use in node.output().uses())
    return torch.device(value) if feeds_device and re.fullmatch(r"(cpu|cuda)(:\d+)?", value) else None


def _rewrite_devices(graph: Graph, target: torch.device, method: str) -> None:
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
