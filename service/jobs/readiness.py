"""Whether the service can take jobs and show them."""

from service.contract.resources import Health
from service.services import Services
from service.settings import QUEUES
from service.store.migration import schema_at_head

_WRONG_SCHEMA = "is not the one of this version: run `rankpress migrate`"
READY, DEGRADED, UNAVAILABLE = "ready", "degraded", "unavailable"


def check_readiness(services: Services) -> Health:
    """Look at each part: without database, schema or blob store nothing works; without the broker jobs only wait."""
    database = services.database.ping()
    schema = database and schema_at_head(services.database)
    blobs = services.blobs.probe()
    broker = services.bell.queue_depth(QUEUES[0]) is not None
    checks = {
        "database": _said(well=database, else_="does not answer"),
        "schema": _said(well=schema, else_=_WRONG_SCHEMA if database else "cannot be known without the database"),
        "blobs": _said(well=blobs, else_="cannot be written"),
        "broker": _said(well=broker, else_="does not answer: jobs are accepted and wait for the next sweep"),
    }
    if not (database and schema and blobs):
        return Health(status=UNAVAILABLE, checks=checks)
    return Health(status=READY if broker else DEGRADED, checks=checks)


def _said(*, well: bool, else_: str) -> str:
    return "ok" if well else else_
