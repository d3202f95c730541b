"""What holds a child: limits it puts on itself before torch is imported, and an environment without secrets."""

import ctypes
import os
import resource
import select
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from service.contract.marks import MARK_VARIABLES
from worker.channel import CHANNEL_FD_VARIABLE, Assignment

OPEN_FILES_MAX = 4096
_STDIN_FD = 0
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

# What a child inherits: how to find programs, libraries and the locale. Everything else may hold a secret.
_INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH")


def apply_limits(assignment: Assignment) -> None:
    """Bind this process to its supervisor and to its limits; the first thing a child does with its assignment.

    From here on the child dies with the supervisor's thread, when its standard input closes, or when nothing comes
    there for as long as the supervisor itself would let it live without a confirmed heartbeat, and a little more.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if assignment.supervisor_pid is not None and os.getppid() != assignment.supervisor_pid:
        os._exit(1)  # the supervisor died before the signal was asked for
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
    if assignment.memory_bytes_max is not None and assignment.device != "cuda":
        # CUDA reserves far more address space than it uses; there the supervisor watches the resident size.
        _lower(resource.RLIMIT_AS, assignment.memory_bytes_max)
    silences = (assignment.first_silence_seconds_max, assignment.silence_seconds_max)
    threading.Thread(target=_exit_without_supervisor, args=silences, name="supervisor-watch", daemon=True).start()


def child_environment(
    parent: Mapping[str, str], *, work_dir: Path, thread_count: int, channel_fd: int, gpu: str | None = None
) -> dict[str, str]:
    """Build a child's environment from an allow-list: no key, no URL, no variable of the service but the channel."""
    threads = str(thread_count)
    code_root = str(Path(__file__).resolve().parent.parent)
    return {
        **{name: parent[name] for name in (*_INHERITED, *MARK_VARIABLES) if name in parent},
        "PYTHONPATH": os.pathsep.join(filter(None, [code_root, parent.get("PYTHONPATH", "")])),
        "PYTHONSAFEPATH": "1",  # the working directory is the attempt's: nothing is imported from it
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # the order of sets reaches the bytes of an archive
        "OMP_NUM_THREADS": threads,
        # Threads that wait by spinning for long starve whoever shares the cores (measured on two cores beside two busy
        # processes: 41 s and more instead of 29), threads that never spin make small operators slow (0.9 ms a pass
        # instead of 0.15).
        "GOMP_SPINCOUNT": "10000",
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": gpu if gpu is not None else "",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HOME": str(work_dir),
        "TMPDIR": str(work_dir),
        CHANNEL_FD_VARIABLE: str(channel_fd),
    }


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def _lower(limit: int, value: int) -> None:
    """Lower both halves of a limit, so that it cannot be raised again."""
    _, hard = resource.getrlimit(limit)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (bound, bound))


def _readable(seconds: float | None) -> bool:
    """Whether something comes in time; this process may itself have stood still meanwhile, so look once more."""
    return any(select.select([_STDIN_FD], [], [], wait)[0] for wait in (seconds, 0))


def _exit_without_supervisor(first_seconds: float | None, seconds: float | None) -> None:
    """Wait for the end of standard input, or for too long a silence: of a supervisor that is stopped, or cut off."""
    while _readable(first_seconds) and os.read(_STDIN_FD, 4096):
        first_seconds = seconds
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
