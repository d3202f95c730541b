"""Packed codes and positions come back, at the sizes that are promised."""

from math import ceil, log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.forms.packing import (
    PackedIndex,
    choose_index,
    index_bound,
    pack_codes,
    pack_index,
    packed_bytes,
    unpack_codes,
    unpack_positions,
)

unpack_codes_scripted = torch.jit.script(unpack_codes)
unpack_positions_scripted = torch.jit.script(unpack_positions)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 65536) | st.integers(2, 40), st.integers(0, 60), st.integers(0, 9))
def test_codes_come_back(size: int, count: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, size, count))
    packed = pack_codes(codes, size)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, size)
    for unpack in (unpack_codes, unpack_codes_scripted):
        assert torch.equal(unpack(packed, size, count).long(), codes)


def test_every_number_of_bits_costs_no_more_and_some_bases_less() -> None:
    for bits in range(1, 17):
        assert packed_bytes(8000, 2**bits) == 1000 * bits
    assert packed_bytes(8000, 3) * 8 / 8000 == 1.6
    for size in range(2, 300):
        assert packed_bytes(24000, size) * 8 <= 24000 * ceil(log2(size))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.booleans(), st.integers(0, 9))
def test_positions_come_back(count: int, density: float, clustered: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = rng.permutation(count // 3 + 1 if clustered else count)[: int(density**2 * count)]
    positions = torch.from_numpy(np.sort(places))
    chosen = choose_index(positions, count)
    assert chosen.stored_bytes <= index_bound(len(positions), count) <= -(-count // 8)
    layouts = [chosen, PackedIndex(0, count)]
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    layouts += [PackedIndex(bits, len(gaps) + int((gaps // (2**bits - 1)).sum())) for bits in (1, 3, 9, 17)]
    for layout in layouts:
        packed = pack_index(positions, layout)
        assert packed.numel() == layout.stored_bytes
        for unpack in (unpack_positions, unpack_positions_scripted):
            assert torch.equal(unpack(packed, layout.bits, layout.entries), positions)
        assert chosen.stored_bytes <= layout.stored_bytes or layout.bits == 1


@pytest.mark.parametrize(
    ("density", "kind", "most"), [(0.01, "delta", 9.5), (0.05, "delta", 6.5), (0.5, "bitmap", 2.01)]
)
def test_bits_of_one_position(density: float, kind: str, most: float) -> None:
    positions = (torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < density).nonzero().reshape(-1)
    index = choose_index(positions, 200_000)
    assert index.kind == kind
    assert 8 * index.stored_bytes / len(positions) < most
