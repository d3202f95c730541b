"""Codebooks against brute force over all cuts, and what must hold for every input."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from worker.engine.csteps import codebook
from worker.engine.csteps.codebook import Codebook, fit_codebook, nearest_codes

WEIGHTS = npst.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 24)),
    elements=st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0, -1.0])),
)


def decoded(made: Codebook) -> Tensor:
    return made.values.gather(1, made.codes.long())


def error(rows: Tensor, made: Codebook) -> Tensor:
    return (rows - decoded(made)).square().sum(dim=1)


def brute_force(row: np.ndarray, size: int) -> float:
    ordered, best = np.sort(row), np.inf
    for cuts in itertools.combinations_with_replacement(range(len(row) + 1), size - 1):
        parts = np.split(ordered, cuts)
        best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part)))
    return best


def lloyd(row: np.ndarray, size: int, seed: int) -> float:
    values = np.random.default_rng(seed).choice(row, size)
    for _ in range(60):
        codes = np.abs(row[:, None] - values).argmin(axis=1)
        values = np.array([row[codes == j].mean() if (codes == j).any() else values[j] for j in range(size)])
    return float(((row[:, None] - values) ** 2).min(axis=1).sum())


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, st.integers(1, 5))
def test_no_cuts_are_better(rows: np.ndarray, size: int) -> None:
    rows = rows[:, :9]
    made = fit_codebook(torch.from_numpy(rows), size)
    assert made.exact
    assert made.values.shape == (len(rows), size)
    assert bool(made.values.isfinite().all())
    for row, found in zip(rows, error(torch.from_numpy(rows), made), strict=True):
        assert float(found) <= brute_force(row, size) + 1e-9


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(2, 6), st.integers(0, 5))
def test_never_worse_than_lloyd_idempotent_and_equal_for_equal(rows: np.ndarray, size: int, seed: int) -> None:
    given_rows = torch.from_numpy(rows)
    made = fit_codebook(given_rows, size)
    for row, found in zip(rows, error(given_rows, made), strict=True):
        assert float(found) <= lloyd(row, size, seed) + 1e-9
    again = fit_codebook(decoded(made), size)
    assert torch.allclose(decoded(again), decoded(made), atol=1e-9)
    for row, codes in zip(rows, made.codes, strict=True):
        of_value: dict[float, int] = {}
        assert all(of_value.setdefault(float(w), int(c)) == int(c) for w, c in zip(row, codes, strict=True))
    same = fit_codebook(given_rows.clone(), size)
    assert torch.equal(same.codes, made.codes)
    assert torch.equal(same.values, made.values)


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 5), torch.full((1, 7), 3.0), torch.tensor([[1.0]]), torch.arange(3.0)[None]]
)
def test_fewer_different_weights_than_values(rows: Tensor) -> None:
    made = fit_codebook(rows, 5)
    assert bool(made.values.isfinite().all())
    assert float(error(rows.double(), made).sum()) <= 1e-20


def test_large_layers_are_near_the_exact_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1, 6000, dtype=torch.float64) ** 3
    for size, work in ((3, 1e4), (8, 1e5), (20, 1e5), (20, 1e3)):
        exact = fit_codebook(rows, size)
        with monkeypatch.context() as patched:
            patched.setattr(codebook, "EXACT_WORK", work)
            found = fit_codebook(rows, size)
        assert exact.exact
        assert not found.exact
        assert float(error(rows, found)) <= (1.02 if work > 1e3 else 1.4) * float(error(rows, exact)), (size, work)


def test_a_warm_start_is_never_made_worse() -> None:
    torch.manual_seed(1)
    rows = torch.randn(3, 4000, dtype=torch.float64)
    start = torch.sort(torch.randn(3, 64, dtype=torch.float64), dim=1).values
    before = (rows - start.gather(1, nearest_codes(rows, start).long())).square().sum(dim=1)
    made = fit_codebook(rows, 64, start, in_loop=True)
    assert not made.exact
    assert bool((error(rows, made) <= before).all())
    again = fit_codebook(rows + 1e-3 * torch.randn_like(rows), 64, made.values, in_loop=True)
    assert float(error(rows, again).sum()) <= 1.01 * float(error(rows, made).sum())


def test_two_values_of_one_large_row_are_exact_and_offsets_do_not_cancel() -> None:
    torch.manual_seed(2)
    rows = torch.randn(1, 200_000)
    made = fit_codebook(rows, 2)
    assert made.exact
    assert torch.allclose(made.values, torch.tensor([[-0.798, 0.798]], dtype=torch.float64), atol=0.02)
    far = fit_codebook(rows.double() + 1e6, 2)
    assert torch.allclose(far.values - 1e6, made.values, atol=1e-4)


def test_many_values_have_wide_codes() -> None:
    rows = torch.randn(1, 3000)
    assert fit_codebook(rows, 256).codes.dtype == torch.uint8
    made = fit_codebook(rows, 1000)
    assert made.codes.dtype == torch.int32
    assert int(made.codes.max()) == 999
