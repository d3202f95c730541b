"""Filling a file whose code takes what nobody foresees: the limit is kept, and what is returned was measured."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering import network_of

from worker.engine.csteps.additive import Projection
from worker.engine.selection.file_filling import EXPORTS_MAX, fill_file
from worker.engine.selection.network import settle_dense
from worker.engine.selection.steering import pressure_for

CODE = st.lists(st.integers(0, 200), min_size=7, max_size=7)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["mlp", "convnet"]), st.floats(0.05, 0.9), st.integers(-150, 150), CODE)
def test_the_file_is_within_the_limit(name: str, share: float, off: int, code: list[int]) -> None:
    network, weights = network_of(name, {"budget": {"max_params_fraction": 0.5}})
    most = network.dense_size + off
    limit = int(network.least_size + 350 + share * (most - network.least_size))
    written: list[tuple[list[Projection], int]] = []

    def measure(projections: Sequence[Projection]) -> int:
        ranks = sum(sum(each.ranks) for each in projections if not each.dense)
        written.append((list(projections), network.size(projections) + off + code[ranks % len(code)]))
        return written[-1][1]

    start = settle_dense(network, pressure_for(network, weights, max(limit - 350, network.least_size))[1])
    made, size = fill_file(network, weights, start, limit, measure)
    assert len(written) <= EXPORTS_MAX
    assert size == next(size for each, size in written if [one.ranks for one in each] == [one.ranks for one in made])
    assert size <= limit
    assert network.size(made) >= network.size(start) or written[0][1] > limit
