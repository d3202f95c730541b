"""Rank configurations: which form and rank stood for each term at each step, fenced like every effect."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, delete, insert, literal, or_, select, tuple_
from sqlalchemy.orm import Session

from service.contract.plan import Form, RankRow, ReasonCode
from service.store.fence import hold_lease
from service.store.tables import RankConfiguration as Row

_BATCH = 500  # rows in one statement, below SQLite's bound on variables


def insert_rank_rows(session: Session, job_id: str, epoch: int, rows: Sequence[RankRow]) -> bool:
    """Write what stood at one or more steps; False when the lease is lost.

    A resumed attempt repeats steps: rows of the same step from an earlier epoch are replaced, and the final choice
    removes what an earlier epoch wrote after it or chose.
    """
    if not hold_lease(session, job_id, epoch):
        return False
    if not rows:
        return True
    outdated: list[ColumnElement[bool]] = [Row.step.in_({row.step for row in rows})]
    chosen = [row.step for row in rows if row.chosen]
    if chosen:
        outdated += [Row.chosen.is_(True), Row.step > min(chosen)]
    session.execute(delete(Row).where(Row.job_id == job_id, Row.epoch < epoch, or_(*outdated)))
    latest = {(row.step, row.layer, row.term): row for row in rows}
    keys = list(latest)
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        same = and_(Row.job_id == job_id, tuple_(Row.step, Row.layer, Row.term).in_(batch))
        session.execute(delete(Row).where(same))
        session.execute(
            insert(Row),
            [{"job_id": job_id, "epoch": epoch, **latest[key].model_dump(mode="json")} for key in batch],
        )
    return True


def copy_rank_rows(session: Session, job_id: str, new_job_id: str) -> None:
    """Give a job that resumes from another's checkpoint what stood at its steps; what it repeats replaces them."""
    names = [column.name for column in Row.__table__.columns if column.name not in {"job_id", "epoch", "chosen"}]
    rows = select(literal(new_job_id), literal(0), literal(value=False), *(getattr(Row, name) for name in names)).where(
        Row.job_id == job_id
    )
    session.execute(insert(Row).from_select(["job_id", "epoch", "chosen", *names], rows))


def rank_history(session: Session, job_id: str) -> list[RankRow]:
    """Every row of the job, by step, layer and term."""
    query = select(Row).where(Row.job_id == job_id).order_by(Row.step, Row.layer, Row.term)
    return [
        RankRow(
            step=row.step,
            layer=row.layer,
            term=row.term,
            type=row.type,
            form=Form(row.form),
            rank=row.rank,
            params=row.params,
            macs=row.macs,
            bits=row.bits,
            details=row.details,
            relative_error=row.relative_error,
            reason=None if row.reason is None else ReasonCode(row.reason),
            chosen=row.chosen,
        )
        for row in session.scalars(query)
    ]
