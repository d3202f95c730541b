"""What holds of every zip we accept, checked on its directory alone: no entry is unpacked here."""

import stat
import struct
import zipfile
import zlib
from pathlib import Path

_END_BYTES = 22
_END_MAGIC = b"PK\x05\x06"
_ENCRYPTED = 0x1
LOCAL_MAGIC = b"PK\x03\x04"
# What zipfile raises for a member that is damaged or written in a way it does not know.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class ZipRejectedError(Exception):
    """The zip is not one we accept; `damaged` when it looks cut off or overwritten rather than made so."""

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


def open_checked_zip(path: Path, *, max_entries: int, max_unpacked_bytes: int) -> zipfile.ZipFile:
    """Open a zip whose directory holds no surprise, or raise `ZipRejectedError` with what is wrong."""
    _check_end(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError, EOFError) as error:
        raise ZipRejectedError(f"its directory cannot be read ({error})", damaged=True) from error
    try:
        _check_entries(path, archive.infolist(), max_entries, max_unpacked_bytes)
    except ZipRejectedError:
        archive.close()
        raise
    return archive


def _check_end(path: Path) -> None:
    """The directory's end must be the file's end: a comment or a second directory after it could be read otherwise."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES))
        end = file.read(_END_BYTES)
    if len(end) < _END_BYTES or not end.startswith(_END_MAGIC):
        raise ZipRejectedError("it does not end with a zip directory: the file is cut off", damaged=True)


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], max_entries: int, max_unpacked_bytes: int) -> None:
    if not entries:
        raise ZipRejectedError("it holds no files")
    if len(entries) > max_entries:
        raise ZipRejectedError(f"it holds {len(entries)} files; at most {max_entries} are accepted")
    if min(entry.header_offset for entry in entries) != 0:
        raise ZipRejectedError("its first file does not stand at its beginning", damaged=True)
    seen: set[str] = set()
    for entry in entries:
        _check_entry(entry)
        # Torch looks names up without regard to case, so two that differ by case alone are one name twice.
        if entry.filename.lower() in seen:
            raise ZipRejectedError(f"the name {entry.filename!r} stands in it twice")
        seen.add(entry.filename.lower())
    packed = sum(entry.compress_size for entry in entries)
    if packed > path.stat().st_size:
        raise ZipRejectedError("its files overlap")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max_unpacked_bytes:
        raise ZipRejectedError(f"it unpacks to {unpacked} bytes; at most {max_unpacked_bytes} are accepted")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    if entry.orig_filename != name or "\\" in name or "\0" in name:
        raise ZipRejectedError(f"the name {entry.orig_filename!r} holds a character that no such file has")
    if name.startswith("/") or ".." in name.split("/"):
        raise ZipRejectedError(f"the name {name!r} leads out of the archive")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise ZipRejectedError(f"{name!r} is a link")
    if entry.flag_bits & _ENCRYPTED:
        raise ZipRejectedError(f"{name!r} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ZipRejectedError(f"{name!r} is compressed by a method other than deflate")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise ZipRejectedError(f"{name!r} has two different sizes", damaged=True)
