"""Dataset files as memory-mapped arrays: `.npz`, `.safetensors`, WebDataset tars; converted once, never unpickled."""

import errno
import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.shards import open_shards

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ACCEPTED_KINDS = "fiub"
_COPY_BYTES = 1 << 20
_ITEM_BYTES_MAX = 8  # PyTorch has no wider real numbers
# An encrypted member and a header nested too deep are RuntimeErrors; a header of another structure is a TypeError.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, LookupError, TypeError, RuntimeError)
Arrays = dict[str, np.ndarray]


def open_arrays(path: Path, data_format: str, work_dir: Path) -> Arrays:
    """Open every array of a dataset file as a read-only memory map.

    Parameters
    ----------
    path : Path
        The dataset file.
    data_format : "npz", "safetensors" or "webdataset"
        Its format.
    work_dir : Path
        Where the members of an archive are laid out as plain files.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` naming the array, what was found, and what is accepted.
    """
    if data_format == "webdataset":
        return open_shards(path, work_dir)
    try:
        arrays = _open_npz(path, work_dir) if data_format == "npz" else _open_safetensors(path)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the worker's want of room, and no fault of the file
        raise ProblemError(ErrorCode.DATASET_INVALID, f"the {data_format} file cannot be read: {error}") from error
    if not arrays:
        raise ProblemError(ErrorCode.DATASET_INVALID, "the dataset holds no array; expected at least 'inputs'")
    return arrays


def _open_npz(path: Path, work_dir: Path) -> Arrays:
    work_dir.mkdir(parents=True, exist_ok=True)
    arrays: Arrays = {}
    with zipfile.ZipFile(path) as archive:
        for number, member in enumerate(archive.infolist()):
            if not member.filename.endswith(".npy"):
                raise ProblemError(
                    ErrorCode.DATASET_INVALID,
                    f"member '{member.filename}' of the npz is not an .npy array; save it with numpy.savez",
                )
            name = member.filename.removesuffix(".npy")
            target = work_dir / f"array-{number}.npy"  # no name of the archive becomes a path
            with archive.open(member) as source, target.open("wb") as copy:
                _check_npy_header(source, name)  # type: ignore[arg-type]
                source.seek(0)
                shutil.copyfileobj(source, copy, _COPY_BYTES)
            arrays[name] = np.load(target, mmap_mode="r", allow_pickle=False)
    return arrays


def _check_npy_header(source: BinaryIO, name: str) -> None:
    version = npy.read_magic(source)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    _, _, dtype = read(source)
    if dtype.kind not in _ACCEPTED_KINDS or dtype.itemsize > _ITEM_BYTES_MAX:
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"array '{name}' has dtype {dtype}; expected floating point, integers, uint8 or bool (objects are never "
            "unpickled)",
        )


def _open_safetensors(path: Path) -> Arrays:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise TypeError("the header is no JSON object")
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            accepted = ", ".join(_SAFETENSORS_DTYPES)
            raise ProblemError(
                ErrorCode.DATASET_INVALID, f"array '{name}' has dtype {entry['dtype']}; expected one of {accepted}"
            )
        begin, end = entry["data_offsets"]
        shape = tuple(int(size) for size in entry["shape"])
        if end - begin != int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize:
            raise ValueError(f"array '{name}' does not fill its place in the file")
        offset = 8 + length + int(begin)
        empty = end == begin
        arrays[name] = np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset=offset, shape=shape)
    return arrays
