"""What this machine has: room on its disks, memory for its slots, GPUs, and a PyTorch that can use them."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from service.checks.finding import Finding, failed, ok, skipped, warning
from service.settings import GIB, Settings

MEMORY_BYTES_MIN = GIB  # PyTorch alone takes a good part of it


class SeenGpu(Protocol):
    """A GPU as it is visible here; without its memory when the driver does not know the name."""

    @property
    def uuid(self) -> str:
        """Its name for CUDA_VISIBLE_DEVICES."""

    @property
    def name(self) -> str | None:
        """Its model."""

    @property
    def memory_bytes(self) -> int | None:
        """Its memory."""


def check_disks(settings: Settings) -> list[Finding]:
    """Room where files, database, scratch and cache lie; a disk that holds several of them is named once."""
    places = [settings.data_dir.absolute()]
    if settings.resolved_blob_url.startswith("file:"):
        places.append(Path(unquote(urlsplit(settings.resolved_blob_url).path)))
    seen: dict[int, Path] = {}
    for place in places:
        seen.setdefault(_existing(place).stat().st_dev, place)
    return [_check_disk(place, settings.min_free_bytes) for place in seen.values()]


def _check_disk(place: Path, min_free_bytes: int) -> Finding:
    existing = _existing(place)
    try:
        with tempfile.TemporaryFile(dir=existing):
            free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        return failed("disk", f"{place} cannot be written: {error.strerror}", "give it to this user, or change --data")
    found = f"{_gib(free_bytes)} free under {place}"
    if free_bytes < min_free_bytes:
        advice = "free some, set retention (…_KEEP_SECONDS), or give it a larger disk"
        return failed("disk", f"{found}; expected RANKPRESS_MIN_FREE_BYTES = {_gib(min_free_bytes)}", advice)
    return ok("disk", found)


def check_memory(settings: Settings, gpus: Sequence[SeenGpu]) -> Finding:
    """What each slot of a worker on this machine would have."""
    slots = settings.slots or max(len(gpus) if settings.worker_queues != "cpu" else 0, 1)
    memory_bytes, threads = settings.memory_per_child_bytes(slots), settings.threads_per_child(slots)
    found = f"slots: {slots}, each with {_gib(memory_bytes)} and {threads} threads"
    if memory_bytes < MEMORY_BYTES_MIN:
        return warning("memory", found, "run fewer slots, or give the machine more memory")
    return ok("memory", found)


def check_gpu(settings: Settings, gpus: Sequence[SeenGpu] | None, torch_version: str | None) -> Finding:
    """GPUs and PyTorch's build; `gpus` is None where the packages of a worker are not installed.

    What is missing is a failure only where the queue gpu is served.
    """
    asked = "gpu" in settings.worker_queues.split(",")
    if gpus is None or torch_version is None:
        found = "the packages of a worker are not installed"
        return failed("gpu", found, "pip install 'rankpress[worker]'") if asked else skipped("gpu", found)
    if not gpus:
        if not asked:
            return ok("gpu", f"none; jobs run on the CPU (PyTorch {torch_version})")
        advice = "see what nvidia-smi says, and that the container was given the device; or serve the queue cpu alone"
        return failed("gpu", f"none is visible{_masked()}, and the queue gpu is to be served", advice)
    if strangers := unknown_gpus(gpus):
        found = f"CUDA_VISIBLE_DEVICES names {', '.join(strangers)}, which the driver does not know"
        return failed("gpu", found, "compare with `nvidia-smi -L`")
    named = ", ".join(f"{gpu.name or gpu.uuid} ({_gib(gpu.memory_bytes or 0)})" for gpu in gpus)
    if "+cpu" in torch_version and settings.worker_queues != "cpu":
        found = f"{named}, but PyTorch {torch_version} has no CUDA: every job of the queue gpu would fail"
        return failed("gpu", found, "install a CUDA build of the same version, or set RANKPRESS_WORKER_QUEUES=cpu")
    return ok("gpu", f"{named}; PyTorch {torch_version}")


def unknown_gpus(gpus: Sequence[SeenGpu]) -> list[str]:
    """Names among the visible GPUs that the driver does not know; a part of a GPU (MIG) has a name of its own."""
    return [gpu.uuid for gpu in gpus if gpu.memory_bytes is None and not gpu.uuid.startswith("MIG-")]


def installed_torch() -> str | None:
    """PyTorch's version with its build, without importing it; None where it is not installed."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _masked() -> str:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if named is None else f" (CUDA_VISIBLE_DEVICES is {named!r})"


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
