"""Object stores by their URL: credentials from their own variables, patience that ends."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obstore.store import MemoryStore, ObjectStore, from_url

PART_BYTES = 5 * 1024**2  # the least that S3 takes for a part of an upload
PARTS_MAX = 9_000  # S3 takes 10,000
PARTS_AT_ONCE = 4
_TRUE = frozenset({"1", "true", "yes", "on"})


def open_remote(url: str, *, away_seconds: float) -> ObjectStore:
    """Open an object store; nothing is contacted. A request that finds it away raises after `away_seconds` at most.

    Buckets of S3 take their credentials, region and endpoint from the `AWS_…` variables.
    """
    if urlsplit(url).scheme == "memory":
        return MemoryStore()
    options: dict[str, Any] = {
        "client_options": client_options(os.environ, away_seconds),
        "retry_config": {
            "max_retries": 10,
            # No retry begins after this; one that has begun may take the whole timeout of a request.
            "retry_timeout": timedelta(seconds=away_seconds / 3),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=max(0.5, away_seconds / 15)),
                "base": 2,
            },
        },
    }
    return from_url(url, **options)


def client_options(environment: Mapping[str, str], away_seconds: float) -> dict[str, Any]:
    """How requests are sent: given options hide the variables that name the same ones, so those are read here."""
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=away_seconds / 6),
        "timeout": timedelta(seconds=away_seconds / 2),
    }
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    # Whoever names an endpoint without TLS means it.
    if environment.get("AWS_ALLOW_HTTP", "").lower() in _TRUE or endpoint.startswith("http://"):
        options["allow_http"] = True
    if bundle := environment.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(bundle).read_text(encoding="ascii")
    if proxy := environment.get("AWS_PROXY_URL"):
        options["proxy_url"] = proxy
    return options


def part_bytes(file_bytes: int) -> int:
    """The size of the parts of an upload: small, for memory's sake, unless there would be too many."""
    return max(PART_BYTES, -(-file_bytes // PARTS_MAX))
