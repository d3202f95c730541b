"""WebDataset tars as memory-mapped arrays: streamed once, a sample at a time, decoded and laid out on disk.

Decoding once, and not in every epoch, keeps the order of samples, a resume inside of an epoch and the parts of the
dataset what they are for every other format.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tokenize import TokenError
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from service.contract.errors import ErrorCode, ProblemError
from service.contract.shards import KINDS, Kind, Member, TarRejectedError, kind_of, walk_tar

INDEX_FILE = "shards.json"  # written last: with it the arrays are whole
PIXELS_MAX = 64 * 1024**2
DECODED_BYTES_MAX = 64 * 1024**3
DECODED_RATIO_MAX = 100  # decoded bytes for each byte of the file, beyond the first GiB
_DECODED_BYTES_FREE = 1024**3
_FIELDS_MAX = 64
_PARTS = ("val", "test")
_CONVERT_NUMBERS = 1 << 20
_WHOLE_MAX = 2**53  # beyond it float64, in which numbers are laid out, has gaps
# What Pillow and NumPy raise for bytes that are no image and no array.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
    struct.error,
    zlib.error,
    TokenError,
    Image.DecompressionBombError,
)
Arrays = dict[str, np.ndarray]


def open_shards(path: Path, work_dir: Path) -> Arrays:
    """Open a WebDataset tar as read-only memory maps.

    Each extension becomes an array, named by it without its type where something is left: `jpg`, `cls`, and `left` for
    `left.npy`. `inputs` is the first image or `.npy` of a sample where none has that name, `targets` its `.cls`, or
    else the second. Samples under `val/` and `test/` become `val_*` and `test_*`. Images are C×H×W in uint8.

    Parameters
    ----------
    path : Path
        The tar.
    work_dir : Path
        Where the arrays are laid out; one that holds them already is opened as it is.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` naming the sample, what was found, and what is accepted.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    index = work_dir / INDEX_FILE
    if not index.exists():
        try:
            _check_members(path)
            with _Layout(work_dir, path.stat().st_size) as layout:
                for sample in _samples(path):
                    layout.add(sample)
            layout.finish(index)
        except TarRejectedError as error:
            raise _invalid(f"found a tar of which {error}") from error
    entries = json.loads(index.read_text(encoding="utf-8"))
    return {name: _mapped(work_dir / entry["file"], entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def _check_members(path: Path) -> None:
    usable = False
    with path.open("rb") as stream:
        for member in walk_tar(stream):
            usable = kind_of(member.extension) is not None or usable
    if not usable:
        raise TarRejectedError(f"no file is one of {', '.join('.' + name for name in KINDS)}")


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """Samples in the tar's order: ``__key__``, and the bytes of each extension that is read."""

    def is_read(name: str) -> bool:
        return kind_of(Member(name, 0).extension) is not None

    with path.open("rb") as stream:
        try:
            files = tar_file_iterator(stream, select_files=is_read)
            yield from group_by_keys({**each, "__url__": ""} for each in files)
        except _UNREADABLE as error:
            raise TarRejectedError(f"the files cannot be read ({error})") from error


@dataclass
class _Field:
    """One array while it grows."""

    file: BinaryIO
    kind: Kind
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int = 0
    whole: bool = True  # of `numbers`: no fraction was among them

    def add(self, value: np.ndarray, *, whole: bool) -> None:
        self.file.write(value.tobytes())
        self.rows += 1
        self.whole = self.whole and whole


@dataclass
class _Layout:
    """Samples, appended to one file for each array."""

    work_dir: Path
    file_bytes: int
    names: dict[str, str] = field(default_factory=dict)  # of the first sample: extension → name
    fields: dict[str, _Field] = field(default_factory=dict)
    written_bytes: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self.fields.values():
            each.file.close()

    def add(self, sample: dict[str, Any]) -> None:
        """Decode a sample and append it to its part's arrays."""
        key = sample["__key__"]
        found = {extension: data for extension, data in sample.items() if not extension.startswith("__")}
        if not self.names:
            self.names = _names_of(key, found)
        found = {extension: data for extension, data in found.items() if extension not in self._left_out(found)}
        if found.keys() != self.names.keys():
            raise _invalid(
                f"sample '{key[:200]}' has {_listed(found)} and the first sample {_listed(self.names)}; the files of "
                "every sample must have the same extensions and stand together"
            )
        part = key.removeprefix("./").partition("/")[0]
        for extension, name in self.names.items():
            self._append(key, f"{part}_{name}" if part in _PARTS else name, extension, found[extension])

    def _left_out(self, found: dict[str, Any]) -> set[str]:
        """JSON files that hold no numbers in the first sample are metadata in every one."""
        return {each for each in found if each not in self.names and kind_of(each) == "numbers"}

    def _append(self, key: str, name: str, extension: str, data: bytes) -> None:
        kind = kind_of(extension)
        assert kind is not None  # noqa: S101  others were not read
        value, whole = _decoded(key, extension, kind, data)
        self.written_bytes += value.nbytes
        if self.written_bytes > min(DECODED_BYTES_MAX, _DECODED_BYTES_FREE + DECODED_RATIO_MAX * self.file_bytes):
            raise _invalid(f"the samples up to '{key[:200]}' decode to more than {self.written_bytes} bytes")
        known = self.fields.get(name)
        if known is None:
            known = self.fields[name] = self._new(kind, value)
        if kind == "image" and known.shape[0] == 3 and value.shape[0] == 1:
            value = np.repeat(value, 3, axis=0)  # a grey picture among coloured ones
        if (value.shape, value.dtype) != (known.shape, known.dtype):
            raise _invalid(
                f"'{extension}' of sample '{key[:200]}' is {value.dtype} of shape {value.shape}, the first one "
                f"{known.dtype} of {known.shape}; all must be alike: bring them to one size before"
            )
        known.add(value, whole=whole)

    def _new(self, kind: Kind, value: np.ndarray) -> _Field:
        file = (self.work_dir / f"field-{len(self.fields)}.raw").open("wb")
        return _Field(file, kind, value.shape, value.dtype)

    def finish(self, index: Path) -> None:
        """Write what the arrays are called, and where they are."""
        entries: dict[str, dict[str, Any]] = {}
        for name, each in self.fields.items():
            entries[name] = {
                "file": Path(each.file.name).name,
                "dtype": each.dtype.str if each.kind != "numbers" or not each.whole else _made_whole(each),
                "shape": [each.rows, *each.shape],
            }
        kinds = {name: kind_of(extension) for extension, name in self.names.items()}
        for alias, name in _aliases(kinds).items():
            for prefix in ("", *(f"{part}_" for part in _PARTS)):
                if prefix + name in entries:
                    entries.setdefault(prefix + alias, entries[prefix + name])
        index.write_text(json.dumps(entries), encoding="utf-8")


def _names_of(key: str, found: dict[str, Any]) -> dict[str, str]:
    """Names of the arrays, by the extensions of the first sample."""
    names: dict[str, str] = {}
    for extension, data in found.items():
        if kind_of(extension) == "numbers" and not _is_numbers(data):
            continue
        name = extension.rpartition(".")[0] or extension
        if name in names.values():
            raise _invalid(f"sample '{key[:200]}' has two files that would both be array '{name}'; rename one")
        names[extension] = name
    if not names or len(names) > _FIELDS_MAX:
        raise _invalid(f"sample '{key[:200]}' has {len(names)} files to read; expected 1 to {_FIELDS_MAX}")
    return names


def _aliases(kinds: dict[str, Kind | None]) -> dict[str, str]:
    """Which arrays are `inputs` and `targets` where no array has these names."""
    order = list(kinds)
    inputs = next((name for name in order if kinds[name] in {"image", "array"}), order[0])
    others = [name for name in order if name != inputs]
    targets = next((name for name in others if kinds[name] == "class"), others[0] if others else None)
    named = any(name.partition(".")[0] in {"inputs", "targets"} for name in order)
    if named:
        return {}
    return {"inputs": inputs} | ({"targets": targets} if targets is not None else {})


def _decoded(key: str, extension: str, kind: Kind, data: bytes) -> tuple[np.ndarray, bool]:
    """The value of a file, and whether it is whole numbers."""
    try:
        if kind == "image":
            return _image(data), False
        if kind == "array":
            return _array(data), False
        if kind == "class":
            return np.asarray(int(data.decode("ascii")), np.int64), True
        numbers = json.loads(data)
        return np.asarray(numbers, np.float64), _is_whole(numbers)
    except _UNREADABLE as error:
        raise _invalid(f"'{extension}' of sample '{key[:200]}' cannot be read: {str(error)[:300]}") from error


def _image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        if image.width * image.height > PIXELS_MAX:
            raise ValueError(f"it has {image.width}×{image.height} pixels; at most {PIXELS_MAX} are accepted")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels have mode {image.mode}; expected 8 bits a channel (store others as .npy)")
        grey = image.mode in {"1", "L"}
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _array(data: bytes) -> np.ndarray:
    """An ``.npy`` file; memory is taken for what is there, not for what the header promises."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"it has dtype {dtype}; expected numbers or booleans (objects would be a pickle)")
    if prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"it has {len(data) - stream.tell()} bytes for shape {shape} of {dtype}")
    value = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(value).reshape(shape)


def _is_numbers(data: bytes) -> bool:
    try:
        numbers = json.loads(data)
        return isinstance(numbers, (int, float, list)) and np.asarray(numbers).dtype.kind in "fiu"
    except (ValueError, RecursionError):
        return False


def _is_whole(numbers: Any) -> bool:
    if isinstance(numbers, list):
        return all(_is_whole(each) for each in numbers)
    return isinstance(numbers, int) and abs(numbers) < _WHOLE_MAX


def _made_whole(grown: _Field) -> str:
    """Turn rows that are all whole numbers into such; their dtype."""
    if grown.rows:
        rows = np.memmap(grown.file.name, grown.dtype, "r+")
        whole = rows.view(np.int64)
        for start in range(0, len(rows), _CONVERT_NUMBERS):
            whole[start : start + _CONVERT_NUMBERS] = rows[start : start + _CONVERT_NUMBERS].astype(np.int64)
        rows.flush()
    return np.dtype(np.int64).str


def _mapped(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=tuple(shape))


def _listed(extensions: dict[str, Any]) -> str:
    return ", ".join(f".{each}" for each in extensions) or "nothing to read"


def _invalid(found: str) -> ProblemError:
    return ProblemError(ErrorCode.DATASET_INVALID, f"expected samples of images, .npy, .cls or .json numbers; {found}")
