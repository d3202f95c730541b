"""The layers of a job's model, and the plan: what each of them became."""

from collections.abc import Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from service.contract.plan import LayerFacts, LayerPlan, make_plan
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
    return make_plan(layer_facts(session, job_id), rank_history(session, job_id))
