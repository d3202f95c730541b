"""Where a job computes, what PyTorch is told once per process, and its random states."""

from collections.abc import Mapping

import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError


def choose_device(asked: str) -> torch.device:
    """Return the device of a job: `auto` is a CUDA device where there is one.

    Raises
    ------
    ProblemError
        ``DEVICE_UNAVAILABLE`` when a CUDA device is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ProblemError(
            ErrorCode.DEVICE_UNAVAILABLE, 'device is "cuda" but this worker has no CUDA device; use "auto" or "cpu"'
        )
    return torch.device("cuda" if available and asked != "cpu" else "cpu")


def prepare_process(thread_count: int, *, repeatable: bool = True) -> None:
    """Fix what the numbers of a run depend on besides its spec: the thread count, and the plain executor.

    The executor's setting belongs to the calling thread, which must be the one that trains. Without `repeatable` the
    executor stays as PyTorch has it, which is what users of an artifact will meet.

    TorchScript's profiling executor runs other kernels after the first calls than in them, so a resumed process would
    not repeat an uninterrupted one bit for bit; the plain executor runs the same operators every time.
    """
    torch.set_num_threads(thread_count)
    torch._C._set_graph_executor_optimize(not repeatable)
    torch.backends.cudnn.benchmark = False


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of PyTorch's generators that training on a device draws from, uint8 on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on from random states; a device whose state is not among them goes on from its own."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
