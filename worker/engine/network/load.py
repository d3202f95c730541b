"""TorchScript in: load a file as a fresh module on one device."""

import io
from pathlib import Path

import torch

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.devices import move_devices
from worker.engine.network.parameters import all_parameters
from worker.engine.network.thaw import thaw

_REASON_CHARACTERS = 500
_ONE_DNN_CONSTANT = "required keyword attribute 'value'"  # torch writes a constant in oneDNN's layout without its value


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
        before = " as it is before torch.jit.optimize_for_inference" if _ONE_DNN_CONSTANT in str(error) else ""
        raise ProblemError(
            ErrorCode.MODEL_CORRUPT,
            f"torch {torch.__version__} cannot load the file as TorchScript: {trim_reason(error)}. "
            f"Save the model again{before} with torch.jit.save and upload that file.",
        ) from error
    move_devices(module, target)
    _separate(module)
    return reload(module, target) if thaw(module) else module


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


def _separate(module: torch.jit.ScriptModule) -> None:
    """Give each parameter memory of its own: one that is cut from a larger block would keep the block in every file.

    Recurrent layers that were on a CUDA device are saved so.
    """
    parameters = all_parameters(module)
    names: dict[int, int] = {}
    for tensor in parameters.values():
        names[tensor.data_ptr()] = names.get(tensor.data_ptr(), 0) + 1
    for tensor in parameters.values():
        block = tensor.untyped_storage().nbytes()
        if tensor.numel() and block > tensor.numel() * tensor.element_size() and names[tensor.data_ptr()] == 1:
            tensor.data = tensor.data.clone()
