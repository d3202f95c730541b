"""Is an uploaded file a TorchScript archive that may be loaded? Answered without torch, and without unpickling."""

import pickletools
import re
import zipfile
from pathlib import Path

from service.blobs.tensors import MAX_PICKLE_BYTES, misplaced_tensor, read_tensors
from service.blobs.zips import LOCAL_MAGIC, UNREADABLE, ZipRejectedError, open_checked_zip
from service.contract.errors import ErrorCode, ProblemError

MAX_ENTRIES = 100_000
MAX_UNPACKED_BYTES = 16 * 1024**3
MAX_RATIO = 50  # torch stores tensors uncompressed, so an honest file sits near 1
MAX_CODE_BYTES = 64 * 1024**2
_MAX_PICKLE_BYTES = 16 * 1024**2

_REQUIRED = ("data.pkl", "constants.pkl", "version")
_HOW_TO = "save the model with torch.jit.script(model).save(path) and upload that file"
# A definition must hold these bytes in this order wherever it stands, so no string or comment around it can hide it.
_STATE_METHOD = re.compile(rb"\bdef(?:\s|\\\r?\n|#[^\n]*\n)+(__setstate__|__getstate__)(?![0-9A-Za-z_])")
_NOT_CODE = frozenset({"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"})


def check_model_file(
    path: Path, *, max_entries: int = MAX_ENTRIES, max_unpacked_bytes: int = MAX_UNPACKED_BYTES
) -> None:
    """Refuse what is not a sound TorchScript archive.

    Raises `MODEL_NOT_TORCHSCRIPT`, `MODEL_CORRUPT` or `MODEL_REJECTED_UNSAFE`, saying what was found instead.
    """
    _check_beginning(path)
    try:
        with open_checked_zip(path, max_entries=max_entries, max_unpacked_bytes=max_unpacked_bytes) as archive:
            _check_archive(archive)
    except ZipRejectedError as error:
        if error.damaged:
            raise _corrupt(str(error)) from error
        raise ProblemError(
            ErrorCode.MODEL_REJECTED_UNSAFE, f"expected an archive as torch.jit.save writes it; in this one {error}"
        ) from error
    except UNREADABLE as error:
        raise _corrupt(f"a file in it cannot be read ({error})") from error


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(512)
    if not beginning:
        raise _not_torchscript("an empty file")
    if beginning.startswith(LOCAL_MAGIC):
        return
    if beginning[0] == 0x80 and len(beginning) > 1 and beginning[1] <= 5:
        raise _not_torchscript("a Python pickle (torch.save in its old format, or pickle.dump)")
    if beginning.startswith(b"PK"):
        raise _not_torchscript("an empty zip")
    shown = beginning[:4].hex(" ")
    raise _not_torchscript(f"a file that is not a zip (it begins with the bytes {shown})")


def _check_archive(archive: zipfile.ZipFile) -> None:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    members = {entry.filename.partition("/")[2].lower(): entry for entry in entries}
    code = [entry for name, entry in members.items() if name.startswith("code/") and name.endswith(".py")]
    _check_kind(archive, members, has_code=bool(code))
    tops = {entry.filename.partition("/")[0] for entry in entries}
    if len(tops) != 1:
        raise ZipRejectedError(f"the files stand in {len(tops)} folders instead of one")
    packed = max(1, sum(entry.compress_size for entry in entries))
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_RATIO * packed:
        raise ZipRejectedError(f"the files unpack to {unpacked // packed} times their size; at most {MAX_RATIO} times")
    if sum(entry.file_size for entry in code) > MAX_CODE_BYTES:
        raise ZipRejectedError(f"the code is larger than {MAX_CODE_BYTES} bytes")
    for entry in code:
        _check_code(entry.filename, archive.read(entry))
    for folder, pickle in (("data", members["data.pkl"]), ("constants", members["constants.pkl"])):
        _check_tensors(archive, members, folder, pickle)


def _check_kind(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], *, has_code: bool) -> None:
    missing = [name for name in _REQUIRED if name not in members]
    if not missing and has_code:
        return
    if "data.pkl" in members and "constants.pkl" not in members:
        raise _not_torchscript(_what_was_pickled(archive, members["data.pkl"]))
    if any(name.endswith(("archive_format", "model.json")) for name in members):
        raise _not_torchscript("an archive of torch.export or of a TorchScript older than 1.4")
    if "data.pkl" in members and "constants.pkl" in members:
        raise _corrupt(f"{' and '.join(missing or ['its code'])} is missing in it")
    raise _not_torchscript("a zip without a TorchScript model in it")


def _what_was_pickled(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    """Name the class that torch.save was given, from the pickle's opcodes; nothing is unpickled."""
    if entry.file_size > _MAX_PICKLE_BYTES:
        return "a file that torch.save wrote"
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(entry)):
            if opcode.name == "GLOBAL":
                if str(argument) not in _NOT_CODE:
                    return f"a pickled object of the class {str(argument).replace(' ', '.')} (torch.save)"
                break
            if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                return f"a pickled object of the class {strings[-2]}.{strings[-1]} (torch.save)"
            if isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        return "a file that torch.save wrote"
    return "a state dict or another pickled object (torch.save), which holds no code to run"


def _check_code(name: str, source: bytes) -> None:
    found = _STATE_METHOD.search(source)
    if found is not None:
        line = source.count(b"\n", 0, found.start(1)) + 1
        method = found.group(1).decode("ascii")
        raise ProblemError(
            ErrorCode.MODEL_REJECTED_UNSAFE,
            f"expected code that does not run while the model is loaded; found the method {method} in {name}, line "
            f"{line}: remove {method} from the module (and quantised packed parameters, which bring it), then script "
            "and save it again",
        )


def _check_tensors(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: str, pickle: zipfile.ZipInfo
) -> None:
    if pickle.file_size > MAX_PICKLE_BYTES:
        return

    def record_bytes(record: str) -> int | None:
        entry = members.get(f"{folder}/{record.lower()}")
        return None if entry is None else entry.file_size

    wrong = misplaced_tensor(read_tensors(archive.read(pickle)), record_bytes)
    if wrong is not None:
        raise _corrupt(wrong)


def _corrupt(found: str) -> ProblemError:
    return ProblemError(
        ErrorCode.MODEL_CORRUPT, f"expected a whole TorchScript archive; {found}: save and upload the file again"
    )


def _not_torchscript(found: str) -> ProblemError:
    return ProblemError(ErrorCode.MODEL_NOT_TORCHSCRIPT, f"expected a TorchScript archive; found {found}: {_HOW_TO}")
