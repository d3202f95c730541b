"""The best low-rank matrix from the one before: one step of orthogonal iteration, and a rank that is certain.

Between two sweeps, and between two C steps, the leading subspace moves little. One step of orthogonal iteration with
Rayleigh–Ritz from the factors at hand is then almost the exact projection, at a fraction of its cost, and what it
misses the next sweep finds. The rank is not left to it: the number of energies above the threshold is the number of
positive eigenvalues of G − τI, which Sylvester's law of inertia reads off an LDLᵀ factorisation (Golub and Van Loan,
Matrix Computations, 8.1.5). Where that number is above that of the vectors at hand, or the subspace has moved far,
the exact solver is asked.
"""

import torch
from torch import Tensor

from worker.engine.csteps.spectrum import fix_signs, gram_of, in_working_dtype, leading_spectrum, roots_of
from worker.engine.forms.factors import Factors
from worker.engine.forms.term import Accuracy

SIZE_MIN = 96  # of the shorter side; below it the exact solver is no slower
SHARE_MAX = 0.6  # of the shorter side; with more vectors the exact solver is no slower
MOVED_MAX = 0.02  # gain of the step, as a part of the objective; above it one step is not enough
DEPENDENT = 1e-2  # a vector nearer than this to the span of those before it says that the start was poor


def best_factors(
    matrix: Tensor, threshold: float, low: int, high: int, accuracy: Accuracy, warm: Factors | None = None
) -> Factors:
    """Low-rank matrix of least threshold·rank + ‖matrix − left·right‖² with low ≤ rank ≤ high (methods L.2).

    Parameters
    ----------
    matrix : Tensor
        ``(p, q)``, any floating dtype.
    threshold : float
        2λα/μ: what one more rank costs.
    low, high : int
        Bounds of the rank.
    accuracy : Accuracy
        Exact in float64, exact in float32, or from `warm`.
    warm : Factors, optional
        The best factors of a matrix near to this one.

    Returns
    -------
    Factors
        Float64 where exact, otherwise float32, if its range does for the matrix.
    """
    matrix = in_working_dtype(matrix, accuracy)
    if accuracy is Accuracy.WARM and warm is not None and not matrix.is_cuda:
        made = refine(matrix, warm, threshold, low, high)
        if made is not None:
            return made
    above = threshold if low < high else None
    spectrum = leading_spectrum(matrix, above=above, at_least=low, at_most=high, dtype=matrix.dtype)
    return spectrum.factors(spectrum.energies.shape[0])


def refine(matrix: Tensor, warm: Factors, threshold: float, low: int, high: int) -> Factors | None:
    """One step of orthogonal iteration from `warm`, at the rank that the exact solver would choose.

    Parameters
    ----------
    matrix : Tensor
        ``(p, q)``, float32 or float64.
    warm : Factors
        The start; its rank bounds the rank of the result.
    threshold, low, high
        As in `best_factors`.

    Returns
    -------
    Factors or None
        None where the step does not do: more energies lie above the threshold than `warm` has vectors, or the
        subspace has moved too far for one step.
    """
    size, held = min(matrix.shape), warm.rank
    if size < SIZE_MIN or held > SHARE_MAX * size or held < min(low, size):
        return None
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = gram_of(matrix)
    rank = high if low == high else min(max(count_above(gram, threshold), low), high)
    if rank > held or held == 0:
        return None if rank > 0 else leading_spectrum(matrix, at_most=0, dtype=matrix.dtype).factors(0)
    # Contiguous, whatever memory a checkpoint gave it back in: products of other layouts may round otherwise.
    start = _unit_vectors((warm.left if short is matrix else warm.right.T).contiguous(), matrix.dtype)
    image = gram @ start
    before = (start * image).sum(dim=0)  # Rayleigh quotients of the start
    if not bool((before > 0).all()):
        return None
    block = image / before  # nearly orthonormal, so that its Gram matrix may be factorised as it is
    across = short.T @ block
    energies, mixing = _rayleigh_ritz(block, across)
    if mixing is None:
        return None
    tail = float(gram.diagonal().sum()) - float(energies.sum())
    if float(energies.sum()) - float(before.sum()) > MOVED_MAX * (max(tail, 0.0) + threshold * rank):
        return None
    return _factors(block, across, energies[:rank], mixing[:, :rank], rows_short=short is matrix)


def count_above(gram: Tensor, threshold: float) -> int:
    """Number of eigenvalues of a symmetric matrix above a threshold, by the inertia of LDLᵀ = G − τI."""
    shifted = gram.clone()
    shifted.diagonal().sub_(threshold)
    factor, pivots = torch.linalg.ldl_factor(shifted)
    single = pivots > 0  # a negative pivot belongs to a 2×2 block, which is indefinite: one eigenvalue of each sign
    return int((single & (factor.diagonal() > 0)).sum()) + int((~single).sum()) // 2


def _unit_vectors(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale the columns of a balanced factor to length 1; a fresh tensor, whatever the layout of the given one."""
    vectors = vectors.to(dtype)
    lengths = torch.linalg.vector_norm(vectors, dim=0)
    made: Tensor = vectors / lengths.clamp_min(torch.finfo(dtype).tiny)
    return made.contiguous()


def _rayleigh_ritz(block: Tensor, across: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ritz values of A·Aᵀ on the span of `block`, falling, and the mixing that makes Ritz vectors of its columns.

    With Y the block and R = AᵀY this is the generalised problem RᵀR v = θ YᵀY v.
    """
    lower, failed = torch.linalg.cholesky_ex(block.T @ block)
    if int(failed) != 0 or float(lower.diagonal().min()) < DEPENDENT:
        return block.new_zeros(0), None
    half = torch.linalg.solve_triangular(lower, across.T @ across, upper=False)
    whole = torch.linalg.solve_triangular(lower, half.T, upper=False)
    energies, vectors = torch.linalg.eigh((whole + whole.T) / 2)
    mixing = torch.linalg.solve_triangular(lower.T, vectors.flip(1), upper=True)
    return energies.flip(0).clamp_min(0.0), mixing


def _factors(block: Tensor, across: Tensor, energies: Tensor, mixing: Tensor, *, rows_short: bool) -> Factors:
    vectors = block @ mixing
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    other = across @ (mixing * torch.where(largest < 0, -1.0, 1.0).to(mixing.dtype))
    roots = roots_of(energies)
    vectors = fix_signs(vectors) * roots
    other = other / roots
    return Factors(vectors, other.T.contiguous()) if rows_short else Factors(other, vectors.T.contiguous())
