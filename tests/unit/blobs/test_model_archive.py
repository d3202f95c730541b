"""Archives written by hand, byte for byte what the check must tell apart; one honest file comes from torch itself."""

import io
import pickle
import stat
import struct
import zipfile

import pytest

from service.blobs.archive import check_model_file
from service.contract.errors import ErrorCode, ProblemError

CODE = "class Net(Module):\n  __parameters__ = []\n  def forward(self, x: Tensor) -> Tensor:\n    return x\n"
MEMBERS = {
    "net/data.pkl": b"\x80\x02}q\x00.",
    "net/code/__torch__/net.py": CODE.encode(),
    "net/code/__torch__/net.py.debug_pkl": b"\x80\x02).",
    "net/constants.pkl": b"\x80\x02).",
    "net/data/0": bytes(256),
    "net/version": b"3\n",
}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return path


def refusal(path, **limits):
    with pytest.raises(ProblemError) as caught:
        check_model_file(path, **limits)
    assert "expected" in caught.value.detail
    return caught.value.code, caught.value.detail


@pytest.fixture
def model(tmp_path):
    return write_zip(tmp_path / "net.pt", MEMBERS)


@pytest.fixture
def changed(tmp_path):
    """Write the model with members added, replaced or (None) removed."""

    def write(compression=zipfile.ZIP_STORED, *, members=()):
        kept = {name: value for name, value in (MEMBERS | dict(members)).items() if value is not None}
        return write_zip(tmp_path / "changed.pt", kept, compression)

    return write


def test_a_sound_archive_is_accepted(model):
    check_model_file(model)


@pytest.mark.parametrize("traced", [False, True])
def test_torchs_own_files_are_accepted(tmp_path, traced):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    module = torch.jit.trace(network, torch.zeros(1, 3, 8, 8)) if traced else torch.jit.script(network)
    path = tmp_path / "net.pt"
    torch.jit.save(module, path)
    check_model_file(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty file"),
        (b"hello, this is text", "not a zip"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
    ],
)
def test_what_is_no_zip_is_named(tmp_path, content, named):
    path = tmp_path / "file"
    path.write_bytes(content)
    code, detail = refusal(path)
    assert code is ErrorCode.MODEL_NOT_TORCHSCRIPT
    assert named in detail
    assert "torch.jit.script(model).save(path)" in detail


def test_a_zip_of_something_else_is_named(tmp_path):
    code, detail = refusal(write_zip(tmp_path / "a.zip", {"a/readme.txt": b"hi"}))
    assert (code, "a zip without a TorchScript model" in detail) == (ErrorCode.MODEL_NOT_TORCHSCRIPT, True)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickled_module_is_named_with_its_class(tmp_path, new_format):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=new_format)
    code, detail = refusal(path)
    assert code is ErrorCode.MODEL_NOT_TORCHSCRIPT
    assert ("torch.nn.modules.linear.Linear" if new_format else "pickle") in detail


def test_a_state_dict_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    code, detail = refusal(path)
    assert (code, "state dict" in detail) == (ErrorCode.MODEL_NOT_TORCHSCRIPT, True)


def test_a_truncated_archive_is_corrupt_wherever_it_is_cut(model, tmp_path):
    whole = model.read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[:length])
        assert refusal(path)[0] is ErrorCode.MODEL_CORRUPT, length


def test_an_overwritten_archive_never_raises_anything_else(model, tmp_path):
    whole = model.read_bytes()
    path = tmp_path / "flipped.pt"
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            check_model_file(path)
        except ProblemError as error:
            assert error.code.value.startswith("MODEL_")  # noqa: PT017 - acceptance is right for tensor bytes


@pytest.mark.parametrize("name", ["net/constants.pkl", "net/version", "net/code/__torch__/net.py"])
def test_each_member_is_required(changed, name):
    code, _ = refusal(changed(members={name: None}))
    expected = ErrorCode.MODEL_NOT_TORCHSCRIPT if "constants" in name else ErrorCode.MODEL_CORRUPT
    assert code is expected


@pytest.mark.parametrize(
    "definition",
    [
        "  def __setstate__(self, state: int) -> None:\n    pass\n",
        "  def   __getstate__(self):\n    pass\n",
        "  def\t__setstate__(self):\n    pass\n",
        "  def \\\n   __setstate__(self):\n    pass\n",
        "  def # a comment\n   __setstate__(self):\n    pass\n",
        '  a = "\\\\"\n  def __setstate__(self):\n    pass\n  b = "x"\n',
        "  a = '''\n  def __setstate__(self):\n    pass\n  b = '''x'''\n",
        '  # " \n  def __setstate__(self):\n    pass\n',
    ],
)
@pytest.mark.parametrize("name", ["net/code/__torch__/evil.py", "net/CODE/__torch__/evil.PY"])
def test_code_that_runs_at_load_is_refused_with_its_place(changed, definition, name):
    code, detail = refusal(changed(members={name: ("class A(Module):\n" + definition).encode()}))
    assert code is ErrorCode.MODEL_REJECTED_UNSAFE
    assert name in detail
    line = definition.count("\n", 0, definition.index("state__")) + 2
    assert f"line {line}:" in detail


@pytest.mark.parametrize(
    "source",
    [
        "  note = '__setstate__'\n",
        "  # __setstate__ is not defined here\n",
        "  def __setstate__x(self):\n    pass\n",
        "  def forward(self, __setstate__: int):\n    pass\n",
        "  undef __setstate__\n",
    ],
)
def test_the_name_alone_is_no_definition(changed, source):
    check_model_file(changed(members={"net/code/__torch__/net.py": (CODE + source).encode()}))


@pytest.mark.parametrize("name", ["net/../../etc/passwd", "/net/data/1", "net\\data\\1", "net/data/../../x"])
def test_names_that_lead_elsewhere_are_refused(changed, name):
    assert refusal(changed(members={name: b"x"}))[0] is ErrorCode.MODEL_REJECTED_UNSAFE


def test_two_top_folders_are_refused(changed):
    code, detail = refusal(changed(members={"other/data/0": b"x"}))
    assert (code, "2 folders" in detail) == (ErrorCode.MODEL_REJECTED_UNSAFE, True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["net/code/__torch__/net.py", "net/code/__torch__/NET.py"])
def test_a_name_twice_is_refused_whatever_its_case(tmp_path, twin):
    path = write_zip(tmp_path / "twice.pt", [*MEMBERS.items(), (twin, b"x")])
    code, detail = refusal(path)
    assert (code, "twice" in detail) == (ErrorCode.MODEL_REJECTED_UNSAFE, True)


def test_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("net/data/1")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "link.pt", [*MEMBERS.items(), (link, "/etc/passwd")])
    assert "is a link" in refusal(path)[1]


def test_encrypted_entries_are_refused(model):
    content = bytearray(model.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    model.write_bytes(content)
    assert "encrypted" in refusal(model)[1]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(changed, compression):
    assert "deflate" in refusal(changed(compression))[1]


def test_a_zip_bomb_is_refused(changed):
    bomb = {"net/data/1": bytes(10_000_000)}
    code, detail = refusal(changed(zipfile.ZIP_DEFLATED, members=bomb))
    assert (code, "times" in detail) == (ErrorCode.MODEL_REJECTED_UNSAFE, True)


def test_limits_on_entries_and_size(model):
    assert "at most 3" in refusal(model, max_entries=3)[1]
    assert "at most 100" in refusal(model, max_unpacked_bytes=100)[1]


def test_bytes_before_or_after_the_zip_are_refused(model, tmp_path):
    whole = model.read_bytes()
    polyglot = tmp_path / "polyglot.pt"
    polyglot.write_bytes(b"PK\x03\x04" + bytes(60) + whole)
    assert refusal(polyglot)[0] is ErrorCode.MODEL_CORRUPT
    polyglot.write_bytes(whole + b"more")
    assert refusal(polyglot)[0] is ErrorCode.MODEL_CORRUPT


def test_a_name_cut_by_a_null_is_refused(changed):
    path = changed(members={"net/data/1XY": b"x"})
    path.write_bytes(path.read_bytes().replace(b"data/1XY", b"data/1\0Y"))
    assert "character" in refusal(path)[1]


def test_overlapping_entries_are_refused(tmp_path):
    """Many directory entries that speak of the same bytes: the bomb that stays below any ratio of one entry."""
    path = write_zip(tmp_path / "net.pt", MEMBERS | {"net/data/1": bytes(4000)})
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    directory = content[start:end]
    offset = directory.index(b"net/data/1") - 46
    entry = directory[offset : offset + 46 + len(b"net/data/1")]
    copies = b"".join(entry.replace(b"net/data/1", b"net/data/" + bytes([letter])) for letter in range(97, 117))
    count = struct.unpack("<H", content[end + 10 : end + 12])[0] + 20
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory) + len(copies), start, 0)
    path.write_bytes(content[:start] + directory + copies + tail)
    assert "overlap" in refusal(path)[1]


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    buffer = io.BytesIO()
    pickle.dump(Bomb(), buffer, protocol=2)
    members = {"net/data.pkl": buffer.getvalue(), "net/version": b"3"}
    code, detail = refusal(write_zip(tmp_path / "bomb.pt", members))
    assert (code, "exec" in detail) == (ErrorCode.MODEL_NOT_TORCHSCRIPT, True)
