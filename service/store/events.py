"""The numbered history of a job."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from service.contract.events import Event as EventLine
from service.contract.events import EventKind
from service.store.fence import leased
from service.store.tables import Event, Job


def append_events(
    session: Session, job_id: str, epoch: int | None, events: Sequence[tuple[EventKind, Mapping[str, Any]]]
) -> bool:
    """Append lines, numbered 1, 2, 3, … within the job; with an epoch only while that attempt is the live one.

    Returns False, having written nothing, when the attempt no longer holds the job (or the job does not exist).
    """
    if not events:
        return True
    where = Job.id == job_id if epoch is None else leased(job_id, epoch)
    count = update(Job).where(where).values(last_event=Job.last_event + len(events)).returning(Job.last_event)
    last = session.execute(count).scalar_one_or_none()
    if last is None:
        return False
    first = last - len(events) + 1
    rows = [
        {"job_id": job_id, "number": first + index, "epoch": epoch, "kind": kind, "data": dict(data)}
        for index, (kind, data) in enumerate(events)
    ]
    session.execute(insert(Event), rows)
    return True


def repeat_key(kind: EventKind, data: Mapping[str, Any]) -> str | None:
    """What makes a line the same one when a resumed attempt tells it again; None for a line that is always new."""
    if kind is EventKind.STEP:
        return f"step {data.get('step')}"
    if kind is EventKind.METRIC:
        return f"metric {data.get('name')} {data.get('part')} {data.get('epoch')}"
    if kind is EventKind.WARNING:
        return f"warning {json.dumps(data, sort_keys=True, default=str)}"
    return None


def told_before(session: Session, job_id: str) -> frozenset[str]:
    """The keys of all lines that need not be told again."""
    kinds = (EventKind.STEP, EventKind.METRIC, EventKind.WARNING)
    query = select(Event.kind, Event.data).where(Event.job_id == job_id, Event.kind.in_(kinds))
    keys = (repeat_key(EventKind(row.kind), row.data) for row in session.execute(query))
    return frozenset(key for key in keys if key is not None)


def list_events(session: Session, job_id: str, after: int, limit: int) -> list[EventLine]:
    """The lines after a number, oldest first."""
    query = select(Event).where(Event.job_id == job_id, Event.number > after).order_by(Event.number).limit(limit)
    return [
        EventLine(id=row.number, epoch=row.epoch, kind=EventKind(row.kind), data=row.data, created_at=row.created_at)
        for row in session.scalars(query)
    ]
