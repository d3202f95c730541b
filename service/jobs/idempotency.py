"""Idempotency keys: a request that is sent twice starts one job."""

import re

import structlog
from sqlalchemy.orm import Session

from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.services import Services
from service.store import idempotency
from service.store.idempotency import Fresh, Replay

MAX_KEY_LENGTH = 255
_KEY = re.compile(rf"[\x21-\x7e]{{1,{MAX_KEY_LENGTH}}}")

log = structlog.get_logger(__name__)


def reserve(services: Services, owner: str, key: str) -> Fresh | Replay:
    """Reserve the key for a request that begins, or find the job that an earlier one with this key started.

    A fresh key is to be completed with the job or released. While the first request is under way others are refused
    with `IDEMPOTENCY_IN_FLIGHT`.
    """
    if not _KEY.fullmatch(key):
        message = f"expected 1 to {MAX_KEY_LENGTH} visible ASCII characters; found {len(key)} characters: use a UUID"
        error = FieldError(pointer="/header/Idempotency-Key", code="idempotency_key", message=message)
        raise ProblemError(ErrorCode.REQUEST_INVALID, f"Idempotency-Key: {message}", errors=[error])
    with services.database.write() as session:
        found = idempotency.begin(
            session, owner, key, in_flight_seconds=services.settings.idempotency_in_flight_seconds
        )
    if isinstance(found, Fresh | Replay):
        return found
    raise ProblemError(
        ErrorCode.IDEMPOTENCY_IN_FLIGHT,
        "the first request with this Idempotency-Key has not been answered yet; wait for it, or try again shortly",
    )


def release(services: Services, fresh: Fresh) -> None:
    """Free the key of a request that was refused; a failure to do so is logged, for the key frees itself in time."""
    try:
        with services.database.write() as session:
            idempotency.abandon(session, fresh.reservation)
    except Exception as error:  # noqa: BLE001  (the request's own error is the one to tell)
        log.warning("idempotency key not freed", error=str(error))


def release_all(services: Services) -> None:
    """Free the keys of requests that an earlier process died with; only for a start that serves the store alone."""
    try:
        with services.database.write() as session:
            idempotency.abandon_all(session)
    except Exception as error:  # noqa: BLE001  (a service starts without its database too, and says so in readiness)
        log.warning("idempotency keys not freed", error=str(error))


def tie(session: Session, fresh: Fresh, fingerprint: str, job_id: str) -> None:
    """Tie the key to the job, in the transaction that inserts it; refused if another request stands for it by now."""
    if not idempotency.complete(session, fresh.reservation, fingerprint, job_id):
        raise ProblemError(
            ErrorCode.IDEMPOTENCY_IN_FLIGHT,
            "this request took so long that another one with its Idempotency-Key has begun; wait for that one",
        )


def check_same(found: Replay, fingerprint: str) -> None:
    """Refuse a repeated key whose request is not the first one's."""
    if found.fingerprint != fingerprint:
        raise ProblemError(
            ErrorCode.IDEMPOTENCY_MISMATCH,
            "this Idempotency-Key was used for another model, dataset, spec, name or retry; send a new key for a "
            "new job",
        )
