"""What a check says."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended; only FAILED means that something does not work."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found there, and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def ok(name: str, found: str) -> Finding:
    """All well."""
    return Finding(name, Status.OK, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """It works, but not as it should."""
    return Finding(name, Status.WARNING, found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name, Status.FAILED, found, advice)


def skipped(name: str, why: str) -> Finding:
    """It was not looked at."""
    return Finding(name, Status.SKIPPED, why)
