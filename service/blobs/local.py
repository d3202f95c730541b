"""Files on a disk: moved so that a crash leaves all of one or nothing, and read in blocks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from service.blobs.writer import BLOCK_BYTES
from service.contract.errors import ErrorCode, ProblemError


def move_durably(path: Path, target: Path) -> None:
    """Rename within one file system, and make the name durable."""
    missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    os.utime(path)  # its age is counted from here, whenever it was written
    path.replace(target)
    for folder in {target.parent, *(folder.parent for folder in missing)}:
        _sync_directory(folder)


def copy_durably(path: Path, target: Path) -> None:
    """Write the same bytes to a new file, and wait for the disk."""
    with path.open("rb") as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy, BLOCK_BYTES)
        copy.flush()
        os.fsync(copy.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has a file's bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_range(path: Path, start: int, stop: int, block_bytes: int) -> Iterator[bytes]:
    """The bytes from `start` up to but without `stop`."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = stop - start
        while left > 0:
            block = file.read(min(block_bytes, left))
            if not block:
                raise ProblemError(ErrorCode.INTERNAL, f"expected {left} more bytes in a stored file; found its end")
            left -= len(block)
            yield block


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
