"""Singular values and vectors of the matrices of a grouped convolution, one for each group.

The groups share one rank, so that the chain stays two grouped convolutions. The error that a rank leaves is the sum
over the groups, Σ_g Σ_{i>r} σ²_{g,i}: the energy of rank i is the sum of the groups' i-th, which falls with i, and the
best rank under a price is the threshold of methods L.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.forms.factors import Factors

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class GroupSpectrum:
    """Eigenpairs of the Gram matrices of every group.

    Parameters
    ----------
    energies : Tensor
        ``(s,)`` float64, Σ_g σ²_{g,i} in falling order.
    group_energies : Tensor
        ``(groups, s)`` float64, σ²_{g,i}.
    vectors : Tensor
        ``(groups, s, s)`` singular vectors of the shorter side s, each with its largest entry positive.
    matrices : Tensor
        ``(groups, p, q)`` float64.
    """

    energies: Tensor
    group_energies: Tensor
    vectors: Tensor
    matrices: Tensor

    def factors(self, rank: int) -> Factors:
        """Best approximation of every group by a matrix of one rank (Eckart–Young), both factors carrying √σ."""
        vectors, energies = self.vectors[..., :rank], self.group_energies[:, :rank]
        floor = torch.finfo(torch.float64).eps ** 2 * float(self.energies[:1].sum())
        roots = energies.clamp_min(max(floor, _SMALLEST)).sqrt().sqrt()[:, None]
        if self.matrices.shape[1] <= self.matrices.shape[2]:
            return Factors((vectors * roots).contiguous(), ((vectors.mT @ self.matrices) / roots.mT).contiguous())
        return Factors(((self.matrices @ vectors) / roots).contiguous(), (vectors * roots).mT.contiguous())


def group_spectrum(matrices: Tensor) -> GroupSpectrum:
    """Decompose each of ``(groups, p, q)`` matrices, any floating dtype; computed in float64."""
    matrices = matrices.to(torch.float64)
    energies, vectors = torch.linalg.eigh(_gram(matrices))
    energies, vectors = energies.flip(-1).clamp_min(0.0), vectors.flip(-1)
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(vectors.gather(1, largest) < 0, -1.0, 1.0)
    return GroupSpectrum(energies.sum(dim=0), energies, vectors * signs, matrices)


def group_energies(matrices: Tensor) -> Tensor:
    """Σ_g σ²_{g,i} of ``(groups, p, q)`` matrices, float64, in falling order."""
    energies: Tensor = torch.linalg.eigvalsh(_gram(matrices.to(torch.float64)))
    return energies.flip(-1).clamp_min(0.0).sum(dim=0)


def _gram(matrices: Tensor) -> Tensor:
    return matrices @ matrices.mT if matrices.shape[1] <= matrices.shape[2] else matrices.mT @ matrices
