"""What can go wrong with the store of files, in words that callers can act on."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import obstore.exceptions

from service.contract.errors import ErrorCode, ProblemError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_ANSWER = "507 Insufficient Storage"
_REASON_LENGTH_MAX = 400


class BlobStoreAwayError(Exception):
    """The store does not answer, or does not let this service in; nothing is known to be wrong with the file itself.

    No OSError, so that nobody takes a store that is away for a file that is not there.
    """


class BlobDamagedError(OSError):
    """The bytes under a key are not those that were stored."""

    def __init__(self, key: str, expected_sha256: str, found_sha256: str) -> None:
        super().__init__(f"expected the SHA-256 {expected_sha256} of {key}; found {found_sha256}")
        self.key = key
        self.expected_sha256 = expected_sha256
        self.found_sha256 = found_sha256


@contextmanager
def store_errors(url: str, *, writing: bool = False) -> Iterator[None]:
    """Raise what a store raises as `BlobStoreAwayError`, or `STORAGE_FULL` where it has no room.

    A missing object stays a FileNotFoundError, but for a write nothing can be missing except the bucket itself.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not writing:
            raise
        raise BlobStoreAwayError(f"{url}: {_reason(error)}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise storage_full() from error
        raise BlobStoreAwayError(f"{url}: {_reason(error)}") from error
    except obstore.exceptions.BaseError as error:
        if _FULL_ANSWER in str(error):
            raise storage_full() from error
        raise BlobStoreAwayError(f"{url}: {_reason(error)}") from error


def storage_full() -> ProblemError:
    """The refusal of a file for which there is no room."""
    return ProblemError(
        ErrorCode.STORAGE_FULL,
        "expected room in the service's storage for the file; found none left: free some space, or give the service a "
        "larger disk or bucket",
    )


def _reason(error: Exception) -> str:
    """The first line: the rest of an object store's message is a picture of its internals."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:_REASON_LENGTH_MAX]
