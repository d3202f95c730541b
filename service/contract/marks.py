"""Named points on a job's way where a test may end or stop a process; outside of such tests they do nothing.

`RANKPRESS_MARK` names one point and what happens there, as `point=action`, the actions being those of `_ACTIONS`;
`RANKPRESS_MARK_ONCE` is a file whose making lets the first process that comes by act, and no other.
"""

import os
import signal
from collections.abc import Callable
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


def mark(point: Point) -> None:
    """Pass a point."""
    asked = os.environ.get(MARK_VARIABLE)
    if asked is None:
        return
    name, _, action = asked.partition("=")
    if name == point and _first():
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


def _kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()  # this process dies of its parent's end, as it should


def _kill_both() -> None:
    """End parent and child at the same moment, as a machine that loses its power does."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill_self": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill_parent": _kill_parent,
    "kill_both": _kill_both,
    "stop_self": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
