"""Counters of what has happened, over all processes: each grows in the transaction of the change that it counts."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.session import insert_if_absent
from service.store.tables import Counter

ATTEMPTS_ENDED = "attempts_ended"  # by outcome
LEASE_EXPIRIES = "lease_expiries"
FENCED_WRITES_REFUSED = "fenced_writes_refused"
JOBS_SUBMITTED = "jobs_submitted"
JOBS_ENDED = "jobs_ended"  # by state
PHASE_SECONDS = "phase_seconds"  # by phase
PHASE_COUNT = "phase_count"  # by phase


def count(session: Session, name: str, label: str = "", amount: float = 1.0) -> None:
    """Add to a counter."""
    row = (Counter.name == name, Counter.label == label)
    grow = update(Counter).where(*row).values(value=Counter.value + amount)
    if session.execute(grow.returning(Counter.name)).first() is not None:
        return
    if not insert_if_absent(session, Counter, {"name": name, "label": label, "value": amount}):
        session.execute(grow)  # another transaction has made the row meanwhile


def read_counters(session: Session) -> dict[str, dict[str, float]]:
    """Every counter that has ever counted: name, label, value."""
    counters: dict[str, dict[str, float]] = {}
    for row in session.scalars(select(Counter)):
        counters.setdefault(row.name, {})[row.label] = row.value
    return counters
