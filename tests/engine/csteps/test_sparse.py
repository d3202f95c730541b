"""What pruning keeps, against every other choice."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from worker.engine.csteps.sparse import ball_threshold, largest, number_above

NORMS = npst.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 4, width=16))


@settings(max_examples=80, deadline=None)
@given(NORMS, st.integers(0, 30))
def test_the_largest_and_of_equal_ones_the_first(values: np.ndarray, number: int) -> None:
    number = min(number, len(values))
    places = largest(torch.from_numpy(values), number).numpy()
    assert list(places) == sorted(places)
    assert sorted(places) == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:number])


@settings(max_examples=80, deadline=None)
@given(NORMS, st.floats(0, 1))
def test_projection_onto_the_ball(values: np.ndarray, fraction: float) -> None:
    radius = fraction * float(values.sum())
    theta = ball_threshold(torch.from_numpy(values), radius)
    shrunk = np.maximum(values - theta, 0)
    assert shrunk.sum() <= radius + 1e-9 * max(values.sum(), 1)
    assert np.isclose(shrunk.sum(), min(radius, values.sum()), atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):  # no point of the ball is nearer
        other = np.maximum(shrunk + rng.normal(0, 0.1, len(values)), 0)
        other *= min(1, radius / max(other.sum(), 1e-12))
        assert ((values - shrunk) ** 2).sum() <= ((values - other) ** 2).sum() + 1e-9


def test_ties_at_the_threshold_and_the_last_index_that_passes() -> None:
    assert ball_threshold(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2.0) == 0.5
    assert ball_threshold(torch.tensor([3.0, 1.0, 0.5]), 2.0) == 1.0
    assert ball_threshold(torch.tensor([3.0, 2.75, 0.25]), 3.0) == 1.375
    assert ball_threshold(torch.tensor([1.0, 2.0]), 5.0) == 0.0
    assert ball_threshold(torch.tensor([1.0, 2.0]), 0.0) == 2.0


@settings(max_examples=60, deadline=None)
@given(NORMS, st.floats(0, 3), st.integers(0, 10), st.integers(0, 20))
def test_the_number_of_units_at_a_constant_price(values: np.ndarray, price: float, low: int, room: int) -> None:
    low = min(low, len(values))
    high = min(low + room, len(values))
    energies = torch.from_numpy(values)
    found = number_above(energies, low, high, lambda number: price * number, lambda _: price)
    falling = np.sort(values)[::-1]
    objective = [price * k - falling[:k].sum() for k in range(low, high + 1)]
    assert objective[found - low] <= min(objective) + 1e-9


def test_a_price_that_falls_with_the_number_is_followed_from_both_ends() -> None:
    energies = torch.tensor([5.0, *[1.0] * 60, *[0.01] * 39])
    total = [0.0, *itertools.accumulate(6.0 / (1 + 0.2 * k) for k in range(100))]
    found = number_above(energies, 0, 100, total.__getitem__, lambda k: 6.0 / (1 + 0.2 * k))
    falling = np.sort(energies.numpy())[::-1]
    objective = [total[k] - falling[:k].sum() for k in range(101)]
    assert objective[found] <= min(objective[0], objective[100])
    assert found == int(np.argmin(objective))
