"""Reshapes: the slides' example, the way back, and which reshapes are the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.terms import LowRankTermSpec
from worker.engine.forms.reshape import Reshape, best_chunks, compose, named_reshape, reshape_of

SLIDES = Reshape(view=(2, 3, 2), permute=(0, 2, 1), matrix=(2, 6))


def test_the_slides_example_comes_out_as_printed() -> None:
    weight = torch.arange(1, 13).reshape(3, 4)
    # 3×4 → 2×6: the elements in reading order, every second one of each half of the matrix first.
    printed = torch.tensor([[1, 3, 5, 2, 4, 6], [7, 9, 11, 8, 10, 12]])
    assert torch.equal(SLIDES.to_matrix(weight), printed)
    assert torch.equal(SLIDES.to_weight(printed, (3, 4)), weight)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Reshape, tuple[int, ...]]:
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    permute = tuple(draw(st.permutations(range(len(view)))))
    elements = int(torch.Size(view).numel())
    p = draw(st.sampled_from([d for d in range(1, elements + 1) if elements % d == 0]))
    m = draw(st.sampled_from([d for d in range(1, elements + 1) if elements % d == 0]))
    return Reshape(view, permute, (p, elements // p)), (m, elements // m)


@settings(max_examples=200, deadline=None)
@given(reshapes())
def test_the_way_back_gives_the_weight(made: tuple[Reshape, tuple[int, ...]]) -> None:
    reshape, shape = made
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    matrix = reshape.to_matrix(weight)
    assert tuple(matrix.shape) == reshape.matrix
    assert torch.equal(reshape.to_weight(matrix, shape), weight)
    assert torch.equal(torch.sort(matrix.flatten()).values, torch.arange(weight.numel()))


@settings(max_examples=200, deadline=None)
@given(reshapes())
def test_a_split_names_the_axes_of_rows_and_columns(made: tuple[Reshape, tuple[int, ...]]) -> None:
    reshape, shape = made
    split = reshape.split(shape)
    if split is None:
        return
    rows, columns = split
    assert (torch.Size([a.size for a in rows]).numel(), torch.Size([a.size for a in columns]).numel()) == reshape.matrix
    for axis, length in enumerate(shape):
        assert torch.Size([a.size for a in (*rows, *columns) if a.axis == axis]).numel() == length
    # An element's row depends on the row axes alone: along each column axis the row stays.
    number = torch.arange(reshape.matrix[0]).repeat_interleave(reshape.matrix[1]).reshape(reshape.matrix)
    by_axes = [(a.axis, a.place, a.size, a in rows) for a in sorted((*rows, *columns), key=lambda a: (a.axis, a.place))]
    weight = reshape.to_weight(number, shape).reshape([size for _, _, size, _ in by_axes])
    for place, (_, _, _, is_row) in enumerate(by_axes):
        constant = bool((weight == weight.select(place, 0).unsqueeze(place)).all())
        assert constant or is_row


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("matrix", (7, 5), (7, 5)),
        ("matrix", (7, 5, 1, 1), (7, 5)),
        ("matrix", (7, 5, 3, 3), None),
        ("channel", (7, 5, 3, 2), (7, 30)),
        ("channel", (7, 5), None),
        ("spatial", (7, 5, 3, 2), (21, 10)),
        ("spatial_transposed", (7, 5, 3, 2), (14, 15)),
        ("spatial", (7, 5), None),
        ("chunked", (6, 12), (24, 3)),
        ("chunked", (12, 6), (3, 24)),
        ("chunked", (7, 5, 3, 2), None),
        ("chunked", (3, 5), None),
    ],
)
def test_named_reshapes(name: str, shape: tuple[int, ...], matrix: tuple[int, int] | None) -> None:
    made = named_reshape(name, shape, 4 if shape in {(6, 12), (12, 6)} else "auto")  # type: ignore[arg-type]
    assert (made.matrix if made else None) == matrix


def test_chunks_must_divide_the_longer_side() -> None:
    assert named_reshape("chunked", (6, 12), 5) is None
    assert best_chunks(12, 3) == 2  # 3·2 + 6 = 12, as are 3·4 + 3 = 15 and 3·3 + 4 = 13
    assert best_chunks(7, 3) is None


def test_channel_and_spatial_follow_the_weights_axes() -> None:
    weight = torch.randn(4, 3, 2, 5)
    channel, spatial = named_reshape("channel", (4, 3, 2, 5)), named_reshape("spatial", (4, 3, 2, 5))
    assert channel is not None
    assert spatial is not None
    assert torch.equal(channel.to_matrix(weight), weight.reshape(4, 30))
    assert float(spatial.to_matrix(weight)[1 * 2 + 1, 2 * 5 + 3]) == float(weight[1, 2, 1, 3])  # (n·kh, c·kw)


def test_general_reshape_of_another_size_does_not_apply() -> None:
    term = LowRankTermSpec.model_validate({"reshape": {"view": [2, 3, 2], "permute": [0, 2, 1], "matrix": [2, 6]}})
    assert reshape_of(term, (3, 4)) == SLIDES
    assert reshape_of(term, (3, 5)) is None


SAME = [
    (Reshape((12, 8), (0, 1), (12, 8)), Reshape((12, 8), (1, 0), (8, 12)), (12, 8)),  # the transpose
    (Reshape((12, 8), (0, 1), (12, 8)), Reshape((3, 4, 8), (1, 0, 2), (12, 8)), (12, 8)),  # rows in another order
    (Reshape((12, 8), (0, 1), (12, 8)), Reshape((12, 2, 4), (0, 2, 1), (12, 8)), (12, 8)),
    (Reshape((3, 4, 8), (0, 1, 2), (3, 32)), Reshape((3, 2, 2, 8), (0, 2, 1, 3), (3, 32)), (12, 8)),
    (Reshape((4, 3, 1, 1), (0, 2, 1, 3), (4, 3)), Reshape((4, 3, 1, 1), (0, 1, 2, 3), (4, 3)), (4, 3, 1, 1)),
]
DISTINCT = [
    (Reshape((12, 8), (0, 1), (12, 8)), Reshape((12, 2, 4), (0, 1, 2), (24, 4)), (12, 8)),
    (Reshape((3, 4, 8), (0, 1, 2), (3, 32)), Reshape((4, 3, 8), (1, 0, 2), (3, 32)), (12, 8)),
    (Reshape((4, 3, 2, 2), (0, 2, 1, 3), (8, 6)), Reshape((4, 3, 2, 2), (0, 3, 1, 2), (8, 6)), (4, 3, 2, 2)),
]


@pytest.mark.parametrize(("one", "other", "shape"), SAME)
def test_keys_of_equal_reshapes_are_equal(one: Reshape, other: Reshape, shape: tuple[int, ...]) -> None:
    assert one.key(shape) == other.key(shape)
    assert _ranks_agree(one, other, shape)


@pytest.mark.parametrize(("one", "other", "shape"), DISTINCT)
def test_keys_of_distinct_reshapes_differ(one: Reshape, other: Reshape, shape: tuple[int, ...]) -> None:
    assert one.key(shape) != other.key(shape)
    assert not _ranks_agree(one, other, shape)


def _ranks_agree(one: Reshape, other: Reshape, shape: tuple[int, ...]) -> bool:
    """Whether a rank-1 matrix under one reshape has rank 1 under the other."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(one.matrix[0], 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, one.matrix[1], generator=generator, dtype=torch.float64)
    return int(torch.linalg.matrix_rank(other.to_matrix(compose(left, right, one, shape)))) == 1
