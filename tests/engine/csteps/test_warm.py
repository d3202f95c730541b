"""Warm low-rank fits: the ranks of the exact solver, at nearly its objective, whatever the start."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.engine.csteps.spectrum import gram_of
from worker.engine.csteps.warm import SIZE_MIN, best_factors, count_above, refine
from worker.engine.forms.factors import Factors
from worker.engine.forms.term import Accuracy

SHAPES = [(120, 200), (200, 120), (150, 150)]


def decaying(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    values = torch.arange(1, size + 1) ** -0.7
    left = torch.linalg.qr(torch.randn(shape[0], size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], size, generator=generator))[0]
    return ((left * values) @ right.T).to(dtype)


def moved(matrix: Tensor, by: float, seed: int = 1) -> Tensor:
    other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    return matrix + by * matrix.norm() / other.norm() * other


def threshold_at(matrix: Tensor, rank: int) -> float:
    """Half way between the energies of a rank and the next."""
    energies = scipy.linalg.svdvals(matrix.double().numpy()) ** 2
    return float(energies[rank - 1] + energies[rank]) / 2


def objective(matrix: Tensor, made: Factors, threshold: float) -> float:
    product = made.left.double() @ made.right.double()
    return threshold * made.rank + float((matrix.double() - product).square().sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**31), st.floats(-1.5, 1.5))
def test_inertia_counts_the_eigenvalues_above_a_threshold(size: int, seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    symmetric = torch.randn(size, size, generator=generator, dtype=torch.float64)
    symmetric = symmetric + symmetric.T
    wanted = scipy.linalg.eigvalsh(symmetric.numpy())
    if np.min(np.abs(wanted - threshold)) < 1e-9:
        return
    assert count_above(symmetric, threshold) == int((wanted > threshold).sum())


def test_inertia_reads_pivots_of_two_by_two() -> None:
    """A zero diagonal leaves no 1×1 pivot: each block has one eigenvalue of either sign."""
    block = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert count_above(torch.block_diag(*[block * scale for scale in (1.0, 2.0, 3.0)]), 0.0) == 3
    assert count_above(torch.diag(torch.tensor([3.0, -1.0, 2.0, 0.5])), 1.0) == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 12, 40])
def test_a_warm_fit_has_the_exact_rank_and_nearly_the_least_objective(shape: tuple[int, int], rank: int) -> None:
    before = decaying(shape)
    matrix = moved(before, 0.02)
    threshold = threshold_at(matrix, rank)
    exact = best_factors(matrix, threshold, 0, min(shape), Accuracy.EXACT)
    start = best_factors(before, 0.0, rank + 3, rank + 3, Accuracy.EXACT)
    warm = refine(matrix, start, threshold, 0, min(shape))
    assert warm is not None
    assert warm.rank == exact.rank == rank
    assert warm.left.dtype == torch.float32
    least = objective(matrix, exact, threshold)
    assert least * (1 - 1e-6) <= objective(matrix, warm, threshold) <= least * (1 + 2e-3)
    for _ in range(12):  # the same matrix again and again is what the iteration converges on
        warm = refine(matrix, warm, threshold, 0, min(shape))
        assert warm is not None
    assert objective(matrix, warm, threshold) <= least * (1 + 2e-4)
    balanced = (warm.left.norm(dim=0), warm.right.norm(dim=1))
    torch.testing.assert_close(*balanced, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_rises_is_found_exactly(shape: tuple[int, int]) -> None:
    """More energies above the threshold than the start has vectors: the exact solver is asked."""
    matrix = decaying(shape)
    start = best_factors(matrix, 0.0, 10, 10, Accuracy.EXACT)
    threshold = threshold_at(matrix, 25)
    assert refine(matrix, start, threshold, 0, min(shape)) is None
    made = best_factors(matrix, threshold, 0, min(shape), Accuracy.WARM, start)
    exact = best_factors(matrix, threshold, 0, min(shape), Accuracy.EXACT)
    assert made.rank == exact.rank == 25
    assert objective(matrix, made, threshold) <= objective(matrix, exact, threshold) * (1 + 1e-6)


def test_a_start_from_elsewhere_is_refused() -> None:
    matrix, start = decaying((120, 200)), best_factors(decaying((120, 200), seed=9), 0.0, 30, 30, Accuracy.EXACT)
    assert refine(matrix, start, threshold_at(matrix, 20), 0, 120) is None


def test_bounds_hold_and_small_matrices_are_exact() -> None:
    matrix = decaying((120, 200))
    start = best_factors(matrix, 0.0, 30, 30, Accuracy.EXACT)
    threshold = threshold_at(matrix, 20)
    for low, high, wanted in [(0, 8, 8), (25, 120, 25), (14, 14, 14), (0, 120, 20), (0, 0, 0)]:
        made = refine(matrix, start, threshold, low, high)
        assert made is not None
        assert made.rank == wanted
    assert refine(matrix, start, 1e9, 0, 120).rank == 0  # type: ignore[union-attr]
    assert refine(matrix, start, threshold, 31, 120) is None
    small = decaying((SIZE_MIN - 1, 200))
    assert refine(small, best_factors(small, 0.0, 5, 5, Accuracy.EXACT), 0.0, 5, 5) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_chooses_the_same_rank_at_the_same_objective(shape: tuple[int, int]) -> None:
    matrix = decaying(shape)
    for rank in (1, 17, 60):
        threshold = threshold_at(matrix, rank)
        exact = best_factors(matrix, threshold, 0, min(shape), Accuracy.EXACT)
        made = best_factors(matrix, threshold, 0, min(shape), Accuracy.SINGLE)
        assert (made.rank, made.left.dtype, exact.left.dtype) == (rank, torch.float32, torch.float64)
        assert objective(matrix, made, threshold) <= objective(matrix, exact, threshold) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-16, 1e-9, 1e9, 1e17, 1e25])
@pytest.mark.parametrize("accuracy", [Accuracy.SINGLE, Accuracy.WARM])
def test_squares_outside_of_the_range_of_float32_do_no_harm(scale: float, accuracy: Accuracy) -> None:
    matrix = decaying((120, 150), dtype=torch.float64)
    threshold = threshold_at(matrix, 12) * scale**2
    start = best_factors(matrix * scale, 0.0, 15, 15, Accuracy.EXACT)
    made = best_factors(matrix * scale, threshold, 0, 120, accuracy, start)
    assert made.rank == 12
    exact = best_factors(matrix * scale, threshold, 0, 120, Accuracy.EXACT)
    assert objective(matrix * scale, made, threshold) <= objective(matrix * scale, exact, threshold) * (1 + 1e-5)


def test_zeros_have_rank_0() -> None:
    for accuracy in Accuracy:
        assert best_factors(torch.zeros(100, 120), 0.0, 0, 100, accuracy).rank == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_from_factors_of_any_layout(shape: tuple[int, int]) -> None:
    """A checkpoint gives factors back in other memory than the run had them in."""
    matrix = moved(decaying(shape), 0.01)
    start = best_factors(decaying(shape), 0.0, 20, 20, Accuracy.SINGLE)
    again = Factors(start.left.T.contiguous().T, torch.cat([torch.zeros(1, shape[1]), start.right])[1:])
    first, second = (refine(matrix, each, 0.0, 20, 20) for each in (start, again))
    assert first is not None
    assert second is not None
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_the_gram_matrix_is_symmetric_and_whole(shape: tuple[int, int]) -> None:
    matrix = decaying(shape, dtype=torch.float64)
    gram = gram_of(matrix)
    assert gram.shape == (700, 700)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, matrix @ matrix.T if shape[0] < shape[1] else matrix.T @ matrix)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_a_cuda_device_chooses_the_same_rank() -> None:
    matrix = decaying((120, 200))
    threshold = threshold_at(matrix, 20)
    start = best_factors(matrix, 0.0, 25, 25, Accuracy.EXACT)
    for accuracy in Accuracy:
        made = best_factors(matrix.cuda(), threshold, 0, 120, accuracy, Factors(start.left.cuda(), start.right.cuda()))
        assert made.rank == 20
        here = best_factors(matrix, threshold, 0, 120, Accuracy.EXACT)
        product = Factors(made.left.cpu(), made.right.cpu())
        assert objective(matrix, product, threshold) <= objective(matrix, here, threshold) * (1 + 1e-5)
