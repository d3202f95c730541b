"""Leading eigenpairs of a matrix through the Gram matrix of its shorter side.

Measured on C steps (methods L.6): the float64 Gram matrix is 10–20 times more accurate than a float32 SVD and 2–3.5
times faster; only the pairs above a known threshold are needed.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from worker.engine.forms.factors import Factors

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spectrum:
    """Leading part of a singular value decomposition.

    Parameters
    ----------
    energies : Tensor
        ``(k,)`` float64, σ² in falling order.
    vectors : Tensor
        ``(s, k)`` singular vectors of the shorter side s, each with its largest entry positive.
    matrix : Tensor
        ``(p, q)`` float64, the matrix itself.
    """

    energies: Tensor
    vectors: Tensor
    matrix: Tensor

    def factors(self, rank: int) -> Factors:
        """Best rank-r approximation (Eckart–Young), both factors carrying √σ."""
        vectors = self.vectors[:, :rank]
        # Below this an energy is rounding; dividing by its root would overflow in the factors' own float32.
        floor = torch.finfo(torch.float64).eps ** 2 * float(self.energies[:1].sum())
        roots = self.energies[:rank].clamp_min(max(floor, _SMALLEST)).sqrt().sqrt()
        if self.matrix.shape[0] <= self.matrix.shape[1]:
            return Factors(vectors * roots, (vectors.T @ self.matrix) / roots[:, None])
        # Contiguous, as it is once it was saved: products of other layouts may round otherwise.
        return Factors((self.matrix @ vectors) / roots, (vectors * roots).T.contiguous())


def leading_spectrum(matrix: Tensor, *, above: float | None = None, at_most: int | None = None) -> Spectrum:
    """Eigenpairs of the Gram matrix: those above a threshold, or the first few, or all.

    Parameters
    ----------
    matrix : Tensor
        ``(p, q)``, any floating dtype; computed in float64.
    above : float, optional
        Only pairs with σ² > `above`.
    at_most : int, optional
        Only the `at_most` largest pairs; with `above`, the threshold is not used.
    """
    matrix = matrix.to(torch.float64)
    p, q = matrix.shape
    gram = matrix @ matrix.T if p <= q else matrix.T @ matrix
    energies, vectors = _eigen_cuda(gram) if gram.is_cuda else _eigen_cpu(gram, above, at_most)
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    if at_most is not None:
        energies, vectors = energies[:at_most], vectors[:, :at_most]
    elif above is not None:
        count = int((energies > above).sum())
        energies, vectors = energies[:count], vectors[:, :count]
    return Spectrum(energies, _fix_signs(vectors), matrix)


def select_rank(energies: Tensor, threshold: float, low: int, high: int) -> int:
    """Rank of one term by the threshold of methods L.2: r* = #{i : σᵢ² > 2λα/μ}, within its bounds."""
    return min(max(int((energies > threshold).sum()), low), high)


def energies_of(matrix: Tensor) -> Tensor:
    """All σ² of a ``(p, q)`` matrix, float64, in falling order."""
    matrix = matrix.to(torch.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if gram.is_cuda:
        on_device: Tensor = torch.linalg.eigvalsh(gram)
        return on_device.flip(0).clamp_min(0.0)
    values = scipy.linalg.eigh(gram.numpy(), eigvals_only=True, driver="evr", check_finite=False)
    energies: Tensor = torch.from_numpy(values[::-1].copy())
    return energies.clamp_min(0.0)


def _eigen_cuda(gram: Tensor) -> tuple[Tensor, Tensor]:
    energies, vectors = torch.linalg.eigh(gram)
    return energies, vectors


def _eigen_cpu(gram: Tensor, above: float | None, at_most: int | None) -> tuple[Tensor, Tensor]:
    size = gram.shape[0]
    options: dict[str, object] = {}
    if at_most is not None:
        if at_most == 0:
            return gram.new_zeros(0), gram.new_zeros(size, 0)
        if at_most < size:
            options["subset_by_index"] = (size - at_most, size - 1)
    elif above is not None and above > 0:
        if float(torch.trace(gram)) <= above:  # no eigenvalue can lie above the sum of all
            return gram.new_zeros(0), gram.new_zeros(size, 0)
        options["subset_by_value"] = (above, np.inf)
    energies, vectors = scipy.linalg.eigh(gram.numpy(), driver="evr", check_finite=False, **options)
    return torch.from_numpy(np.ascontiguousarray(energies)), torch.from_numpy(np.ascontiguousarray(vectors))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest entry of each vector positive, so that factors do not depend on the solver's choice."""
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
