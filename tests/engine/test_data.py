"""Dataset files as arrays, arrays as parts, rows as inputs; and what is refused, in words that help."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec
from worker.engine.data import SAMPLES_MIN, Dataset, PartName, epoch_order
from worker.engine.data_files import Arrays, open_arrays

CPU = torch.device("cpu")
PARTS: tuple[PartName, ...] = ("train", "select", "report")


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ProblemError) as caught:
        make()
    assert caught.value.code == ErrorCode.DATASET_INVALID
    return caught.value.detail


def numbered(count: int = 50) -> Arrays:
    """Each sample's input and target are its own number."""
    return {"inputs": np.arange(count, dtype=np.float32)[:, None] * np.ones(3, np.float32), "targets": np.arange(count)}


def dataset(arrays: Arrays, seed: int = 0, names: tuple[str, ...] = ("x",), **spec: Any) -> Dataset:
    return Dataset(arrays, DataSpec.model_validate(spec), seed, names)


def numbers_of(made: Dataset, part: PartName) -> list[int]:
    batch = made.rows(part, np.arange(made.size(part)), CPU)
    assert torch.equal(batch.inputs[0][:, 0].long(), batch.targets[0])
    return batch.targets[0].tolist()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_come_back_as_maps(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {
        "inputs": np.random.default_rng(0).standard_normal((9, 2, 3)).astype(np.float32),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(4, 3)),
        "bytes": np.arange(8, dtype=np.uint8),
        "flags": np.array([True, False]),
        "big": np.arange(5, dtype=">i4"),
        "odd/name": np.zeros(2),
    }
    save(tmp_path / "data.npz", **arrays)
    opened = open_arrays(tmp_path / "data.npz", "npz", tmp_path / "work")
    assert set(opened) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened[name], array)
        assert isinstance(opened[name], np.memmap)
        assert not opened[name].flags.writeable


def test_safetensors_arrays_come_back_as_maps(tmp_path: Path) -> None:
    arrays = {
        "inputs": np.random.default_rng(0).standard_normal((9, 2)),
        "targets": np.arange(9),
        "none": np.zeros((0, 2)),
    }
    save_file(arrays, tmp_path / "data.safetensors", metadata={"made": "here"})
    opened = open_arrays(tmp_path / "data.safetensors", "safetensors", tmp_path / "work")
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened[name], array)
    assert set(opened) == set(arrays)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(Path(__file__).parent / "unpickled"), "w"))


def test_objects_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.array([_Trap()], dtype=object))
    assert "never unpickled" in refusal(lambda: open_arrays(tmp_path / "data.npz", "npz", tmp_path / "w"))
    assert not (Path(__file__).parent / "unpickled").exists()


@pytest.mark.parametrize("array", [np.zeros(9, np.complex64), np.array(["a"] * 9), np.zeros(9, np.longdouble)])
def test_other_kinds_of_numbers_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=array)
    assert "'inputs' has dtype" in refusal(lambda: open_arrays(tmp_path / "data.npz", "npz", tmp_path / "w"))


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.random.default_rng(0).standard_normal((400, 10)))
    whole = buffer.getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF  # the checksum no longer holds
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("inputs.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"not a header at all!")
    short = io.BytesIO()
    with zipfile.ZipFile(short, "w") as made:  # fewer numbers than the header says
        header = io.BytesIO()
        np.save(header, np.zeros(1000))
        made.writestr("inputs.npy", header.getvalue()[:500])
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as made:
        made.writestr("readme.txt", b"hello")
    for number, content in enumerate(
        [whole[:-100], whole[:1000], bytes(flipped), b"", archive.getvalue(), short.getvalue(), other.getvalue()]
    ):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        assert "npz" in refusal(lambda path=path: open_arrays(path, "npz", tmp_path / "w"))  # type: ignore[misc]


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"inputs": 3}',
        b'{"inputs": {"dtype": "F32"}}',
        b'{"inputs": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"inputs": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',  # beyond the end
        b'{"inputs": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"inputs": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}',
        b"[" * 5000,
        b"{}",
    ],
)
def test_damaged_safetensors_files_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert refusal(lambda: open_arrays(path, "safetensors", tmp_path / "w"))


def test_truncated_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"inputs": np.zeros((9, 2))}, path)
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(lambda: open_arrays(path, "safetensors", tmp_path / "w"))
    path.write_bytes(b"\x00\x01")
    assert refusal(lambda: open_arrays(path, "safetensors", tmp_path / "w"))


# --- parts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(SAMPLES_MIN, 300), st.integers(0, 2**63 - 1))
def test_without_other_arrays_the_parts_are_disjoint_and_whole(count: int, seed: int) -> None:
    made = dataset(numbered(count), seed)
    parts = [numbers_of(made, part) for part in PARTS]
    assert sorted([number for part in parts for number in part]) == list(range(count))
    assert all(parts)
    assert len(parts[1]) + len(parts[2]) == pytest.approx(0.2 * count, abs=1.5)
    assert not made.report_is_test
    again = dataset(numbered(count), seed)
    assert [numbers_of(again, part) for part in PARTS] == parts


def test_the_parts_depend_on_the_seed() -> None:
    assert numbers_of(dataset(numbered(), 0), "report") != numbers_of(dataset(numbered(), 1), "report")


def test_given_arrays_are_the_parts() -> None:
    train, val, test = numbered(40), numbered(20), numbered(10)
    with_prefix = {f"val_{k}": v for k, v in val.items()} | {f"test_{k}": v for k, v in test.items()}
    made = dataset({**train, **with_prefix})
    assert [made.size(part) for part in PARTS] == [40, 20, 10]
    assert made.report_is_test
    only_test = dataset({**train, **{f"test_{k}": v for k, v in test.items()}})
    assert [only_test.size(part) for part in PARTS] == [36, 4, 10]
    assert not set(numbers_of(only_test, "train")) & set(numbers_of(only_test, "select"))
    only_val = dataset({**train, **{f"val_{k}": v for k, v in val.items()}})
    assert [only_val.size(part) for part in PARTS] == [40, 10, 10]
    assert not set(numbers_of(only_val, "select")) & set(numbers_of(only_val, "report"))


def test_order_of_an_epoch_is_a_function_of_its_place() -> None:
    assert np.array_equal(epoch_order(50, 3, 1, 2), epoch_order(50, 3, 1, 2))
    assert not np.array_equal(epoch_order(50, 3, 1, 2), epoch_order(50, 3, 1, 3))
    assert sorted(epoch_order(50, 3, 1)) == list(range(50))


def test_what_cannot_be_parted_is_refused() -> None:
    x, y = numbered()["inputs"], numbered()["targets"]
    assert "found labels" in refusal(lambda: dataset({"labels": y}))
    assert "has 49 rows" in refusal(lambda: dataset({"inputs": x, "targets": y[:-1]}))
    assert str(SAMPLES_MIN) in refusal(lambda: dataset(numbered(SAMPLES_MIN - 1)))
    assert "scalar" in refusal(lambda: dataset({"inputs": np.float32(3.0), "targets": np.int64(1)}))  # type: ignore[dict-item]
    assert "test_targets" in refusal(lambda: dataset({"inputs": x, "targets": y, "test_inputs": x}))
    assert "val_targets" in refusal(lambda: dataset({"inputs": x, "targets": y, "val_inputs": x}))
    assert "'images'" in refusal(lambda: dataset(numbered(), inputs="images"))
    assert "second" in refusal(lambda: dataset(numbered(), inputs=["inputs", "second"]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["inputs", "test_inputs", "targets"])
def test_nan_is_refused_with_its_array_and_row(value: float, name: str) -> None:
    arrays = {key: array.astype(np.float32) for key, array in numbered(30).items()}
    arrays |= {f"test_{key}": array.copy() for key, array in arrays.items()}
    arrays[name] = arrays[name].copy()
    arrays[name].flat[arrays[name][0].size * 17] = value
    detail = refusal(lambda: dataset(arrays))
    assert f"'{name}'" in detail
    assert "row 17" in detail


# --- rows as inputs ---------------------------------------------------------------------------------------------------


def test_raw_bytes_are_scaled_and_laid_out() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    made = dataset({"inputs": raw}, layout="NHWC", scale=1 / 255, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
    rows = np.sort(epoch_order(20, 0, 0x5B117)[4:])
    found = made.rows("train", np.arange(len(rows)), CPU).inputs[0]
    x = raw[rows].transpose(0, 3, 1, 2).astype(np.float64) / 255
    wanted = (x - np.array([0.4, 0.5, 0.6])[:, None, None]) / np.array([0.1, 0.2, 0.3])[:, None, None]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    assert not made.has_targets


def test_per_channel_values_must_fit_the_channels() -> None:
    made = dataset({"inputs": np.zeros((20, 5, 4, 4), np.float32)}, mean=[1.0, 2.0])
    assert "2 values for 5 channels" in refusal(lambda: made.rows("train", np.arange(3), CPU))


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (np.float64, torch.float32),
        (np.float16, torch.float32),
        (">f4", torch.float32),
        (np.uint8, torch.float32),
        (np.int8, torch.int64),
        (np.int32, torch.int64),
        (">i2", torch.int64),
        (np.uint16, torch.int64),
        (np.uint32, torch.int64),
        (np.int64, torch.int64),
        (np.bool_, torch.bool),
    ],
)
def test_types_of_inputs(raw: Any, wanted: torch.dtype) -> None:
    arrays = {"inputs": (np.arange(20) % 2).astype(raw), "targets": (np.arange(20) % 3).astype(raw)}
    batch = dataset(arrays).rows("train", np.arange(5), CPU)
    assert batch.inputs[0].dtype == wanted
    whole = np.dtype(raw).kind in "iub"
    assert batch.targets[0].dtype == (torch.int64 if whole else torch.float32)


def test_named_inputs_are_in_the_order_of_forwards_arguments() -> None:
    arrays = {"inputs.b": np.full((20, 1), 2.0), "inputs.a": np.full((20, 1), 1.0), "targets": np.arange(20)}
    made = dataset(arrays, names=("b", "a", "extra"))
    assert [float(x[0, 0]) for x in made.rows("train", np.arange(1), CPU).inputs] == [2.0, 1.0]
    assert "inputs.a name no argument" in refusal(lambda: dataset(arrays, names=("b", "c")))
    # Arguments are passed by place: one left out in the middle would shift the rest.
    assert "no array inputs.times" in refusal(lambda: dataset(arrays, names=("b", "times", "a")))
    by_list = dataset(arrays, names=("b", "a"), inputs=["inputs.a", "inputs.b"])
    assert by_list.input_names == ("inputs.a", "inputs.b")


def test_batches_and_pieces_cover_the_part_in_order() -> None:
    made = dataset(numbered(50))
    order = epoch_order(made.size("train"), 1)
    batches = list(made.batches("train", 16, CPU, order))
    assert [len(batch) for batch in batches] == [16, 16, 8]
    numbers = np.array(numbers_of(made, "train"))
    assert torch.cat([batch.targets[0] for batch in batches]).tolist() == numbers[order].tolist()
    assert [len(piece) for piece in batches[0].pieces(6)] == [6, 6, 4]
    assert torch.equal(torch.cat([piece.inputs[0] for piece in batches[0].pieces(6)]), batches[0].inputs[0])


def test_parts_too_large_to_keep_are_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dataset(numbered(50)).rows("train", np.array([3, 1]), CPU)
    monkeypatch.setattr("worker.engine.data.RESIDENT_BYTES_MAX", 0)
    read = dataset(numbered(50)).rows("train", np.array([3, 1]), CPU)
    assert torch.equal(kept.inputs[0], read.inputs[0])
    assert torch.equal(kept.targets[0], read.targets[0])
