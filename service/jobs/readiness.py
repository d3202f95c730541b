"""Whether the service can take jobs, show them, and have them run."""

import time
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from service.contract.resources import Health
from service.jobs.looks import LOOK_SECONDS, Look
from service.services import Services
from service.settings import QUEUES
from service.store.metrics import waiting_by_queue
from service.store.migration import schema_at_head
from service.store.workers import served_queues

READY, DEGRADED, UNAVAILABLE = "ready", "degraded", "unavailable"
OK = "ok"
_NEEDED = ("database", "schema", "blobs")  # without these nothing works; without the others jobs only wait

log = structlog.get_logger(__name__)


class Readiness:
    """Looks at each part, at all of them at once; a part that does not answer in time is not well."""

    def __init__(self, services: Services) -> None:
        self._services = services
        looks: dict[str, Callable[[], str]] = {
            "database": self._database,
            "schema": self._schema,
            "blobs": self._blobs,
            "broker": self._broker,
            "workers": self._workers,
        }
        self._looks = {name: Look(look) for name, look in looks.items()}

    def check(self, seconds: float = LOOK_SECONDS) -> Health:
        """Say how each part is; takes no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        asked = {name: look.begin() for name, look in self._looks.items()}
        checks = {name: _answer(name, future, deadline, seconds) for name, future in asked.items()}
        if checks["database"] != OK:
            checks["schema"] = checks["workers"] = "cannot be known without the database"
        elif checks["schema"] != OK:
            checks["workers"] = "cannot be known without the schema"
        if any(checks[name] != OK for name in _NEEDED):
            return Health(status=UNAVAILABLE, checks=checks)
        well = all(said == OK for said in checks.values())
        return Health(status=READY if well else DEGRADED, checks=checks)

    def _database(self) -> str:
        return OK if self._services.database.ping() else "does not answer"

    def _schema(self) -> str:
        if schema_at_head(self._services.database):
            return OK
        return "is not the one of this version: run `rankpress migrate`"

    def _blobs(self) -> str:
        return OK if self._services.blobs.probe() else "cannot be written"

    def _broker(self) -> str:
        if self._services.bell.queue_depth(QUEUES[0]) is not None:
            return OK
        return "does not answer: jobs are accepted and wait for the next sweep after it is back"

    def _workers(self) -> str:
        with self._services.database.read() as session:
            waiting = waiting_by_queue(session)
            unserved = sorted(waiting.keys() - served_queues(session, within_seconds=0)) if waiting else []
        told = (
            f"{waiting[queue]} {'job waits' if waiting[queue] == 1 else 'jobs wait'} in the queue {queue}, "
            f"which no live worker serves: start one with `rankpress worker --queue {queue}`"
            for queue in unserved
        )
        return "; ".join(told) or OK


def _answer(name: str, future: "Future[str]", deadline: float, seconds: float) -> str:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return f"did not answer within {seconds:g} s"
    except Exception as error:  # noqa: BLE001 - whatever a part raises, it is not well
        log.warning("look_failed", part=name, error=repr(error))
        return f"cannot be looked at ({type(error).__name__})"
