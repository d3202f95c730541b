"""Tars at upload: their headers say what they hold, and nothing else of them is read."""

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.blobs.datasets import check_dataset, inspect_dataset
from service.contract.errors import ErrorCode, ProblemError
from service.contract.shards import BLOCK_BYTES, MEMBER_BYTES_MAX, TarRejectedError, is_tar, walk_tar


def tar_bytes(*members, form=tarfile.PAX_FORMAT, **changes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            header.mtime = 1.5  # a fraction, as the library writes it: an extended header in front of every file
            for field, value in changes.items():
                setattr(header, field, value)
            made.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(ProblemError) as caught:
        check_dataset(path)
    assert caught.value.code is ErrorCode.DATASET_INVALID
    return caught.value.detail


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_extensions_are_found(tmp_path, form):
    path = tmp_path / "data.tar"
    long = "directory/" * 9 + "n" * 80
    path.write_bytes(tar_bytes((f"{long}.JPG", b"x"), (f"{long}.cls", b"1"), ("ü.note.txt", b""), form=form))
    facts = inspect_dataset(path)
    assert facts.format == "webdataset"
    assert {name: each.dtype for name, each in facts.arrays.items()} == {"jpg": "image", "cls": "class"}
    with path.open("rb") as file:
        assert [member.name for member in walk_tar(file)] == [f"{long}.JPG", f"{long}.cls", "ü.note.txt"]


def test_what_is_refused(tmp_path):
    path, whole = tmp_path / "data.tar", tar_bytes(("0.jpg", b"x" * 600), ("0.cls", b"1"))
    assert "cut off" in refusal(path, whole[: BLOCK_BYTES * 3])
    assert "cut off" in refusal(path, whole[:-9000])
    assert "pickles" in refusal(path, tar_bytes(("0.jpg", b"x"), ("0.pyd", b"x")))
    assert "without a file that is read" in refusal(path, tar_bytes(("0.txt", b"x")))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE):
        assert "link or a special file" in refusal(path, tar_bytes(("0.jpg", b""), type=kind)), kind
    for records in ({"GNU.sparse.major": "1"}, {"size": "99999999999"}):
        assert "extended headers say" in refusal(path, tar_bytes(("0.jpg", b""), pax_headers=records))
    assert "unpack it" in refusal(path, b"\x1f\x8b\x08\x00" + bytes(600))
    assert "link or a special file" in refusal(path, tar_bytes(("0.jpg", b""), type=b"Z"))


def test_sizes_are_numbers_within_the_file(tmp_path):
    whole = bytearray(tar_bytes(("0.jpg", b"x"), form=tarfile.USTAR_FORMAT, mtime=1))
    for field in (b"\xff" * 12, b"\x80" + b"\x00" * 3 + b"\xff" * 8, b"-0000000777\0", b"xx\0\0\0\0\0\0\0\0\0\0"):
        whole[124:136] = field
        whole[148:156] = b" " * 8
        whole[148:156] = b"%06o\0 " % sum(whole[:BLOCK_BYTES])
        assert refusal(tmp_path / "data.tar", bytes(whole))
    big = tarfile.TarInfo("0.jpg")
    big.size = MEMBER_BYTES_MAX + 1
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        file.write(big.tobuf())
        file.truncate(MEMBER_BYTES_MAX + 10 * BLOCK_BYTES)  # a hole of zeros
    with path.open("rb") as file, pytest.raises(TarRejectedError, match="at most"):
        list(walk_tar(file))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_ends_in_a_refusal_or_a_list(data):
    whole = bytearray(tar_bytes(("0.jpg", b"x" * 600), ("0.cls", b"1"))[: 12 * BLOCK_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    is_tar(bytes(whole[:BLOCK_BYTES]))
    with suppress(TarRejectedError):
        assert len(list(walk_tar(io.BytesIO(whole)))) <= 12
