"""Opaque prefixed ids: `job_`, `mdl_`, … and 26 characters that sort by creation time."""

import re
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32: no i, l, o, u
_TIME_BITS, _RANDOM_BITS = 48, 80
_LENGTH = 26
_PATTERN = re.compile(rf"(job|mdl|dst|art|ckp|att|wrk|req)_[{_ALPHABET}]{{{_LENGTH}}}")

JOB, MODEL, DATASET, ARTIFACT, CHECKPOINT, ATTEMPT, WORKER, REQUEST = (
    "job",
    "mdl",
    "dst",
    "art",
    "ckp",
    "att",
    "wrk",
    "req",
)


def new_id(prefix: str) -> str:
    """Make an id whose text order is its order in time to the millisecond, with 80 random bits after it."""
    milliseconds = (time.time_ns() // 1_000_000) & ((1 << _TIME_BITS) - 1)
    number = (milliseconds << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
    digits = [_ALPHABET[(number >> (5 * position)) & 31] for position in reversed(range(_LENGTH))]
    return f"{prefix}_{''.join(digits)}"


def is_id(text: str, prefix: str) -> bool:
    """Whether the text can be an id of this kind; one that cannot exist is answered as not found."""
    return text.startswith(f"{prefix}_") and _PATTERN.fullmatch(text) is not None
