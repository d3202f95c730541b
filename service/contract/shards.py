"""What a WebDataset tar may hold: the service looks when it is uploaded, the engine before it decodes anything.

Only headers are read, by a reader of few words: one that knows no links, no sparse files and no compression meets no
surprise in them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

BLOCK_BYTES = 512
MEMBER_BYTES_MAX = 256 * 1024**2
_EXTENDED_BYTES_MAX = 64 * 1024
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's: a key, and everything after its first dot
_FILES, _DIRECTORY = {b"0", b"\0", b"7"}, b"5"
_LONG_NAME, _EXTENDED, _EXTENDED_FOR_ALL = b"L", b"x", b"g"

Kind = Literal["image", "array", "class", "numbers"]
KINDS: dict[str, Kind] = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "npy": "array",
    "cls": "class",
    "json": "numbers",
}
PICKLES = {"pyd", "pkl", "pickle", "pth", "pt"}


class TarRejectedError(ValueError):
    """The tar is not one we accept."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, which never becomes a path, and its size."""

    name: str
    size_bytes: int

    @property
    def key(self) -> str:
        """Of the sample that the file belongs to; empty where the name has no extension."""
        matched = _NAME.fullmatch(self.name)
        return matched.group(1) if matched else ""

    @property
    def extension(self) -> str:
        """What the file is to its sample: everything after the name's first dot, in lower case."""
        matched = _NAME.fullmatch(self.name)
        return matched.group(2).lower() if matched else ""


def kind_of(extension: str) -> Kind | None:
    """What an extension such as `jpg` or `left.npy` holds, or None for what is not read.

    Raises
    ------
    TarRejectedError
        When it is a pickle.
    """
    last = extension.rpartition(".")[2]
    if last in PICKLES:
        raise TarRejectedError(f"it holds .{last} files, which are Python pickles and never loaded")
    return KINDS.get(last)


def is_tar(beginning: bytes) -> bool:
    """Whether a file's first 512 bytes are a tar header."""
    return len(beginning) == BLOCK_BYTES and any(beginning) and _checksum_holds(beginning)


def walk_tar(stream: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar in order.

    Raises
    ------
    TarRejectedError
        When it is cut off or damaged, or holds anything but plain files and directories.
    """
    end = stream.seek(0, 2)
    place, long_name = 0, ""
    while True:
        stream.seek(place)
        header = stream.read(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            raise TarRejectedError("it does not end as a tar does: the file is cut off")
        if not any(header):
            return
        if not _checksum_holds(header):
            raise TarRejectedError(f"the header at byte {place} is damaged")
        size, kind = _number(header[124:136]), header[156:157]
        name, long_name = long_name or _name(header), ""
        if place + BLOCK_BYTES + size > end:
            raise TarRejectedError(f"'{name[:200]}' is cut off")
        if kind in {_LONG_NAME, _EXTENDED, _EXTENDED_FOR_ALL}:
            long_name = _extended(stream, kind, size)
        elif kind in _FILES:
            if size > MEMBER_BYTES_MAX:
                raise TarRejectedError(f"'{name[:200]}' has {size} bytes; at most {MEMBER_BYTES_MAX} are accepted")
            yield Member(name, size)
        elif kind != _DIRECTORY:
            raise TarRejectedError(f"'{name[:200]}' is a link or a special file; only plain files are accepted")
        place += BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _checksum_holds(header: bytes) -> bool:
    try:
        said = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    return said == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _number(field: bytes) -> int:
    """A size: octal digits, or the binary form of sizes that octal digits do not hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        found = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        found = -1
    if found < 0:
        raise TarRejectedError("a size in its headers is not a number")
    return found


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return whole.decode("utf-8", "surrogateescape")


def _extended(stream: BinaryIO, kind: bytes, size: int) -> str:
    """The name that an extended header gives the next file, or nothing."""
    if size > _EXTENDED_BYTES_MAX:
        raise TarRejectedError(f"an extended header has {size} bytes; at most {_EXTENDED_BYTES_MAX} are accepted")
    content = stream.read(size)
    if kind == _LONG_NAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    records = dict(_records(content))
    if strange := [key for key in records if key == "size" or key.startswith("GNU.")]:
        raise TarRejectedError(f"its extended headers say '{strange[0][:50]}'; sparse files and their like are refused")
    return records.get("path", "") if kind == _EXTENDED else ""


def _records(content: bytes) -> Iterator[tuple[str, str]]:
    """Records `length key=value` of an extended header."""
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if length <= len(digits) + 1 or length > len(content) or not equals:
            raise TarRejectedError("an extended header is damaged")
        yield key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
        content = content[length:]
