"""What operators are shown: the workers, and the figures behind the metrics."""

import structlog
from sqlalchemy.exc import SQLAlchemyError

from service.contract.resources import GpuResource, WorkerPage, WorkerResource
from service.jobs.looks import Look
from service.services import Services
from service.store.metrics import StoreFigures, read_figures
from service.store.tables import Worker
from service.store.workers import list_workers

log = structlog.get_logger(__name__)


def read_workers(services: Services, *, include_gone: bool = False) -> WorkerPage:
    """The workers that live, and those that are gone if asked for."""
    with services.database.read() as session:
        return WorkerPage(items=[_resource(row) for row in list_workers(session, include_gone=include_gone)])


class Figures:
    """The store's figures, read anew at each call."""

    def __init__(self, services: Services) -> None:
        self._database = services.database
        self._look = Look(self._read)

    def now(self) -> StoreFigures | None:
        """The figures; None while the database does not give them in time."""
        try:
            return self._look.answer()
        except (SQLAlchemyError, OSError) as error:  # a TimeoutError is an OSError
            log.warning("figures_not_read", error=type(error).__name__)
            return None

    def _read(self) -> StoreFigures:
        with self._database.read() as session:
            return read_figures(session)


def _resource(row: Worker) -> WorkerResource:
    gpus = row.devices.get("cuda")
    return WorkerResource(
        id=row.id,
        state="live" if row.gone_at is None else "gone",
        host=row.host,
        pid=row.pid,
        version=row.version,
        queues=row.queues,
        slots=row.slots,
        busy=row.busy,
        gpus=[GpuResource.model_validate(gpu) for gpu in gpus] if isinstance(gpus, list) else [],
        started_at=row.started_at,
        last_seen_at=row.last_seen_at,
        gone_at=row.gone_at,
    )
