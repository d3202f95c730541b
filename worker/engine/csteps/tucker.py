"""Tucker-2 of a convolution's weight: bases of its outputs and of its inputs, and a core between them.

W ≈ U · core · Vᵀ along the first two axes. De Lathauwer, De Moor and Vandewalle: HOSVD (SIAM J. Matrix Anal. Appl. 21,
2000a) and HOOI (2000b); on convolutions Kim et al., ICLR 2016.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STALL_RELATIVE = 1e-5  # a sweep that gains less than this part of the error ends the iteration
SWEEPS_MAX = 50


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of both modes, and the core that goes with them.

    Parameters
    ----------
    outputs : Tensor
        ``(n, r₁)`` float64, each column with its largest entry positive.
    inputs : Tensor
        ``(c, r₂)`` float64, likewise.
    core : Tensor
        ``(r₁, r₂, K)`` float64: W contracted with both.
    """

    outputs: Tensor
    inputs: Tensor
    core: Tensor

    @property
    def ranks(self) -> tuple[int, int]:
        """(r₁, r₂)."""
        return int(self.outputs.shape[1]), int(self.inputs.shape[1])

    @property
    def explained(self) -> float:
        """‖core‖², which is ‖W‖² less the error."""
        return float(self.core.square().sum())

    def first(self, ranks: tuple[int, int]) -> "Bases":
        """Keep the leading columns: the truncated HOSVD."""
        out, into = ranks
        return Bases(self.outputs[:, :out], self.inputs[:, :into], self.core[:out, :into])


def hosvd(weight: Tensor) -> Bases:
    """Full bases of both modes in falling order of their energies.

    Parameters
    ----------
    weight : Tensor
        ``(n, c, K)`` float64.
    """
    n, c, _ = weight.shape
    outputs = _leading(weight.reshape(n, -1), n)
    inputs = _leading(weight.transpose(0, 1).reshape(c, -1), c)
    return Bases(outputs, inputs, _core(weight, outputs, inputs))


def errors_of_all_ranks(bases: Bases) -> Tensor:
    """Error of the truncated HOSVD at every pair of ranks.

    Both bases are orthonormal, so what the leading r₁ × r₂ part of the core holds is what is explained: the error is
    ‖W‖² less a cumulative sum of squares over both axes.

    Returns
    -------
    Tensor
        ``(n + 1, c + 1)`` float64, at [r₁, r₂].
    """
    energies = bases.core.square().sum(dim=2)
    explained = torch.zeros(energies.shape[0] + 1, energies.shape[1] + 1, dtype=energies.dtype, device=energies.device)
    explained[1:, 1:] = energies.cumsum(dim=0).cumsum(dim=1)
    return (energies.sum() - explained).clamp_min(0.0)


def hooi(weight: Tensor, start: Bases) -> Bases:
    """Higher-order orthogonal iteration: each basis in turn the best for the other, until the error stalls.

    Parameters
    ----------
    weight : Tensor
        ``(n, c, K)`` float64.
    start : Bases
        At the ranks that are kept; the error never rises above its own.
    """
    n, c, _ = weight.shape
    out, into = start.ranks
    total = float(weight.square().sum())
    made = start
    for _ in range(SWEEPS_MAX):
        of_inputs = torch.einsum("nck,cb->nbk", weight, made.inputs)
        outputs = _leading(of_inputs.reshape(n, -1), out)
        of_outputs = torch.einsum("nck,na->cak", weight, outputs)
        inputs = _leading(of_outputs.reshape(c, -1), into)
        after = Bases(outputs, inputs, _core(weight, outputs, inputs))
        gain = after.explained - made.explained
        if gain <= 0:
            return made
        made = after
        if gain <= STALL_RELATIVE * max(total - made.explained, 0.0):
            break
    return made


def bases_of(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Bases:
    """Bases that are given, with the best core for them.

    Parameters
    ----------
    weight : Tensor
        ``(n, c, K)`` float64.
    outputs, inputs : Tensor
        ``(n, r₁)`` and ``(c, r₂)``, of orthonormal columns.
    """
    return Bases(outputs, inputs, _core(weight, outputs, inputs))


def _core(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    return torch.einsum("nck,na,cb->abk", weight, outputs, inputs)


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Leading left singular vectors, as eigenvectors of the Gram matrix."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    vectors = vectors[:, vectors.shape[1] - count :].flip(1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signed: Tensor = vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return signed
