import io
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from service.blobs.archive import check_model_file
from service.blobs.tensors import likely_inputs, read_tensors
from service.contract.errors import ErrorCode, ProblemError


def saved(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl")


def changed(path: Path, member: str, content: bytes) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for entry in whole.infolist():
            inside = content if entry.filename == f"{path.stem}/{member}" else whole.read(entry)
            archive.writestr(entry.filename, inside)
    path.write_bytes(buffer.getvalue())
    return path


def test_every_tensor_is_read(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4).half(), nn.Embedding(5, 2)
    )
    tensors = read_tensors(pickle_of(saved(network, tmp_path / "net.pt")))
    assert [(t.name, t.shape) for t in tensors] == [
        (name.rpartition(".")[2], tuple(value.shape)) for name, value in network.state_dict().items()
    ]
    assert {t.item_bytes for t in tensors} == {2, 4, 8}
    assert all(t.extent <= t.storage_size for t in tensors)


def test_views_of_one_storage_are_sound(tmp_path: Path) -> None:
    network = nn.Linear(4, 4)
    whole = torch.randn(8, 8)
    network.weight = nn.Parameter(whole[4:, ::2])
    check_model_file(saved(network, tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(7, 2), [{"shape": [1, 7], "dtype": "float32"}]),
        (nn.Conv2d(3, 2, 3), [{"shape": [1, 3, 32, 32], "dtype": "float32"}]),
        (nn.Conv1d(5, 2, 3), [{"shape": [1, 5, 32], "dtype": "float32"}]),
        (nn.Embedding(9, 2), [{"shape": [1, 16], "dtype": "int64", "high": 9}]),
        (nn.BatchNorm1d(4), None),
    ],
)
def test_inputs_are_guessed_from_the_first_weight(tmp_path: Path, layer: nn.Module, expected: object) -> None:
    assert likely_inputs(saved(nn.Sequential(layer, nn.ReLU()), tmp_path / "net.pt")) == expected


def test_what_is_no_archive_suggests_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"PK\x03\x04 and no more")
    assert likely_inputs(path) is None


def test_values_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    path = changed(saved(nn.Linear(4, 4), tmp_path / "net.pt"), "data/0", bytes(60))
    with pytest.raises(ProblemError) as refused:
        check_model_file(path)
    assert refused.value.code is ErrorCode.MODEL_CORRUPT
    assert "'weight' needs 64 bytes and has 60" in refused.value.detail


def test_a_tensor_that_reaches_beyond_its_values_is_refused(tmp_path: Path) -> None:
    path = saved(nn.Linear(4, 4), tmp_path / "net.pt")
    shape, longer = b"K\x04K\x04t", b"K\x04\x4d\xff\xfft"  # the sizes (4, 4) become (4, 65535)
    pickle = pickle_of(path)
    assert shape in pickle
    with pytest.raises(ProblemError) as refused:
        check_model_file(changed(path, "data.pkl", pickle.replace(shape, longer, 1)))
    assert refused.value.code is ErrorCode.MODEL_CORRUPT
    assert "beyond its own values" in refused.value.detail


@pytest.mark.parametrize("pickle", [b"", b"\x80\x02", b"\x80\x02t.", b"\x80\x02K\x01R.", b"\x80\x02h\x05.", b"cos\nq."])
def test_an_unfamiliar_pickle_holds_no_tensors(pickle: bytes) -> None:
    assert read_tensors(pickle) == []


def test_sizes_that_are_no_numbers_are_left_to_torch(tmp_path: Path) -> None:
    pickle = pickle_of(saved(nn.Linear(4, 4), tmp_path / "net.pt"))
    assert read_tensors(pickle.replace(b"K\x04K\x04t", b"NK\x04t", 1)) == []
