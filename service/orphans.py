"""Deleting files that no row speaks of, while uploads and attempts may be about to speak of them."""

from collections.abc import Collection, Iterable
from itertools import islice

import structlog

from service.blobs.errors import BlobStoreAwayError
from service.blobs.store import BlobStore
from service.contract.errors import ProblemError
from service.settings import Settings
from service.store.blobs import hold_blobs, unreferenced
from service.store.session import Database

CHECKPOINTS = "checkpoints/"
_KEYS_AT_ONCE = 500

log = structlog.get_logger(__name__)


def delete_orphans(database: Database, blobs: BlobStore, keys: Iterable[str], age_seconds: float) -> int:
    """Delete those of the keys that no row speaks of and that were last written so long ago; returns how many.

    Content is stored before its row is written, and stored anew when it is there: so it is young until it has its row,
    and the age spares it. A file that turned young after its age was read is deleted for all that; but rows are written
    under the same lock, by who looks again whether the file is there.
    """
    deleted = 0
    left = iter(keys)
    while batch := list(islice(left, _KEYS_AT_ONCE)):
        with database.read() as session:
            orphans = unreferenced(session, batch)
        for key in orphans:
            with database.write() as session:
                hold_blobs(session, [key])
                if unreferenced(session, [key]):
                    deleted += blobs.delete_if_older(key, age_seconds)
    return deleted


def settled_seconds(settings: Settings) -> float:
    """Age at which a stored file whose row was about to be written has it: an attempt is fenced long before."""
    return 2 * settings.reap_seconds


def delete_dropped(database: Database, blobs: BlobStore, keys: Collection[str], settled_seconds: float) -> None:
    """See to the files of rows that were deleted just now; what fails or is younger than this is left to the sweep."""
    checkpoints = {key for key in keys if key.startswith(CHECKPOINTS)}
    try:
        with database.read() as session:
            unshared = unreferenced(session, checkpoints)
        for key in unshared:  # nobody ever writes such a key again
            blobs.delete(key)
        delete_orphans(database, blobs, sorted(set(keys) - checkpoints), settled_seconds)
    except (BlobStoreAwayError, ProblemError, OSError) as error:
        log.warning("files_left_to_the_sweep", error=str(error))
