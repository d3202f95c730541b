"""Models that must be refused, or that misbehave when they are called."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 16, 4
MOST_BYTES = 2**62


class Honest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x)))


class Saves(Honest):
    def forward(self, x: Tensor) -> Tensor:
        torch.ops.aten.save(x, "stolen")
        return self.head(torch.relu(self.hidden(x)))


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def unused(self, x: Tensor) -> Tensor:
        return x + torch.from_file("/etc/hostname", False, 4, dtype=torch.uint8)


class ReadsUncalled(Honest):
    """The operator stands in a method of a submodule, and forward never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reads()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.reader(x))))


class SavesNested(Honest):
    """The operator stands in a branch in a loop, where only some inputs lead."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            if i == 1 and x.size(0) > 1_000_000:
                torch.ops.aten.save(x, "stolen")
        return self.head(torch.relu(self.hidden(x)))


class Pickles(Honest):
    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.hidden.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]


class NothingToCompress(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, :4]


class Raises(Honest):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            raise ValueError("the tide is out")
        return self.head(self.hidden(x))


class LoopsForever(Honest):
    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        while turns >= 0:
            turns = (turns + 1) % 1000
        return self.head(self.hidden(x))


class LoopsInTraining(Honest):
    """Behaves until it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        while self.training and turns >= 0:
            turns = (turns + 1) % 1000
        return self.head(self.hidden(x))


class AllocatesAtOnce(Honest):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)) + torch.ones([1 << 34]).sum()


class AllocatesBitByBit(Honest):
    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for _ in range(100_000):
            kept.append(torch.ones([1 << 22]))  # noqa: PERF401 - TorchScript has no such comprehension here
        return self.head(self.hidden(x)) + kept[-1].sum()


def scripted(module: nn.Module) -> bytes:
    """Script a model as a user does."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module.eval()), buffer)
    return buffer.getvalue()


def pickled(module: nn.Module, *, as_zip: bool = True) -> bytes:
    """Save a whole module by torch.save, in its present or its old format."""
    buffer = io.BytesIO()
    torch.save(module, buffer, pickle_protocol=pickle.DEFAULT_PROTOCOL, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


def other_zip() -> bytes:
    """Make a zip of something else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


def damaged(content: bytes, member: str) -> bytes:
    """Overwrite the inside of one member of an archive, with sizes and checksums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for entry in whole.infolist():
            inside = whole.read(entry)
            archive.writestr(entry.filename, inside[: len(inside) // 2] if entry.filename.endswith(member) else inside)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
