"""Reshapes: the elements of a weight read as another p×q matrix.

A reshape views the weight's axes, parts them by a permutation into row axes and column axes, and reads the result as
a matrix (Idelbayev and Carreira-Perpiñán, DCC 2021). The named reshapes are instances of this one class, and so is
the example of the authors' slides: 3×4 → 2×6 is ``view=(2, 3, 2), permute=(0, 2, 1), matrix=(2, 6)``.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, log, prod

import torch
from torch import Tensor

from service.contract.terms import GeneralReshape, LowRankTermSpec, NamedReshape


@dataclass(frozen=True)
class SubAxis:
    """A factor of one axis of the weight: `axis` is the weight's axis, `size` its length, `place` its order there.

    One more along it is `step` more along the weight's axis.
    """

    axis: int
    place: int
    size: int
    step: int


Split = tuple[tuple[SubAxis, ...], tuple[SubAxis, ...]]  # row axes, column axes


@dataclass(frozen=True)
class Reshape:
    """View, permute, and read as a matrix.

    Parameters
    ----------
    view : tuple of int
        Shape of the view; its product is the number of elements of the weight.
    permute : tuple of int
        Order of the view's axes before they are read as a matrix.
    matrix : tuple of (int, int)
        Rows p and columns q of the matrix.
    """

    view: tuple[int, ...]
    permute: tuple[int, ...]
    matrix: tuple[int, int]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Read a weight of any shape with prod(view) elements as the ``(p, q)`` matrix."""
        return weight.reshape(self.view).permute(self.permute).reshape(self.matrix)

    def to_matrices(self, weight: Tensor, groups: int) -> Tensor:
        """Read each group of the weight's first axis as a matrix: ``(groups, p, q)``."""
        axes = [0, *(axis + 1 for axis in self.permute)]
        return weight.reshape((groups, *self.view)).permute(axes).reshape((groups, *self.matrix))

    def to_weight(self, matrix: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
        """Undo `to_matrix`: the weight of shape `weight_shape` whose reshape is `matrix`."""
        permuted = [self.view[axis] for axis in self.permute]
        inverse = [self.permute.index(axis) for axis in range(len(self.permute))]
        return matrix.reshape(permuted).permute(inverse).reshape(weight_shape)

    def to_weight_of_groups(self, matrices: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
        """Undo `to_matrices`."""
        permuted = [self.view[axis] for axis in self.permute]
        inverse = [0, *(self.permute.index(axis) + 1 for axis in range(len(self.permute)))]
        return matrices.reshape([-1, *permuted]).permute(inverse).reshape(weight_shape)

    def split(self, weight_shape: tuple[int, ...]) -> Split | None:
        """Part the weight's own axes into row axes and column axes.

        Returns
        -------
        (rows, columns) or None
            None when the view cuts across the weight's axes or the matrix across the view's: then no factored
            operator computes the term, and its weight must be composed.
        """
        refined = _refine(self, weight_shape)
        if refined is None:
            return None
        axes = _factor_axes(refined.view, weight_shape)
        if axes is None:
            return None
        ordered: list[SubAxis] = []
        for sub in [axes[position] for position in refined.permute]:
            known = any(sub.axis == other.axis for other in ordered)
            if sub.size > 1 or (weight_shape[sub.axis] == 1 and not known):
                ordered.append(sub)
        present = {sub.axis for sub in ordered}  # each axis of length 1 stands once, wherever the view has its ones
        ordered += [SubAxis(axis, 0, 1, 1) for axis in range(len(weight_shape)) if axis not in present]
        rows: list[SubAxis] = []
        while prod(axis.size for axis in rows) < self.matrix[0]:
            rows.append(ordered[len(rows)])
        return tuple(rows), tuple(ordered[len(rows) :])

    def key(self, weight_shape: tuple[int, ...]) -> object:
        """Equal for two reshapes exactly when a low-rank matrix under one is a low-rank matrix under the other.

        That holds for every reshape that follows the weight's axes; one that does not equals only itself.
        """
        split = self.split(weight_shape)
        if split is None:
            return self
        return frozenset(frozenset(_merged(side)) for side in split)


def _refine(reshape: Reshape, weight_shape: tuple[int, ...]) -> Reshape | None:
    """Cut the axes of the view at the matrix's edge and at the weight's axes, or None where a cut is not whole."""
    held, p = 1, reshape.matrix[0]
    for axis in reshape.permute:
        size = reshape.view[axis]
        if held < p < held * size:
            if p % held or size % (p // held):
                return None
            reshape = _cut(reshape, axis, (p // held, size // (p // held)))
            break
        held *= size
    if _factor_axes(reshape.view, weight_shape) is not None:
        return reshape
    ends = {prod(weight_shape[axis:]) for axis in range(len(weight_shape))}
    for axis in reversed(range(len(reshape.view))):  # from the last, so that a cut leaves the numbers before it
        inner = prod(reshape.view[axis + 1 :])
        edges = [inner, *sorted(end for end in ends if inner < end < inner * reshape.view[axis])]
        edges.append(inner * reshape.view[axis])
        if any(outer % within for within, outer in pairwise(edges)):
            return None
        pieces = [outer // within for within, outer in pairwise(edges)]
        reshape = _cut(reshape, axis, tuple(reversed(pieces)))
    return reshape


def _cut(reshape: Reshape, axis: int, pieces: tuple[int, ...]) -> Reshape:
    """Write one axis of the view as several; the matrix stays the same."""
    more = len(pieces) - 1
    view = (*reshape.view[:axis], *pieces, *reshape.view[axis + 1 :])
    permute: list[int] = []
    for position in reshape.permute:
        run = range(axis, axis + more + 1) if position == axis else (position + more * (position > axis),)
        permute.extend(run)
    return Reshape(view, tuple(permute), reshape.matrix)


def _merged(side: tuple[SubAxis, ...]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring factors of one axis as (axis, elements of the axis within the run's steps, size)."""
    runs: list[tuple[int, int, int]] = []
    for sub in sorted((axis for axis in side if axis.size > 1), key=lambda axis: (axis.axis, axis.step)):
        if runs and runs[-1][0] == sub.axis and runs[-1][1] * runs[-1][2] == sub.step:
            axis, step, size = runs.pop()
            runs.append((axis, step, size * sub.size))
        else:
            runs.append((sub.axis, sub.step, sub.size))
    return runs


def _factor_axes(view: tuple[int, ...], weight_shape: tuple[int, ...]) -> list[SubAxis] | None:
    """Assign each axis of the view to the one axis of the weight that it is a factor of, if there is one."""
    axes: list[SubAxis] = []
    position = 0
    for axis, length in enumerate(weight_shape):
        place, held = 0, 1
        while held < length or (held == length == 1 and place == 0 and position < len(view) and view[position] == 1):
            if position == len(view):
                return None
            held *= view[position]
            if length % held:
                return None
            axes.append(SubAxis(axis, place, view[position], length // held))
            position += 1
            place += 1
    trailing = view[position:]
    if any(size != 1 for size in trailing):
        return None
    axes.extend(SubAxis(len(weight_shape) - 1, len(axes) + extra, 1, 1) for extra in range(len(trailing)))
    return axes


def named_reshape(
    name: NamedReshape,
    weight_shape: tuple[int, ...],
    chunks: int | str = "auto",
    *,
    transposed: bool = False,
    kronecker: tuple[int, int] | None = None,
) -> Reshape | None:
    """Make a named reshape for one weight (methods L.3), or None where it does not apply to the layer's kind.

    Parameters
    ----------
    name : str
        ``matrix`` (a linear layer or a convolution with a kernel of one weight), ``channel`` (convolutions),
        ``spatial``, ``spatial_transposed`` (convolutions with two kernel axes or three), ``chunked`` (linear layers;
        transposed when the layer is taller than wide) or ``kronecker``.
    weight_shape : tuple of int
        ``(m, n)`` of a linear layer or ``(n, c, k…)`` of a convolution; of one group where it has groups.
    chunks : int or "auto"
        Number of chunks of ``chunked``; auto is the divisor above 1 that makes the matrix most nearly square.
    transposed : bool
        The weight is a transposed convolution's, ``(c, n, k…)``.
    kronecker : (int, int), optional
        (m₁, n₁) of ``kronecker``; without them the divisors with the fewest parameters.
    """
    if name == "chunked":
        return _chunked(weight_shape, chunks)
    if name == "kronecker":
        return _kronecker(weight_shape, kronecker)
    kernel = weight_shape[2:]
    if name == "matrix":
        rows, columns = weight_shape[0], prod(weight_shape[1:])
        applies = len(weight_shape) >= 2 and all(size == 1 for size in kernel)
        return Reshape(weight_shape, tuple(range(len(weight_shape))), (rows, columns)) if applies else None
    if name == "channel":
        plain = tuple(range(len(weight_shape)))
        return Reshape(weight_shape, plain, (weight_shape[0], prod(weight_shape[1:]))) if kernel else None
    return _spatial(name, weight_shape, transposed=transposed) if len(kernel) > 1 else None


def _spatial(name: NamedReshape, weight_shape: tuple[int, ...], *, transposed: bool) -> Reshape:
    """One axis of the kernel with the outputs, the others with the inputs: (n k₁) × (c k₂ …)."""
    axes = list(range(2, len(weight_shape)))
    wide = [axis for axis in axes if weight_shape[axis] > 1]
    held = wide if len(wide) > 1 else axes
    alone = held[0] if name == "spatial" else held[-1]
    outputs, inputs = (
        [1 if transposed else 0, alone],
        [0 if transposed else 1, *(each for each in axes if each != alone)],
    )
    permute = (*inputs, *outputs) if transposed else (*outputs, *inputs)
    p = prod(weight_shape[axis] for axis in (inputs if transposed else outputs))
    return Reshape(weight_shape, permute, (p, prod(weight_shape) // p))


def _kronecker(weight_shape: tuple[int, ...], factors: tuple[int, int] | None) -> Reshape | None:
    """Σ Aₖ ⊗ Bₖ with Aₖ m₁×n₁; the axes of a kernel belong to Bₖ."""
    if len(weight_shape) < 2:
        return None
    (m, n), kernel = weight_shape[:2], weight_shape[2:]
    chosen = factors if factors is not None else best_kronecker(m, n, prod(kernel))
    if chosen is None or m % chosen[0] or n % chosen[1]:
        return None
    (m_1, n_1), (m_2, n_2) = chosen, (m // chosen[0], n // chosen[1])
    permute = (0, 2, 1, 3, *range(4, 4 + len(kernel)))
    return Reshape((m_1, m_2, n_1, n_2, *kernel), permute, (m_1 * n_1, m_2 * n_2 * prod(kernel)))


def best_kronecker(m: int, n: int, kernel: int = 1) -> tuple[int, int] | None:
    """Return (m₁, n₁) with the fewest parameters per rank, m₁n₁ + m₂n₂·kernel, the most balanced of such.

    None where every choice is one of the other reshapes: a Kronecker product has a part of both axes on both sides.
    """
    candidates = [(m_1, n_1) for m_1 in _divisors(m)[1:-1] for n_1 in _divisors(n)[1:-1]]

    def unbalance(pair: tuple[int, int]) -> tuple[float, ...]:
        m_1, n_1 = pair
        apart = abs(log(m_1 * m_1 / m)) + abs(log(n_1 * n_1 / n))
        return m_1 * n_1 + (m // m_1) * (n // n_1) * kernel, round(apart, 9), m_1, n_1

    return min(candidates, key=unbalance, default=None)


def _chunked(weight_shape: tuple[int, ...], chunks: int | str) -> Reshape | None:
    if len(weight_shape) != 2:
        return None
    m, n = weight_shape
    tall = m > n
    longer, shorter = max(m, n), min(m, n)
    s = chunks if isinstance(chunks, int) else best_chunks(longer, shorter)
    if s is None or longer % s:
        return None
    if tall:  # the same on the transpose: rows are m/s, columns s·n
        return Reshape((s, m // s, n), (1, 0, 2), (m // s, s * n))
    return Reshape((m, s, n // s), (0, 1, 2), (m * s, n // s))


def best_chunks(longer: int, shorter: int) -> int | None:
    """Return the divisor s ≥ 2 of `longer` with the fewest parameters per rank, shorter·s + longer/s; None if prime."""
    candidates = [s for s in _divisors(longer) if 2 <= s < longer]
    return min(candidates, key=lambda s: (shorter * s + longer // s, s), default=None)


def _divisors(number: int) -> list[int]:
    """Every divisor, rising."""
    return sorted({d for low in range(1, isqrt(number) + 1) if number % low == 0 for d in (low, number // low)})


def reshape_of(term: LowRankTermSpec, weight_shape: tuple[int, ...], *, transposed: bool = False) -> Reshape | None:
    """Make the reshape that a term of the spec asks for, or None where it does not apply to this weight."""
    if isinstance(term.reshape, GeneralReshape):
        general = term.reshape
        if prod(general.view) != prod(weight_shape):
            return None
        return Reshape(tuple(general.view), tuple(general.permute), (general.matrix[0], general.matrix[1]))
    return named_reshape(term.reshape, weight_shape, term.chunks, transposed=transposed, kronecker=term.kronecker)


def compose(left: Tensor, right: Tensor, reshape: Reshape, weight_shape: tuple[int, ...]) -> Tensor:
    """Weight of shape `weight_shape` from factors ``left`` (p, r) and ``right`` (r, q)."""
    return reshape.to_weight(torch.matmul(left, right), weight_shape)
