"""WebDataset tars: written by the library, read back as arrays; and what is refused, with the sample's name."""

import io
import json
import pickle
import struct
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_jobs import ConvNet, quick, run_stage, save_model
from webdataset.tariterators import base_plus_ext

from service.contract.errors import ErrorCode, ProblemError
from service.contract.shards import Member
from worker.engine import shards
from worker.engine.data_files import open_arrays

Sample = dict[str, Any]


def picture(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def array(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value), allow_pickle=True)
    return buffer.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as made:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            made.addfile(header, io.BytesIO(content))
    return path


def opened(path: Path) -> dict[str, np.ndarray]:
    return open_arrays(path, "webdataset", path.parent / f"work-{path.stem}")


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ProblemError) as caught:
        make()
    assert caught.value.code == ErrorCode.DATASET_INVALID
    return caught.value.detail


def pixels(count: int = 12, channels: int = 3, side: int = 6) -> np.ndarray:
    made = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return made if channels > 1 else made[..., 0]


def test_images_and_classes_as_the_library_writes_them(tmp_path: Path) -> None:
    images = pixels()
    with webdataset.TarWriter(str(tmp_path / "data.tar")) as writer:
        for number, image in enumerate(images):
            key = f"{'val' if number % 3 == 0 else 'train'}/{number:05d}{'x' * 120}"  # a name with a header of its own
            writer.write({"__key__": key, "png": picture(image), "cls": number % 4, "json": {"camera": "left"}})
    made = opened(tmp_path / "data.tar")
    held = np.arange(len(images)) % 3 == 0
    assert set(made) == {f"{p}{n}" for p in ("", "val_") for n in ("inputs", "targets", "png", "cls")}
    np.testing.assert_array_equal(made["inputs"], images[~held].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(made["val_inputs"], images[held].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(made["targets"], (np.arange(len(images)) % 4)[~held])
    assert isinstance(made["inputs"], np.memmap)
    assert not made["inputs"].flags.writeable


def test_arrays_numbers_and_several_inputs(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    members = [
        member
        for number in range(5)
        for member in (
            (f"./{number}.inputs.left.npy", array(x[number])),
            (f"./{number}.inputs.right.NPY", array(x[number] > 0)),
            (f"./{number}.targets.json", json.dumps([number, 0.5]).encode()),
            (f"./{number}.note.txt", b"not read"),
            (f"./{number}.count.json", b"7"),
            (f"./{number}.large.json", str(2**60).encode()),
        )
    ]
    made = opened(tar(tmp_path / "data.tar", members))
    assert set(made) == {"inputs.left", "inputs.right", "targets", "count", "large"}
    np.testing.assert_array_equal(made["inputs.left"], x)
    np.testing.assert_array_equal(made["inputs.right"], x > 0)
    np.testing.assert_array_equal(made["targets"], [[n, 0.5] for n in range(5)])
    assert made["count"].dtype == np.int64
    assert made["count"].tolist() == [7] * 5
    assert made["large"].dtype == np.float64  # it was read as such, so it is no exact class


def test_grey_pictures(tmp_path: Path) -> None:
    images = pixels(channels=1)
    made = opened(tar(tmp_path / "grey.tar", [(f"{n}.jpg", picture(image, "JPEG")) for n, image in enumerate(images)]))
    assert made["inputs"].shape == (12, 1, 6, 6)
    mixed = [(f"{n}.png", picture(pixels(channels=1 if n else 3)[n])) for n in range(3)]
    made = opened(tar(tmp_path / "mixed.tar", mixed))
    assert made["inputs"].shape == (3, 3, 6, 6)
    np.testing.assert_array_equal(made["inputs"][1][2], images[1])


def test_samples_that_differ_are_named(tmp_path: Path) -> None:
    small, large = picture(pixels()[0]), picture(pixels(side=8)[0])
    good = [("a/0.png", small), ("a/0.cls", b"1")]
    for number, (more, said) in enumerate(
        [
            ([("a/1.png", large), ("a/1.cls", b"1")], "'png' of sample 'a/1' is uint8 of shape (3, 8, 8)"),
            ([("a/1.png", small)], "sample 'a/1' has .png and the first sample .png, .cls"),
            ([("a/1.png", small), ("a/1.cls", b"cat")], "'cls' of sample 'a/1' cannot be read"),
            ([("a/1.png", small[:60]), ("a/1.cls", b"1")], "'png' of sample 'a/1' cannot be read"),
            ([("a/1.png", b"GIF89a" + small), ("a/1.cls", b"1")], "'png' of sample 'a/1' cannot be read"),
            ([("a/1.png", small), ("a/1.png", small)], "duplicate"),
        ]
    ):
        path = tar(tmp_path / f"{number}.tar", good + more)
        assert said in refusal(lambda path=path: opened(path)), said


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(Path(__file__).parent / "unpickled"), "w"))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(
        [("0.pyd", pickle.dumps(_Trap())), ("0.x.pth", b"PK"), ("0.npy", array(np.array([_Trap()], dtype=object)))]
    ):
        path = tar(tmp_path / f"{number}.tar", [("0.png", picture(pixels()[0])), (name, content)])
        assert "pickle" in refusal(lambda path=path: opened(path))
    assert not (Path(__file__).parent / "unpickled").exists()


def test_names_never_become_paths(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "a"
    inside.mkdir()
    path = tar(inside / "data.tar", [(f"../outside/{n}.png", picture(pixels()[n])) for n in range(3)])
    made = opened(path)
    assert made["inputs"].shape == (3, 3, 6, 6)
    assert not outside.exists()
    assert sorted(each.name for each in (inside / "work-data").iterdir()) == ["field-0.raw", "shards.json"]


def test_damaged_archives(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", [(f"{n}.png", picture(pixels()[n])) for n in range(4)]).read_bytes()
    flipped = bytearray(whole)
    flipped[1024 + 3] ^= 0xFF
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as made:
        header = tarfile.TarInfo("0.png")
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(header)
    for number, (content, said) in enumerate(
        [
            (whole[:700], "cut off"),
            (whole[:2048], "cut off"),
            (bytes(flipped), "damaged"),
            (link.getvalue(), "link"),
            (bytes(1024), "no file is one of"),
            (tar(tmp_path / "other.tar", [("readme", b"hello")]).read_bytes(), "no file is one of"),
        ]
    ):
        path = tmp_path / f"damaged{number}.tar"
        path.write_bytes(content)
        assert said in refusal(lambda path=path: opened(path))


def test_bombs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIXELS_MAX", 10_000)
    black = picture(np.zeros((200, 200), np.uint8))
    assert "pixels" in refusal(lambda: opened(tar(tmp_path / "one.tar", [("0.png", black)])))
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_DECODED_BYTES_FREE", 100_000)
    monkeypatch.setattr(shards, "DECODED_RATIO_MAX", 1)
    members = [(f"{n}.png", black) for n in range(100)]
    assert "decode to more than" in refusal(lambda: opened(tar(tmp_path / "many.tar", members)))


def test_decoding_takes_the_memory_of_a_sample_and_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = array(np.zeros(50_000, np.float32))
    path = tar(tmp_path / "data.tar", ((f"{n}.npy", value) for n in range(60)))
    tracemalloc.start()
    opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(value), "12 MB in all"
    monkeypatch.setattr(shards, "_samples", None)
    assert opened(path)["inputs"].shape == (60, 50_000)


def test_names_are_split_as_the_library_splits_them() -> None:
    for name in ("a/b.c/d.left.npy", "x.JPG", "no_extension", ".hidden", "a.b/c", "./1.cls", "a/.b.png", "l\nm.png"):
        key, extension = base_plus_ext(name)
        member = Member(name, 0)
        assert (member.key, member.extension) == (key or "", (extension or "").lower()), name


def test_a_job_in_a_child(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", ConvNet())
    net = torch.jit.load(str(model)).eval()
    x = np.random.default_rng(1).standard_normal((96, 2, 8, 8)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(dim=1).tolist()
    members = [m for n in range(96) for m in ((f"{n}.npy", array(x[n])), (f"{n}.cls", str(y[n]).encode()))]
    spec = quick(budget={"max_macs_fraction": 0.5}, method={"mu": {"steps": 2}})
    done = run_stage("learn", tmp_path / "w", model, spec, data=tar(tmp_path / "data.tar", members))
    assert done.last["type"] == "done", done.last


def test_headers_that_promise_more_than_there_is(tmp_path: Path) -> None:
    header = array(np.zeros(1)).replace(b"(1,), }          ", b"(99999999999999,), }")[:128]
    wide = bytearray(picture(np.zeros((2, 2), np.uint8)))
    wide[16:24] = struct.pack(">II", 60_000, 60_000)
    wide[29:33] = struct.pack(">I", zlib.crc32(wide[12:29]))
    for number, (name, content) in enumerate([("0.npy", header), ("0.png", bytes(wide))]):
        path = tar(tmp_path / f"{number}.tar", [(name, content)])
        assert "cannot be read" in refusal(lambda path=path: opened(path))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_a_sample_is_a_refusal(data: st.DataObject) -> None:
    extension = data.draw(st.sampled_from(["png", "jpg", "npy", "json", "cls"]))
    content = {
        "png": picture(pixels()[0]),
        "jpg": picture(pixels()[0], "JPEG"),
        "npy": array(np.zeros((3, 4))),
        "json": b"[[1, 2.5], [3, 4]]",
        "cls": b"123",
    }[extension]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder, suppress(ProblemError):
        assert opened(tar(Path(folder) / "data.tar", [(f"0.{extension}", bytes(damaged))]))
