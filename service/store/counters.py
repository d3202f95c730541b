"""Counters of what has happened, over all processes: each grows in the transaction of the change that it counts."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store.tables import Counter
from service.store.upserts import add_to_rows

ATTEMPTS_ENDED = "attempts_ended"  # by outcome
LEASE_EXPIRIES = "lease_expiries"
FENCED_WRITES_REFUSED = "fenced_writes_refused"
JOBS_SUBMITTED = "jobs_submitted"
JOBS_ENDED = "jobs_ended"  # by state
PHASE_SECONDS = "phase_seconds"  # by phase
PHASE_COUNT = "phase_count"  # by phase


_WAITING = "rankpress_counts"


def count(session: Session, name: str, label: str = "", amount: float = 1.0) -> None:
    """Add to a counter, in the session's transaction."""
    waiting: dict[tuple[str, str], float] = session.info.setdefault(_WAITING, {})
    waiting[name, str(label)] = waiting.get((name, str(label)), 0.0) + amount


def write_counts(session: Session) -> None:
    """Write what the transaction has counted: last, for every other transaction waits for these rows, and in one order.

    `Database.write` does this before it commits.
    """
    waiting: dict[tuple[str, str], float] = session.info.pop(_WAITING, {})
    if waiting:
        rows = [{"name": name, "label": label, "value": value} for (name, label), value in sorted(waiting.items())]
        add_to_rows(session, Counter, rows, ("name", "label"), "value")


def read_counters(session: Session) -> dict[str, dict[str, float]]:
    """Every counter that has ever counted: name, label, value."""
    counters: dict[str, dict[str, float]] = {}
    for row in session.scalars(select(Counter)):
        counters.setdefault(row.name, {})[row.label] = row.value
    return counters
