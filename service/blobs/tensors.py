"""The tensors of a TorchScript archive, read from the opcodes of its pickles: nothing is unpickled, no torch needed."""

import pickletools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.blobs.zips import UNREADABLE

MAX_PICKLE_BYTES = 64 * 1024**2
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}  # fmt: skip
_PUSHED = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK, _OTHER = object(), object()
_AXES_MAX = 64  # as in torch
_IMAGE_SIDE, _TOKENS = 32, 16


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the pickle describes it; sizes and strides count elements of its storage."""

    name: str  # of the attribute, without the path to it
    owner: str  # the class of the module it belongs to
    record: str  # of the archive: the member data/RECORD or constants/RECORD
    item_bytes: int
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """One past the last element of the storage that the tensor reaches."""
        if 0 in self.shape:
            return 0
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    record: str
    size: int


class _Unfamiliar(Exception):  # noqa: N818 - not an error: the pickle is left to torch
    pass


def read_tensors(pickle: bytes) -> list[StoredTensor]:
    """The tensors of one pickle in its order; none where it is written in a way that torch.jit.save does not."""
    try:
        return _Machine().run(pickle)
    except (_Unfamiliar, ValueError, IndexError, KeyError, TypeError):
        return []


def misplaced_tensor(tensors: Sequence[StoredTensor], record_bytes: Callable[[str], int | None]) -> str | None:
    """What is wrong with the first tensor that does not lie within its record; None where all do.

    Torch reads what a pickle claims without looking at how long the record is.
    """
    for tensor in tensors:
        found, claimed = record_bytes(tensor.record), tensor.storage_size * tensor.item_bytes
        if found is None:
            return f"the values of {tensor.name!r} are missing in it"
        if found < claimed:
            return f"{tensor.name!r} needs {claimed} bytes and has {found}"
        if (
            tensor.offset < 0
            or min((*tensor.shape, *tensor.strides), default=0) < 0
            or tensor.extent > tensor.storage_size
        ):
            return f"{tensor.name!r} reaches beyond its own values"
    return None


def likely_inputs(model: Path) -> list[dict[str, Any]] | None:
    """Guess `example_inputs` from the first layer's weight; sides of images are not written in weights."""
    try:
        with zipfile.ZipFile(model) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.partition("/")[2] == "data.pkl")
            tensors = read_tensors(archive.read(entry)) if entry.file_size <= MAX_PICKLE_BYTES else []
    except (*UNREADABLE, OSError, StopIteration):
        return None
    weight = next((tensor for tensor in tensors if tensor.name == "weight" and len(tensor.shape) > 1), None)
    if weight is None:
        return None
    if "Embedding" in weight.owner:
        return [{"shape": [1, _TOKENS], "dtype": "int64", "high": weight.shape[0]}]
    return [{"shape": [1, weight.shape[1], *[_IMAGE_SIDE] * (len(weight.shape) - 2)], "dtype": "float32"}]


class _Machine:
    """The stack machine of a pickle, in which nothing is built but what describes a tensor."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._owner = ""
        self._tensors: list[StoredTensor] = []

    def run(self, pickle: bytes) -> list[StoredTensor]:
        for opcode, argument, _ in pickletools.genops(pickle):
            self._step(opcode.name, argument)
        return self._tensors

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self._memo[argument] = stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._take_global(str(argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in {"EMPTY_DICT", "EMPTY_LIST"}:
            stack.append(_OTHER)
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            stack.append(tuple(self._pop(int(name[-1]))))
        else:
            self._build(name)

    def _build(self, name: str) -> None:
        if name == "BINPERSID":
            self._stack.append(_storage(self._stack.pop()))
        elif name in {"REDUCE", "NEWOBJ"}:
            made, arguments = self._pop(2)
            self._stack.append(self._made(made, arguments))
        elif name in {"SETITEMS", "APPENDS"}:
            self._to_mark()
        elif name in {"BUILD", "APPEND"}:
            self._pop(1)
        elif name == "SETITEM":
            self._pop(2)
        elif name not in {"PROTO", "STOP"}:
            raise _Unfamiliar

    def _take_global(self, name: str) -> None:
        if name.startswith("__torch__"):
            self._owner = name
        self._stack.append(_Global(name))

    def _made(self, made: Any, arguments: Any) -> object:
        if made == _Global("torch._utils _rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            item_bytes = _ITEM_BYTES.get(storage.kind) if isinstance(storage, _Storage) else None
            if len(shape) != len(strides) or len(shape) > _AXES_MAX:
                raise _Unfamiliar
            if not all(type(number) is int for number in (offset, *shape, *strides)):
                raise _Unfamiliar
            if item_bytes is not None:
                name = self._stack[-1] if self._stack and isinstance(self._stack[-1], str) else "a constant"
                described = StoredTensor(
                    name, self._owner, storage.record, item_bytes, storage.size, offset, shape, strides
                )
                self._tensors.append(described)
        return _OTHER

    def _pop(self, count: int) -> list[Any]:
        popped = self._stack[-count:]
        if len(popped) < count:
            raise _Unfamiliar
        del self._stack[-count:]
        return popped

    def _to_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise _Unfamiliar
        popped = self._stack[place + 1 :]
        del self._stack[place:]
        return popped


def _storage(persistent_id: Any) -> _Storage:
    _, kind, record, _, size = persistent_id
    if not isinstance(kind, _Global) or not isinstance(record, str) or not isinstance(size, int):
        raise _Unfamiliar
    return _Storage(kind.name.partition(" ")[2], record, size)
