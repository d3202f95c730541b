"""HOSVD and HOOI: errors of all ranks at once, the iteration against tensorly's, signs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.csteps.tucker import Bases, bases_of, errors_of_all_ranks, hooi, hosvd


def weight_of(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(weight: torch.Tensor, bases: Bases) -> float:
    made = torch.einsum("abk,na,cb->nck", bases.core, bases.outputs, bases.inputs)
    return float((weight - made).square().sum())


SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_the_error_of_every_pair_of_ranks_is_that_of_the_truncated_decomposition(
    shape: tuple[int, int, int], seed: int
) -> None:
    weight = weight_of(shape, seed)
    bases = hosvd(weight)
    errors = errors_of_all_ranks(bases)
    assert errors.shape == (shape[0] + 1, shape[1] + 1)
    for out in range(shape[0] + 1):
        for into in range(shape[1] + 1):
            assert abs(float(errors[out, into]) - error(weight, bases.first((out, into)))) <= 1e-9 * (
                1 + float(weight.square().sum())
            )
    assert float(errors[-1, -1]) <= 1e-9 * float(errors[0, 0])


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_the_iteration_keeps_orthonormal_bases_and_never_raises_the_error(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    weight = weight_of(shape, seed)
    ranks = data.draw(st.integers(1, shape[0])), data.draw(st.integers(1, shape[1]))
    start = hosvd(weight).first(ranks)
    made = hooi(weight, start)
    assert made.ranks == ranks
    for basis in (made.outputs, made.inputs):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-9)
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        assert bool((largest > 0).all())
    assert error(weight, made) <= error(weight, start) + 1e-9
    assert abs(error(weight, made) - (float(weight.square().sum()) - made.explained)) <= 1e-8
    again = bases_of(weight, made.outputs, made.inputs)
    assert torch.allclose(again.core, made.core)


def test_the_iteration_finds_what_tensorly_finds() -> None:
    from tensorly import decomposition

    for seed, ranks in enumerate([(3, 2), (5, 4), (2, 6), (8, 3)]):
        weight = weight_of((12, 8, 9), seed)
        (core, (outputs, inputs)), _ = decomposition.partial_tucker(
            weight.numpy(), rank=ranks, modes=[0, 1], n_iter_max=500, tol=1e-9
        )
        reference = Bases(torch.from_numpy(outputs), torch.from_numpy(inputs), torch.from_numpy(core))
        ours = hooi(weight, hosvd(weight).first(ranks))
        assert error(weight, ours) <= error(weight, reference) * (1 + 1e-4)


def test_a_weight_of_low_ranks_is_found_exactly() -> None:
    outputs, inputs, core = weight_of((10, 3, 1), 0)[..., 0], weight_of((7, 2, 1), 1)[..., 0], weight_of((3, 2, 9), 2)
    weight = torch.einsum("abk,na,cb->nck", core, outputs, inputs)
    assert error(weight, hooi(weight, hosvd(weight).first((3, 2)))) <= 1e-18 * float(weight.square().sum()) + 1e-18
