"""Whose requests a key speaks for: the configured key, else what the database says, remembered for a few seconds."""

import hmac
import threading
import time
from collections.abc import Callable

from service.services import Services
from service.store.keys import digest_of, owner_of_digest

REMEMBERED_KEYS = 4096  # of each kind; strangers never drive out the owners
_LONGEST_KEY = 512


class Authenticator:
    """Answers of the database are remembered `key_cache_seconds`, counted from the moment they were asked for.

    A revoked key is therefore refused that long after the revocation at the latest; a new key works at once.
    """

    def __init__(self, services: Services, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = services.database
        self._owner = services.settings.owner
        self._seconds = services.settings.key_cache_seconds
        self._configured = None if services.api_key is None else digest_of(services.api_key)
        self._clock = clock
        self._owners: dict[str, tuple[float, str | None]] = {}
        self._strangers: dict[str, tuple[float, str | None]] = {}
        self._lock = threading.Lock()

    def remembered(self, key: str) -> tuple[bool, str | None]:
        """Whether the answer is known without asking, and the answer; never waits."""
        if len(key) > _LONGEST_KEY:
            return True, None
        # Digests have one length, so the comparison's time says nothing about the key's.
        digest = digest_of(key)
        if self._configured is not None and hmac.compare_digest(digest, self._configured):
            return True, self._owner
        found = self._owners.get(digest) or self._strangers.get(digest)
        if found is None or self._clock() - found[0] >= self._seconds:
            return False, None
        return True, found[1]

    def owner_of(self, key: str) -> str | None:
        """Ask the database, and remember what it says; None for a key that is unknown or revoked."""
        digest, asked_at = digest_of(key), self._clock()
        with self._database.read() as session:
            owner = owner_of_digest(session, digest)
        with self._lock:
            self._owners.pop(digest, None)
            self._strangers.pop(digest, None)
            kind = self._strangers if owner is None else self._owners
            if len(kind) >= REMEMBERED_KEYS:
                del kind[next(iter(kind))]  # the one that was asked for longest ago
            kind[digest] = (asked_at, owner)
        return owner
