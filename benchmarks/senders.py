"""The two ways of a file that `benchmarks.upload` compares, each run as a process of its own.

`plain SOURCE TARGET` reads, hashes, writes and syncs; `send SOURCE URL KEY_FILE` uploads with the project's client.
Each prints its seconds and the SHA-256, as JSON; the start of the interpreter counts for neither.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

BLOCK_BYTES = 4 * 1024**2


def plain(source: Path, target: Path) -> tuple[float, str]:
    """One process, block by block."""
    began = time.perf_counter()
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reading, target.open("xb", buffering=0) as writing:
        while block := reading.read(BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
        os.fsync(writing.fileno())
    return time.perf_counter() - began, digest.hexdigest()


def send(source: Path, url: str, key: str) -> tuple[float, str]:
    """From the first byte read to the answer, the connection included."""
    from service.client.api import Client

    with Client(url, key, timeout_seconds=600) as client:
        began = time.perf_counter()
        model = client.upload_model(source)
        return time.perf_counter() - began, model.sha256


def main(way: str, source: str, *rest: str) -> None:
    """Go one of the ways."""
    if way == "plain":
        seconds, sha256 = plain(Path(source), Path(rest[0]))
    else:
        seconds, sha256 = send(Path(source), rest[0], Path(rest[1]).read_text(encoding="utf-8").strip())
    print(json.dumps({"seconds": seconds, "sha256": sha256}))


if __name__ == "__main__":
    main(*sys.argv[1:])
