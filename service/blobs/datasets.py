"""Is an uploaded file a dataset? Its headers are read; nothing is unpickled and no numeric library is needed."""

import ast
import json
import math
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from service.blobs.zips import LOCAL_MAGIC, UNREADABLE, ZipRejectedError, open_checked_zip
from service.contract.errors import ErrorCode, ProblemError
from service.contract.shards import BLOCK_BYTES, TarRejectedError, is_tar, kind_of, walk_tar

MAX_ARRAYS = 10_000
MAX_UNPACKED_BYTES = 64 * 1024**3
_MAX_NPY_HEADER_BYTES = 64 * 1024
_MAX_SAFETENSORS_HEADER_BYTES = 16 * 1024**2
_NPY_MAGIC = b"\x93NUMPY"
_GZIP_MAGIC = b"\x1f\x8b"
_DESCR = re.compile(r"[<>|=]?([biufc])([0-9]{1,2})")
_SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_HOW_TO = "save it with numpy.savez(path, inputs=…, targets=…) or safetensors.numpy.save_file"


_HOW_TO_TAR = "write samples as KEY.jpg, .png, .npy, .cls or .json, those of one key together"


@dataclass(frozen=True)
class ArrayFacts:
    """Type (in the file's own words) and shape of one array."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DatasetFacts:
    """What a dataset holds, from its headers."""

    format: str  # "npz", "safetensors" or "webdataset"
    arrays: dict[str, ArrayFacts]


def check_dataset(path: Path, *, max_unpacked_bytes: int = MAX_UNPACKED_BYTES) -> str:
    """The format of a dataset, `npz`, `safetensors` or `webdataset`; raises `DATASET_INVALID` for anything else."""
    return inspect_dataset(path, max_unpacked_bytes=max_unpacked_bytes).format


def inspect_dataset(path: Path, *, max_unpacked_bytes: int = MAX_UNPACKED_BYTES) -> DatasetFacts:
    """The names, types and shapes of a dataset's arrays; raises `DATASET_INVALID` with what was found."""
    with path.open("rb") as file:
        beginning = file.read(BLOCK_BYTES)
    if not beginning:
        raise _invalid("an empty file", _HOW_TO)
    if beginning.startswith(LOCAL_MAGIC):
        facts = DatasetFacts("npz", _read_npz(path, max_unpacked_bytes))
    elif is_tar(beginning):
        facts = DatasetFacts("webdataset", _read_tar(path))
    elif len(beginning) > 8 and beginning[8:9] == b"{":
        facts = DatasetFacts("safetensors", _read_safetensors(path))
    elif beginning.startswith(_NPY_MAGIC):
        raise _invalid("a single .npy array without a name", _HOW_TO)
    elif beginning.startswith(_GZIP_MAGIC):
        raise _invalid("a gzip file", "unpack it: a .tar is taken as it is")
    elif beginning[0] == 0x80 and beginning[1:2] <= b"\x05":
        raise _invalid("a Python pickle, which is never loaded", _HOW_TO)
    else:
        raise _invalid(f"a file that begins with the bytes {beginning[:4].hex(' ')}", _HOW_TO)
    if not facts.arrays:
        raise _invalid("no array in the file", _HOW_TO)
    return facts


def _read_npz(path: Path, max_unpacked_bytes: int) -> dict[str, ArrayFacts]:
    try:
        with open_checked_zip(path, max_entries=MAX_ARRAYS, max_unpacked_bytes=max_unpacked_bytes) as archive:
            return {_array_name(entry): _read_member(archive, entry) for entry in archive.infolist()}
    except ZipRejectedError as error:
        raise _invalid(f"a zip of which {error}", _HOW_TO) from error
    except UNREADABLE as error:
        raise _invalid(f"a damaged zip ({error})", "save and upload the file again") from error


def _array_name(entry: zipfile.ZipInfo) -> str:
    if not entry.filename.endswith(".npy"):
        raise _invalid(f"the file {entry.filename!r} in the zip, which is not an array", _HOW_TO)
    return entry.filename.removesuffix(".npy")


def _read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> ArrayFacts:
    name = _array_name(entry)
    with archive.open(entry) as file:
        header, header_bytes = _npy_header(file, name)
    descr, shape = header.get("descr"), header.get("shape")
    matched = _DESCR.fullmatch(descr) if isinstance(descr, str) else None
    if matched is None:
        held = "Python objects, which are never unpickled" if "O" in str(descr) else f"the type {descr!r}"
        raise _invalid(f"{held} in the array {name!r}", "store numbers or booleans (float32, int64, uint8, …)")
    if not _is_shape(shape):
        raise _invalid(f"the shape {shape!r} of the array {name!r}", "save the file again")
    expected = header_bytes + math.prod(shape) * int(matched.group(2))
    if entry.file_size != expected:
        raise _invalid(f"{entry.file_size} bytes instead of {expected} for the array {name!r}", "save the file again")
    return ArrayFacts(str(descr), tuple(shape))


def _npy_header(file: IO[bytes], name: str) -> tuple[dict[str, Any], int]:
    start = file.read(8)
    wide = start[6:7] in (b"\x02", b"\x03")
    length_bytes = file.read(4 if wide else 2)
    if not start.startswith(_NPY_MAGIC) or len(length_bytes) != (4 if wide else 2):
        raise _invalid(f"no .npy header in the array {name!r}", _HOW_TO)
    (length,) = struct.unpack("<I" if wide else "<H", length_bytes)
    if length > _MAX_NPY_HEADER_BYTES:
        raise _invalid(f"a header of {length} bytes in the array {name!r}", "store numbers, not structured records")
    try:
        header = ast.literal_eval(file.read(length).decode("utf-8" if start[6:7] == b"\x03" else "latin-1").strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _invalid(f"a header that cannot be read in the array {name!r}", "save the file again") from error
    if not isinstance(header, dict):
        raise _invalid(f"a header that cannot be read in the array {name!r}", "save the file again")
    return header, 8 + len(length_bytes) + length


def _read_safetensors(path: Path) -> dict[str, ArrayFacts]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_SAFETENSORS_HEADER_BYTES, size - 8):
            raise _invalid(f"a safetensors header of {length} bytes in a file of {size}", "save and upload it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _invalid("a safetensors header that is not JSON", "save and upload it again") from error
    if not isinstance(header, dict):
        raise _invalid("a safetensors header that is not a JSON object", "save and upload it again")
    data_bytes = size - 8 - length
    return {name: _tensor_facts(name, entry, data_bytes) for name, entry in header.items() if name != "__metadata__"}


def _tensor_facts(name: str, entry: Any, data_bytes: int) -> ArrayFacts:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    bits = _SAFETENSORS_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not _is_shape(shape) or not _is_shape(offsets) or len(offsets) != 2:
        raise _invalid(f"the entry {name!r} of the safetensors header incomplete", "save and upload it again")
    start, stop = offsets
    if stop - start != math.prod(shape) * bits // 8 or stop > data_bytes:
        raise _invalid(f"fewer bytes than the array {name!r} needs", "the file is cut off: upload it again")
    return ArrayFacts(str(dtype), tuple(shape))


def _read_tar(path: Path) -> dict[str, ArrayFacts]:
    """The extensions of the samples, with what they hold; shapes are in no header."""
    found: dict[str, ArrayFacts] = {}
    try:
        with path.open("rb") as file:
            for member in walk_tar(file):
                kind = kind_of(member.extension)
                if kind is not None and len(found) < MAX_ARRAYS:
                    found.setdefault(member.extension, ArrayFacts(kind, ()))
    except TarRejectedError as error:
        raise _invalid(f"a tar of which {error}", _HOW_TO_TAR) from error
    if not found:
        raise _invalid("a tar without a file that is read", _HOW_TO_TAR)
    return found


def _is_shape(value: Any) -> TypeGuard[tuple[int, ...] | list[int]]:
    return isinstance(value, (tuple, list)) and all(type(size) is int and size >= 0 for size in value)


def _invalid(found: str, change: str) -> ProblemError:
    return ProblemError(
        ErrorCode.DATASET_INVALID,
        f"expected a dataset as .npz, .safetensors or WebDataset .tar; found {found}: {change}",
    )
