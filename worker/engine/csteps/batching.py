"""Eigenpairs of many matrices in one call: on a GPU equal shapes cost little more than one of them (methods L.6).

Layers are projected by a thread each. A thread that needs a decomposition waits until every other one needs one too,
or is done; then all that wait are decomposed, equal shapes in one batch. What is in a batch depends on the layers
alone and not on which thread is fast, so that the bits of a run are always the same.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor]
_own = threading.local()  # the batch that the calling thread takes part in, and its place in it


@dataclass
class _Request:
    place: int
    gram: Tensor
    vectors: bool
    made: Pairs | None = None
    error: Exception | None = None


class Batch:
    """A meeting of threads that decompose matrices.

    Parameters
    ----------
    members : int
        Threads that take part; each must `leave` in the end, whatever becomes of it.
    """

    def __init__(self, members: int) -> None:
        self._members = members
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()

    def decompose(self, place: int, gram: Tensor, *, vectors: bool) -> Pairs:
        """Wait for the others, and return this thread's eigenpairs."""
        request = _Request(place, gram, vectors)
        with self._changed:
            self._waiting.append(request)
            self._run_if_complete()
            while request.made is None and request.error is None:
                self._changed.wait()
        if request.made is None:
            raise request.error or RuntimeError("a batch left a matrix out")
        return request.made

    def leave(self) -> None:
        """Take part no more."""
        with self._changed:
            self._members -= 1
            self._run_if_complete()

    def _run_if_complete(self) -> None:
        if not self._waiting or len(self._waiting) < self._members:
            return
        groups: dict[tuple[object, ...], list[_Request]] = {}
        for request in sorted(self._waiting, key=lambda each: each.place):
            gram = request.gram
            groups.setdefault((gram.shape, gram.dtype, gram.device, request.vectors), []).append(request)
        self._waiting = []
        for group in groups.values():
            _decompose(group)
        self._changed.notify_all()


def _decompose(group: list[_Request]) -> None:
    try:
        grams = torch.stack([request.gram for request in group])
        if group[0].vectors:
            energies, vectors = _eigh(grams)
        else:
            energies = _eigvalsh(grams)
            vectors = energies.new_zeros(len(group), 0)
        for request, own, basis in zip(group, energies, vectors, strict=True):
            request.made = (own, basis)
    except Exception as error:  # noqa: BLE001  raised again in each thread that asked
        for request in group:
            request.error = error


@contextmanager
def taking_part(batch: Batch, place: int) -> Iterator[None]:
    """Let the calling thread's decompositions go through a batch, and leave it in the end."""
    _own.part = (batch, place)
    try:
        yield
    finally:
        del _own.part
        batch.leave()


def eigh(gram: Tensor) -> Pairs:
    """Eigenvalues in rising order, and eigenvectors, of a symmetric matrix."""
    part: tuple[Batch, int] | None = getattr(_own, "part", None)
    if part is not None:
        return part[0].decompose(part[1], gram, vectors=True)
    return _eigh(gram)


def eigvalsh(gram: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix in rising order."""
    part: tuple[Batch, int] | None = getattr(_own, "part", None)
    if part is not None:
        return part[0].decompose(part[1], gram, vectors=False)[0]
    return _eigvalsh(gram)


def _eigh(gram: Tensor) -> Pairs:
    """Decompose; a float32 matrix that fails to converge, as rounding alone may, is tried again in float64."""
    try:
        energies, vectors = torch.linalg.eigh(gram)
        if gram.dtype == torch.float64 or bool(torch.isfinite(energies).all()):  # LAPACK gives NaN without an error too
            return energies, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if gram.dtype == torch.float64:
            raise
    energies, vectors = torch.linalg.eigh(gram.double())
    return energies.to(gram.dtype), vectors.to(gram.dtype)


def _eigvalsh(gram: Tensor) -> Tensor:
    try:
        energies: Tensor = torch.linalg.eigvalsh(gram)
        if gram.dtype == torch.float64 or bool(torch.isfinite(energies).all()):
            return energies
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if gram.dtype == torch.float64:
            raise
    wide: Tensor = torch.linalg.eigvalsh(gram.double())
    return wide.to(gram.dtype)
