"""Named points on a job's way where a test may end or stop processes; outside of such tests they do nothing.

`RANKPRESS_MARK` names one point and what happens there, as `point=action` or `point=action@n`, the actions being those
of `_ACTIONS` and n the passing (counted in each process) that acts, 1 by default. `RANKPRESS_MARK_ONCE` is a file whose
making lets the first process that comes so far act, and no other.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

Point = Literal[
    "after_commit",  # the job is accepted, its bell not rung
    "after_claim",
    "child_started",
    "mid_l_step",
    "mid_c_step",
    "checkpoint_written",  # as a temporary file
    "checkpoint_renamed",
    "checkpoint_row",  # its row is committed
    "artifact_put",  # its bytes are stored, no row speaks of them
    "before_finish",
]
MARK_VARIABLE, ONCE_VARIABLE = "RANKPRESS_MARK", "RANKPRESS_MARK_ONCE"
MARK_VARIABLES = (MARK_VARIABLE, ONCE_VARIABLE)  # a child inherits them

_passed: Counter[str] = Counter()


def mark(point: Point) -> None:
    """Pass a point."""
    asked = os.environ.get(MARK_VARIABLE)
    if asked is None:
        return
    name, _, what = asked.partition("=")
    if name != point:
        return
    action, _, passing = what.partition("@")
    _passed[point] += 1
    if _passed[point] >= int(passing or 1) and _first():
        _ACTIONS[action]()


def _first() -> bool:
    path = os.environ.get(ONCE_VARIABLE)
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()  # this process dies of its parent's end, as it should


def _kill_parent_and_self() -> None:
    """End parent and child at the same moment, as a machine that loses its power does."""
    os.kill(os.getppid(), signal.SIGKILL)
    _kill_self()


def _kill_children() -> None:
    for thread in Path("/proc/self/task").iterdir():
        for child in (thread / "children").read_text(encoding="ascii").split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def _kill_children_and_self() -> None:
    _kill_children()
    _kill_self()


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill_self": _kill_self,
    "kill_parent": _kill_parent,
    "kill_both": _kill_parent_and_self,
    "kill_children": _kill_children,
    "kill_all": _kill_children_and_self,
    "stop_self": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
