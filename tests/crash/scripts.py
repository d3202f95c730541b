"""What the children of the fake runner do."""

from typing import Any


def chain(steps: int = 6, seconds: float = 0.1, **more: Any) -> dict[str, Any]:
    """A run of steps, each with a checkpoint, whose artifact depends on every one of them."""
    return {"learn": [["phase", "learning"], ["chain", steps, seconds, more.pop("every", 1)]], **more}


def dying_chain(steps: int, every: int) -> dict[str, Any]:
    """A chain that is killed again and again, but always further on."""
    return {"learn": [["phase", "learning"], ["chain", steps, 0.02, 1, every]]}


POISON: dict[str, Any] = {"learn": [["phase", "learning"], ["kill", 9]]}
POISON_FOR_WORKERS: dict[str, Any] = {"learn": [["phase", "learning"], ["kill_supervisor"], ["sleep", 60]]}
