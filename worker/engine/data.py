"""The parts of a dataset, and batches of them as the tensors that the network takes.

Nothing is chosen on the data that the report is made on: the *train* part is trained on, the *select* part chooses
ranks, iterates and stops, and the *report* part (the user's test data, if given) is scored once at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec
from worker.engine.data_files import Arrays

HELD_OUT_FRACTION = 0.2  # of the training arrays where no val_* is given
SAMPLES_MIN = 8  # two for each of select and report, and something to train on
RESIDENT_BYTES_MAX = 1 << 30  # parts up to this size are prepared once and kept as tensors
_CHECK_ROWS = 4096
PartName = Literal["train", "select", "report"]


@dataclass(frozen=True)
class Part:
    """Rows of some arrays: `rows` is None for all of them."""

    inputs: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    rows: np.ndarray | None

    def __len__(self) -> int:
        return len(self.inputs[0]) if self.rows is None else len(self.rows)


class Dataset:
    """Inputs and targets in three parts.

    Parameters
    ----------
    arrays : dict of str to ndarray
        Arrays of the dataset file.
    spec : DataSpec
        Which arrays are what, and how raw values become inputs.
    seed : int
        Splits held-out rows into parts.
    argument_names : sequence of str
        Names of the arguments of ``forward``, by which ``inputs.NAME`` arrays are ordered.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` when arrays are missing, differ in length, hold NaN, or are too few.
    """

    def __init__(self, arrays: Arrays, spec: DataSpec, seed: int, argument_names: Sequence[str]) -> None:
        self.spec = spec
        self.dtype = torch.float32
        self.input_names = _names(arrays, spec.inputs, argument_names, "inputs")
        self.target_names = _names(arrays, spec.targets, None, "targets")
        if not self.input_names:
            raise ProblemError(
                ErrorCode.DATASET_INVALID,
                f"no array '{spec.inputs}' in the dataset; found {', '.join(sorted(arrays))}. Name the arrays in "
                "data.inputs and data.targets",
            )
        self.report_is_test = f"test_{self.input_names[0]}" in arrays
        self._parts = _split(arrays, self.input_names, self.target_names, seed)
        self._resident: dict[tuple[str, str], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    @property
    def has_targets(self) -> bool:
        """Whether the dataset has targets."""
        return bool(self.target_names)

    def part(self, name: PartName) -> Part:
        """One part."""
        return self._parts[name]

    def size(self, name: PartName) -> int:
        """Number of samples of a part."""
        return len(self._parts[name])

    def rows(self, name: PartName, positions: np.ndarray, device: torch.device) -> "Batch":
        """Prepared inputs and targets at positions of a part."""
        resident = self._keep_resident(name, device)
        if resident is not None:
            index = torch.from_numpy(positions).to(device)
            return Batch(  # whole rows: index_select copies them three times as fast as indexing
                tuple(x.index_select(0, index) for x in resident[0]),
                tuple(y.index_select(0, index) for y in resident[1]),
            )
        return self._read(self._parts[name], positions, device)

    def batches(
        self, name: PartName, batch_size: int, device: torch.device, order: np.ndarray | None = None
    ) -> Iterator["Batch"]:
        """Prepared batches of a part, in order or in a given order; the last one may be smaller."""
        order = np.arange(self.size(name)) if order is None else order
        for start in range(0, len(order), batch_size):
            yield self.rows(name, order[start : start + batch_size], device)

    def _keep_resident(
        self, name: PartName, device: torch.device
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        key = (name, str(device))
        if key not in self._resident:
            part = self._parts[name]
            sizes = [array[0].size * 4 if len(array) else 0 for array in (*part.inputs, *part.targets)]
            if len(part) * sum(sizes) > RESIDENT_BYTES_MAX:
                return None
            batch = self._read(part, np.arange(len(part)), device)
            self._resident[key] = (batch.inputs, batch.targets)
        return self._resident[key]

    def _read(self, part: Part, positions: np.ndarray, device: torch.device) -> "Batch":
        rows = positions if part.rows is None else part.rows[positions]
        inputs = tuple(self.prepare(np.asarray(array[rows])).to(device) for array in part.inputs)
        targets = tuple(_target(np.asarray(array[rows]), self.dtype).to(device) for array in part.targets)
        return Batch(inputs, targets)

    def prepare(self, raw: np.ndarray) -> Tensor:
        """Raw rows as inputs: layout, then (x·scale − mean)/std; whole numbers other than uint8 stay what they are."""
        spec = self.spec
        tensor = _as_tensor(raw)
        if spec.layout == "NHWC" and tensor.dim() == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous()
        if tensor.is_floating_point() or tensor.dtype == torch.uint8:
            tensor = tensor.to(self.dtype)
            if spec.scale is not None:
                tensor = tensor * spec.scale
            if spec.mean is not None:
                tensor = tensor - _per_channel(spec.mean, tensor)
            if spec.std is not None:
                tensor = tensor / _per_channel(spec.std, tensor)
        elif tensor.dtype != torch.bool:
            tensor = tensor.to(torch.int64)
        return tensor


@dataclass(frozen=True)
class Batch:
    """Prepared inputs and targets."""

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])

    def pieces(self, size: int) -> list["Batch"]:
        """Split into micro-batches of at most `size` samples."""
        return [
            Batch(tuple(x[at : at + size] for x in self.inputs), tuple(y[at : at + size] for y in self.targets))
            for at in range(0, len(self), size)
        ]


def epoch_order(size: int, *path: int) -> np.ndarray:
    """Order of an epoch's samples: a function of the seed and the place in the run alone, so a resume repeats it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(path))).permutation(size)


def check_finite(arrays: Arrays, names: Sequence[str]) -> None:
    """Refuse NaN and infinities.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` with the array's name and the first row that is not finite.
    """
    for name in names:
        array = arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.ndim == 0:
            continue
        for start in range(0, len(array), _CHECK_ROWS):
            block = np.asarray(array[start : start + _CHECK_ROWS])
            finite = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
            if not finite.all():
                row = start + int(np.argmin(finite))
                raise ProblemError(
                    ErrorCode.DATASET_INVALID,
                    f"array '{name}' holds NaN or infinity, first in row {row}; remove or mend those rows",
                )


def _names(
    arrays: Arrays, wanted: str | list[str], argument_names: Sequence[str] | None, field: str
) -> tuple[str, ...]:
    """Names of the arrays that a part is made of, in the order of the arguments of forward."""
    if isinstance(wanted, list):
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise ProblemError(
                ErrorCode.DATASET_INVALID,
                f"data.{field} names {', '.join(missing)}, which the dataset lacks; found {', '.join(sorted(arrays))}",
            )
        return tuple(wanted)
    if wanted in arrays:
        return (wanted,)
    dotted = sorted(name for name in arrays if name.startswith(f"{wanted}."))
    if argument_names is None or not dotted:
        return tuple(dotted)
    suffixes = {name.removeprefix(f"{wanted}."): name for name in dotted}
    unknown = [suffix for suffix in suffixes if suffix not in argument_names]
    if unknown:
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"arrays {', '.join(wanted + '.' + name for name in unknown)} name no argument of forward; its arguments "
            f"are {', '.join(argument_names)}",
        )
    passed = list(argument_names[: len(suffixes)])
    if missing := [name for name in passed if name not in suffixes]:  # arguments are passed by place
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"forward takes {', '.join(argument_names)} in this order, but there is no array "
            f"{', '.join(f'{wanted}.{name}' for name in missing)}",
        )
    return tuple(suffixes[name] for name in passed)


def _split(arrays: Arrays, inputs: tuple[str, ...], targets: tuple[str, ...], seed: int) -> dict[PartName, Part]:
    def gather(prefix: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]] | None:
        if prefix + inputs[0] not in arrays:
            return None
        missing = [prefix + name for name in (*inputs, *targets) if prefix + name not in arrays]
        if missing:
            raise ProblemError(
                ErrorCode.DATASET_INVALID, f"arrays {', '.join(missing)} are missing beside '{prefix + inputs[0]}'"
            )
        made = tuple(arrays[prefix + name] for name in inputs), tuple(arrays[prefix + name] for name in targets)
        _check_lengths([prefix + name for name in (*inputs, *targets)], [*made[0], *made[1]])
        for name in (*inputs, *targets) if prefix else ():
            _check_alike(prefix + name, arrays[prefix + name], name, arrays[name])
        return made

    train, held, test = gather(""), gather("val_"), gather("test_")
    check_finite(arrays, [prefix + name for prefix in ("", "val_", "test_") for name in (*inputs, *targets)])
    assert train is not None  # noqa: S101  the caller found the first input array
    count = len(train[0][0])
    if count < SAMPLES_MIN:
        raise ProblemError(
            ErrorCode.DATASET_INVALID, f"the dataset has {count} samples; at least {SAMPLES_MIN} are needed"
        )
    order = epoch_order(count, seed, 0x5B117)  # a stream of its own, apart from those of the epochs
    train_rows: np.ndarray | None = None
    if held is None:
        kept = max(2, round(count * HELD_OUT_FRACTION))
        kept = kept if test is None else max(1, kept // 2)
        held, held_rows = train, np.sort(order[:kept])
        train_rows = np.sort(order[kept:])
    else:
        held_rows = np.arange(len(held[0][0]))
    if test is not None:
        return {
            "train": Part(*train, train_rows),
            "select": Part(*held, held_rows),
            "report": Part(*test, None),
        }
    shuffled = held_rows[epoch_order(len(held_rows), seed, 0x5E1EC7)]
    half = len(shuffled) // 2
    return {
        "train": Part(*train, train_rows),
        "select": Part(*held, np.sort(shuffled[:half])),
        "report": Part(*held, np.sort(shuffled[half:])),
    }


def _check_alike(name: str, array: np.ndarray, trained_name: str, trained: np.ndarray) -> None:
    """Refuse held-out rows that are not as those that are trained on: they would fail when the training is done."""
    if array.shape[1:] != trained.shape[1:] or (array.dtype.kind == "f") != (trained.dtype.kind == "f"):
        raise ProblemError(
            ErrorCode.INPUT_SHAPE_MISMATCH,
            f"rows of '{name}' have shape {array.shape[1:]} and dtype {array.dtype}, those of '{trained_name}' "
            f"{trained.shape[1:]} and {trained.dtype}; they must be alike",
        )


def _check_lengths(names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    for name, array in zip(names, arrays, strict=True):
        if array.ndim == 0:
            raise ProblemError(ErrorCode.DATASET_INVALID, f"array '{name}' is a scalar; expected one row per sample")
        if len(array) != len(arrays[0]):
            raise ProblemError(
                ErrorCode.DATASET_INVALID,
                f"array '{name}' has {len(array)} rows and '{names[0]}' has {len(arrays[0])}; they must be equal",
            )
        if len(array) < 2:
            raise ProblemError(ErrorCode.DATASET_INVALID, f"array '{name}' has {len(array)} rows; at least 2 needed")


def _as_tensor(raw: np.ndarray) -> Tensor:
    """Rows as a tensor; PyTorch reads the machine's own byte order alone."""
    return torch.from_numpy(np.ascontiguousarray(raw, dtype=raw.dtype.newbyteorder("=")))


def _target(raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = _as_tensor(raw)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.to(torch.int64)


def _per_channel(value: float | list[float], like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype)
    if tensor.dim() == 0:
        return tensor
    channels = like.shape[1] if like.dim() > 1 else 1
    if len(tensor) != channels:
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"data.mean and data.std must have one value or one per channel; found {len(tensor)} values for "
            f"{channels} channels (axis 1 after layout)",
        )
    return tensor.reshape([1, -1] + [1] * (like.dim() - 2))
