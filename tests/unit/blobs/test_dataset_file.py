import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.blobs.datasets import check_dataset, inspect_dataset
from service.contract.errors import ErrorCode, ProblemError


def refusal(path, **limits):
    with pytest.raises(ProblemError) as caught:
        check_dataset(path, **limits)
    assert caught.value.code is ErrorCode.DATASET_INVALID
    return caught.value.detail


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_every_kind_of_number(tmp_path, save):
    path = tmp_path / "data.npz"
    save(
        path,
        inputs=np.zeros((5, 3, 8, 8), np.float32),
        targets=np.arange(5),
        mask=np.ones(5, bool),
        image=np.zeros((5, 2), np.uint8),
        big=np.zeros(3, ">f8"),
        scalar=np.float64(1.0),
        fortran=np.asfortranarray(np.zeros((2, 3))),
        none=np.zeros((0, 4)),
    )
    facts = inspect_dataset(path)
    assert facts.format == "npz"
    assert facts.arrays["inputs"].shape == (5, 3, 8, 8)
    assert facts.arrays["inputs"].dtype == "<f4"
    assert facts.arrays["scalar"].shape == ()


def test_safetensors(tmp_path):
    path = tmp_path / "data.safetensors"
    save_file({"inputs": np.zeros((4, 2), np.float32), "targets": np.arange(4)}, path, metadata={"a": "b"})
    facts = inspect_dataset(path)
    assert facts.format == "safetensors"
    assert set(facts.arrays) == {"inputs", "targets"}
    assert facts.arrays["targets"].shape == (4,)


def test_python_objects_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.array([{"a": 1}], dtype=object))
    assert "Python objects" in refusal(path)


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])])
def test_other_types_are_refused(tmp_path, array):
    path = tmp_path / "data.npz"
    np.savez(path, inputs=array)
    assert "'inputs'" in refusal(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"a,b,c\n1,2,3\n", "begins with"),
        (pickle.dumps([1]), "pickle"),
        (b"\x93NUMPY\x01\x00", "single .npy"),
        (struct.pack("<Q", 10**12) + b"{}", "header of"),
        (struct.pack("<Q", 8) + b"{nojson}", "not JSON"),
        (struct.pack("<Q", 2) + b"{}", "no array"),
    ],
)
def test_what_is_no_dataset_is_named(tmp_path, content, named):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert named in refusal(path)


def test_a_zip_with_other_files_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.zeros(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert "readme.txt" in refusal(path)


def test_cut_files_are_refused(tmp_path):
    npz, tensors, cut = tmp_path / "a.npz", tmp_path / "a.safetensors", tmp_path / "cut"
    np.savez(npz, inputs=np.zeros((50, 4)))
    save_file({"inputs": np.zeros((50, 4))}, tensors)
    for path in (npz, tensors):
        whole = path.read_bytes()
        for length in (len(whole) - 1, len(whole) // 2):
            cut.write_bytes(whole[:length])
            refusal(cut)


def npy(header):
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "member",
    [
        b"not an array",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        npy("{'descr': '<f4', 'fortran_order': False}"),
        npy("__import__('os').system('true')"),
        npy("(" * 5000),
        npy("[1]"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31),
        b"\x93NUMPY",
    ],
)
def test_forged_headers_are_refused(tmp_path, member):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", member)
    refusal(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_forged_safetensors_are_refused(tmp_path, entry):
    header = json.dumps({"inputs": entry}).encode()
    path = tmp_path / "data.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "inputs" in refusal(path)


def test_unpacked_size_is_limited(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, inputs=np.zeros(1_000_000))
    assert "at most 1000000" in refusal(path, max_unpacked_bytes=1_000_000)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, inputs=np.arange(100))
    whole = buffer.getvalue()
    path = tmp_path / "data.npz"
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            check_dataset(path)
        except ProblemError as error:
            assert error.code is ErrorCode.DATASET_INVALID  # noqa: PT017 - flipped numbers are still numbers
