"""The GPUs of this machine by UUID, found through the driver's library and without torch."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pynvml
import structlog

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Gpu:
    """A GPU; `uuid` is its name for CUDA_VISIBLE_DEVICES."""

    uuid: str
    name: str | None = None
    memory_bytes: int | None = None  # None where the driver does not tell

    def facts(self) -> dict[str, Any]:
        """What the worker's row says of it."""
        return asdict(self)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that this process may use: those of `CUDA_VISIBLE_DEVICES` in its order, else all of the driver's."""
    known = _driver_gpus()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return known
    names = [name.strip() for name in named.split(",") if name.strip() not in {"", "-1"}]
    return [_named(name, known) for name in names]


def _named(name: str, known: list[Gpu]) -> Gpu:
    """The GPU that CUDA means by an index or by the beginning of a UUID."""
    if name.isdigit() and int(name) < len(known):
        return known[int(name)]
    return next((gpu for gpu in known if gpu.uuid.startswith(name)), Gpu(name))


def _driver_gpus() -> list[Gpu]:
    """All GPUs in the order of their PCI addresses, which is the order that children are told to count in."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver, no GPU
    try:
        return [_facts(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.warning("gpus_unknown", error=str(error))
        return []
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _facts(handle: Any) -> Gpu:
    return Gpu(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )
