"""The layers of a job's model, and the plan: what each of them became."""

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from service.contract.plan import REASON_MEANINGS, Form, LayerFacts, LayerPlan, RankRow, ReasonCode, TermPlan
from service.store.fence import hold_lease
from service.store.ranks import rank_history
from service.store.tables import Layer


def insert_layers(session: Session, job_id: str, epoch: int, layers: Sequence[LayerFacts]) -> bool:
    """Write what the census found, in place of an earlier attempt's; False when the lease is lost."""
    if not hold_lease(session, job_id, epoch):
        return False
    session.execute(delete(Layer).where(Layer.job_id == job_id))
    if layers:
        session.execute(
            insert(Layer), [{"job_id": job_id, "epoch": epoch, **layer.model_dump(mode="json")} for layer in layers]
        )
    return True


def layer_facts(session: Session, job_id: str) -> list[LayerFacts]:
    """The layers as they were found, in the order in which they run."""
    query = select(Layer).where(Layer.job_id == job_id).order_by(Layer.position)
    return [
        LayerFacts(
            position=row.position,
            name=row.name,
            kind=row.kind,
            weight=row.weight,
            weight_shape=row.weight_shape,
            input_shape=row.input_shape,
            output_shape=row.output_shape,
            calls=row.calls,
            params=row.params,
            macs=row.macs,
        )
        for row in session.scalars(query)
    ]


def layer_plan(session: Session, job_id: str) -> list[LayerPlan]:
    """What each layer became: by its chosen rows if they are there, else by its latest step."""
    by_layer: dict[str, list[RankRow]] = defaultdict(list)
    for row in rank_history(session, job_id):
        by_layer[row.layer].append(row)
    return [_plan(facts, _standing(by_layer[facts.name])) for facts in layer_facts(session, job_id)]


def _standing(rows: list[RankRow]) -> list[RankRow]:
    candidates = [row for row in rows if row.chosen] or rows
    latest = max((row.step for row in candidates), default=0)
    return [row for row in candidates if row.step == latest]


def _plan(facts: LayerFacts, rows: list[RankRow]) -> LayerPlan:
    kept = [row for row in rows if row.form is not Form.DENSE and (row.rank or 0) > 0]
    form = Form.SUM if len(kept) > 1 else kept[0].form if kept else Form.DENSE
    reason = _reason(rows, kept)
    return LayerPlan(
        **facts.model_dump(),
        form=form,
        reason=reason,
        message=None if reason is None else REASON_MEANINGS[reason],
        relative_error=max((row.relative_error for row in rows), default=0.0),
        compressed_params=sum(row.params for row in rows) if rows else facts.params,
        compressed_macs=_compressed_macs(facts, rows),
        terms=[_term(row) for row in rows if row.form is not Form.DENSE],
        step=rows[0].step if rows else None,
    )


def _reason(rows: list[RankRow], kept: list[RankRow]) -> ReasonCode | None:
    """A dense layer's reason is its dense row's, else its first term's; a compressed one's is what all kept share."""
    if kept:
        reasons = {row.reason for row in kept}
        return reasons.pop() if len(reasons) == 1 else None
    dense = [row.reason for row in rows if row.form is Form.DENSE]
    return next((reason for reason in [*dense, *(row.reason for row in rows)] if reason is not None), None)


def _compressed_macs(facts: LayerFacts, rows: list[RankRow]) -> int | None:
    if facts.macs is None or not rows:
        return facts.macs
    return sum(row.macs for row in rows)


def _term(row: RankRow) -> TermPlan:
    return TermPlan(
        term=row.term,
        form=row.form,
        rank=row.rank,
        params=row.params,
        macs=row.macs,
        reason=row.reason,
        macs_stay=row.form is Form.COMPOSED,
    )
