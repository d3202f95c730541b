"""Model and data files made with the standard library alone, good and bad ones."""

import io
import struct
import tarfile
import zipfile

CODE = """class Net(Module):
  __parameters__ = ["weight", ]
  weight : Tensor
  training : bool
  def forward(self: __torch__.Net,
    x: Tensor) -> Tensor:
    return torch.linear(x, self.weight)
"""


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # dated 1980: the same bytes every time
    return buffer.getvalue()


def members(code: str = CODE, weight: bytes = b"\x00" * 256) -> dict[str, bytes]:
    """What torch.jit.save writes, with a weight of nothing."""
    return {
        "net/data.pkl": b"\x80\x02c__torch__\nNet\nq\x00)\x81.",
        "net/code/__torch__.py": code.encode(),
        "net/code/__torch__.py.debug_pkl": b"\x80\x02.",
        "net/data/0": weight,
        "net/constants.pkl": b"\x80\x02).",
        "net/version": b"3\n",
        "net/byteorder": b"little",
    }


def torchscript(code: str = CODE, weight: bytes = b"\x00" * 256) -> bytes:
    return zip_bytes(members(code, weight))


def with_setstate(name: str = "__setstate__") -> bytes:
    return torchscript(CODE + f"  def {name}(self: __torch__.Net, state: Tensor) -> NoneType:\n    return None\n")


def truncated() -> bytes:
    whole = torchscript(weight=b"\x00" * 4096)
    return whole[: len(whole) // 2]


def other_zip() -> bytes:
    return zip_bytes({"readme.txt": b"hello"})


def pickled_module() -> bytes:
    """What torch.save(module) writes: an archive with data.pkl but no code."""
    return zip_bytes({"archive/data.pkl": b"\x80\x02.", "archive/data/0": b"\0" * 16, "archive/version": b"3\n"})


def npy(values: list[float], shape: tuple[int, ...]) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack(f"<{len(values)}f", *values)


def npz(count: int = 8) -> bytes:
    return zip_bytes({"inputs.npy": npy([0.0] * count * 4, (count, 4)), "targets.npy": npy([0.0] * count, (count,))})


def safetensors() -> bytes:
    header = b'{"inputs":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}}'
    return struct.pack("<Q", len(header)) + header + b"\0" * 32


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name in ("0.npy", "1.npy"):
            content = npy([0.0] * 4, (4,))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
