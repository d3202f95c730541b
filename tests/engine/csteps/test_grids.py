"""Scales of grids against a search over many, and the exact ones against every choice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from worker.engine.csteps.grids import (
    fit_binary,
    fit_fixed_point,
    fit_power_of_two,
    fit_scaled_binary,
    fit_ternary,
    power_levels,
)

ROWS = npst.arrays(np.float64, st.tuples(st.integers(1, 2), st.integers(1, 12)), elements=st.floats(-2, 2, width=16))


def error(rows: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    return (rows - levels * scales).square().sum(dim=1)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_binary_and_scaled_binary(values: np.ndarray) -> None:
    rows = torch.from_numpy(values)
    signs = fit_binary(rows).double() * 2 - 1
    assert bool((error(rows, signs, torch.ones(1)) <= error(rows, -signs, torch.ones(1)) + 1e-12).all())
    scales, codes = fit_scaled_binary(rows)
    found = error(rows, codes.double() * 2 - 1, scales)
    for scale in np.linspace(0, 2, 101):
        assert bool((found <= (rows.abs() - scale).square().sum(dim=1) + 1e-9).all())


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_ternary_is_the_best_number_of_largest(values: np.ndarray) -> None:
    rows = torch.from_numpy(values)
    scales, codes = fit_ternary(rows)
    found = error(rows, codes.double() - 1, scales)
    assert bool(scales.isfinite().all())
    for row, mine in zip(values, found, strict=True):
        falling = np.sort(np.abs(row))[::-1]
        best = min((row**2).sum() - falling[:j].sum() ** 2 / j for j in range(1, len(row) + 1))
        assert float(mine) <= best + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_powers_of_two_try_every_exponent(bits: int) -> None:
    torch.manual_seed(bits)
    rows = torch.randn(40, 25, dtype=torch.float64) * 10 ** torch.randn(40, 1, dtype=torch.float64)
    rows[0], rows[1, :20] = 0.0, 0.0
    scales, codes = fit_power_of_two(rows, bits)
    levels = power_levels(bits)
    assert len(levels) == 2**bits - 1
    assert bool((torch.log2(scales[1:]) % 1 == 0).all())
    found = error(rows, levels[codes.long()], scales)
    for exponent in range(-24, 24):
        grid = levels * 2.0**exponent
        nearest = (rows[..., None] - grid).abs().amin(dim=-1).square().sum(dim=1)
        assert bool((found <= nearest + 1e-9).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("n", [40, 3000])
def test_fixed_point_is_as_good_as_a_fine_search(bits: int, n: int) -> None:
    torch.manual_seed(bits)
    rows = torch.randn(2, n, dtype=torch.float64)
    scales, codes = fit_fixed_point(rows, bits)
    highest = max(2 ** (bits - 1) - 1, 1)
    levels = codes.double() * 2 - 1 if bits == 1 else codes.double() - highest
    assert int(levels.abs().max()) <= highest
    found, best = error(rows, levels, scales), torch.full((2,), torch.inf, dtype=torch.float64)
    for part in np.linspace(0.02, 1.1, 300):
        scale = rows.abs().amax(dim=1, keepdim=True) * part / highest
        tried = torch.where(rows < 0, -1.0, 1.0) if bits == 1 else (rows / scale).round().clamp(-highest, highest)
        best = torch.minimum(best, error(rows, tried, scale))
    slack = 1.01 if bits <= 8 else 1.2  # many levels, many local optima, all of them small
    assert bool((found <= slack * best + 1e-12).all())
    warm = fit_fixed_point(rows, bits, scales)
    if bits > 2:
        assert bool((error(rows, warm[1].double() - highest, warm[0]) <= found + 1e-12).all())


def test_nothing_but_zeros() -> None:
    rows = torch.zeros(3, 6)
    for scales, codes in (
        fit_scaled_binary(rows),
        fit_ternary(rows),
        fit_fixed_point(rows, 4),
        fit_power_of_two(rows, 3),
    ):
        assert bool((scales == 0).all())
        assert codes.shape == rows.shape
