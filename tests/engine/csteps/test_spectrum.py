"""Leading eigenpairs of the Gram matrix against a full singular value decomposition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.csteps.spectrum import energies_of, leading_spectrum


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    p, q = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(p, q, generator=generator, dtype=torch.float64)
    return matrix * 10.0 ** draw(st.integers(-3, 3))


def squared_singular_values(matrix: torch.Tensor) -> np.ndarray:
    return scipy.linalg.svdvals(matrix.numpy()) ** 2


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_energies_are_those_of_the_full_svd(matrix: torch.Tensor) -> None:
    wanted = squared_singular_values(matrix)
    for found in (energies_of(matrix), leading_spectrum(matrix).energies):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-9 * wanted[0])
        assert (found >= 0).all()


@settings(max_examples=100, deadline=None)
@given(matrices(), st.integers(0, 12))
def test_factors_are_the_best_approximation(matrix: torch.Tensor, rank: int) -> None:
    rank = min(rank, *matrix.shape)
    u, s, v = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    factors = leading_spectrum(matrix, at_most=rank).factors(rank)
    assert factors.rank == rank
    error = np.linalg.norm(matrix.numpy() - (factors.left @ factors.right).numpy())
    assert error <= np.linalg.norm(matrix.numpy() - best) * (1 + 1e-9) + 1e-9 * s[0]
    # Balanced: both factors carry the square root of each singular value.
    np.testing.assert_allclose(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-5, atol=1e-6 * s[0] ** 0.5)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.floats(0.0, 1.0))
def test_a_threshold_gives_exactly_the_pairs_above_it(matrix: torch.Tensor, share: float) -> None:
    wanted = squared_singular_values(matrix)
    threshold = share * wanted[0] + 1e-7 * wanted[0]
    if np.min(np.abs(wanted - threshold)) < 1e-8 * wanted[0]:
        return
    spectrum = leading_spectrum(matrix, above=threshold)
    np.testing.assert_allclose(spectrum.energies, wanted[wanted > threshold], rtol=1e-9)
    assert spectrum.vectors.shape == (min(matrix.shape), len(spectrum.energies))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_signs_do_not_depend_on_the_solver(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, part = leading_spectrum(matrix), leading_spectrum(matrix, at_most=2)
    again = leading_spectrum(matrix.clone())
    assert torch.equal(whole.vectors, again.vectors)
    assert torch.allclose(whole.vectors[:, :2], part.vectors, atol=1e-10)
    largest = whole.vectors.abs().argmax(dim=0, keepdim=True)
    assert (whole.vectors.gather(0, largest) > 0).all()
    flipped = leading_spectrum(-matrix).factors(3)
    kept = whole.factors(3)
    assert torch.allclose(flipped.left @ flipped.right, -(kept.left @ kept.right))


def test_float32_matrices_are_computed_in_float64() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(energies_of(matrix), squared_singular_values(matrix.double()), rtol=1e-9)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_factors_of_a_matrix_of_lower_rank_are_finite_in_float32(shape: tuple[int, int], true_rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(shape[0], true_rank, generator=generator, dtype=torch.float64)
    matrix = left @ torch.randn(true_rank, shape[1], generator=generator, dtype=torch.float64)
    factors = leading_spectrum(matrix, at_most=8).factors(8)
    single = factors.left.float() @ factors.right.float()
    assert torch.isfinite(single).all()
    assert torch.allclose(single, matrix.float(), atol=1e-4)
