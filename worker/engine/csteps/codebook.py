"""The C step of a learned codebook: the k values of least ‖w − c[code]‖², one codebook for each row (methods L.4).

In one dimension clusters are intervals of the sorted weights, so dynamic programming over cuts is exact (Bellman 1973;
Wu 1991): D_j(i) = min_m D_{j−1}(m) + SSE(m, i), whose best m rises with i, so that divide and conquer needs
O(k·n log n). Where that is too much, the same recursion runs over fewer places to cut, and Lloyd's iteration finishes
on all weights; on sorted weights with prefix sums one iteration costs O(k log n).
"""

from dataclasses import dataclass
from math import log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXACT_WORK = 2.0e7  # candidates of the recursion that are affordable: 1 to 2 s on one core
STEP_WORK = 1.0e6  # the same inside a loop that has a codebook to start from: 0.1 s
PLACES_MAX = 16384  # to cut at, where not every one is tried
LLOYD_MAX = 300
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """Values and codes of g rows.

    Parameters
    ----------
    values : Tensor
        ``(g, k)``, float64, rising.
    codes : Tensor
        ``(g, n)``, uint8 up to 256 values, else int32.
    exact : bool
        Whether no other values are better; else they are a local optimum.
    """

    values: Tensor
    codes: Tensor
    exact: bool


def fit_codebook(rows: Tensor, size: int, warm: Tensor | None = None, *, in_loop: bool = False) -> Codebook:
    """Find the codebook of each row.

    Parameters
    ----------
    rows : Tensor
        ``(g, n)``, any floating dtype, finite, n ≥ 1.
    size : int
        k.
    warm : Tensor, optional
        ``(g, k)``, a codebook to start Lloyd's iteration from; the result is never worse than what it leads to.
    in_loop : bool
        With `warm`: search from it alone where the exact search takes long.

    Returns
    -------
    Codebook
        Exact while ``g·d·k·log₂ d`` is at most 2e7 (1e6 in a loop), d the distinct weights of one row or n of several,
        and for two values of one row always.
    """
    sorted_rows = _Sorted(rows.detach().cpu().to(torch.float64).numpy())
    given = None if warm is None else np.sort(warm.detach().cpu().to(torch.float64).numpy(), axis=1)
    cuts = sorted_rows.all_cuts()
    exact = _work(cuts, size) <= (STEP_WORK if in_loop and given is not None else EXACT_WORK)
    tried: list[Array] = []
    if exact:
        tried.append(sorted_rows.means(_best_cuts(sorted_rows, cuts, size)))
    elif given is None or not in_loop:
        tried.append(sorted_rows.lloyd(_start(sorted_rows, size)))
    if given is not None and not exact:
        tried.append(sorted_rows.lloyd(given))
    errors = np.stack([sorted_rows.errors(values) for values in tried])
    values = np.stack(tried)[errors.argmin(axis=0), np.arange(errors.shape[1])]
    made = torch.from_numpy(values)
    return Codebook(made.to(rows.device), nearest_codes(rows, made.to(rows.device)), exact)


def nearest_codes(rows: Tensor, values: Tensor) -> Tensor:
    """Code of the value nearest to each weight; equal weights have equal codes.

    Parameters
    ----------
    rows : Tensor
        ``(g, n)``.
    values : Tensor
        ``(g, k)``, rising.
    """
    middles = (0.5 * (values[:, 1:] + values[:, :-1])).contiguous()
    codes = torch.searchsorted(middles, rows.detach().to(values.dtype).contiguous(), out_int32=True)
    return codes.to(torch.uint8) if values.shape[1] <= 256 else codes


class _Sorted:
    """Rows in rising order with the sums of every interval at hand."""

    def __init__(self, rows: Array) -> None:
        self.rows = np.sort(np.ascontiguousarray(rows), axis=1)
        self.middle = self.rows.mean(axis=1, keepdims=True)  # sums of squares far from 0 would cancel
        centred = self.rows - self.middle
        self.sums = _prefix(centred)
        self.squares = _prefix(np.square(centred, out=centred))

    def all_cuts(self) -> NDArray[np.int64]:
        """Places to cut, between different weights; between all of them where rows differ in number."""
        g, n = self.rows.shape
        if g > 1:
            return np.broadcast_to(np.arange(n + 1), (g, n + 1))
        inner = np.flatnonzero(self.rows[0, 1:] != self.rows[0, :-1]) + 1
        return np.concatenate([[0], inner, [n]])[None]

    def some_cuts(self, number: int) -> NDArray[np.int64]:
        """At most `number` places: half of them with as many weights between them, half equally far apart."""
        g, n = self.rows.shape
        half = max(number // 2, 2)
        cuts = np.empty((g, 2 * half + 1), dtype=np.int64)
        for row, out in zip(self.rows, cuts, strict=True):
            out[:half] = np.linspace(0, n, half + 1).astype(np.int64)[:half]
            out[half : 2 * half] = np.searchsorted(row, np.linspace(row[0], row[-1], half))
            out[2 * half] = n
        return np.sort(cuts, axis=1)

    def means(self, cuts: NDArray[np.int64]) -> Array:
        """Mean of each interval; of an empty one the value before it."""
        counts = np.diff(cuts, axis=1)
        sums = np.diff(np.take_along_axis(self.sums, cuts, axis=1), axis=1)
        means = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        return np.asarray(_without_gaps(means) + self.middle)

    def cuts_of(self, values: Array) -> NDArray[np.int64]:
        """Intervals of the weights nearest to each value."""
        g, n = self.rows.shape
        middles = 0.5 * (values[:, 1:] + values[:, :-1])
        inner = torch.searchsorted(torch.from_numpy(self.rows), torch.from_numpy(middles), right=True).numpy()
        cuts: NDArray[np.int64] = np.concatenate([np.zeros((g, 1), np.int64), inner, np.full((g, 1), n)], axis=1)
        return cuts

    def lloyd(self, values: Array) -> Array:
        """Means and intervals in turn until no interval changes; the error never rises."""
        cuts = self.cuts_of(values)
        for _ in range(LLOYD_MAX):
            counts = np.diff(cuts, axis=1)
            sums = np.diff(np.take_along_axis(self.sums, cuts, axis=1), axis=1)
            values = np.where(counts > 0, sums / np.maximum(counts, 1) + self.middle, values)
            values = np.sort(values, axis=1)
            following = self.cuts_of(values)
            if np.array_equal(following, cuts):
                break
            cuts = following
        return values

    def errors(self, values: Array) -> Array:
        """‖w − c[code]‖² of each row."""
        cuts = self.cuts_of(values)
        sums = np.diff(np.take_along_axis(self.sums, cuts, axis=1), axis=1)
        shifted = values - self.middle
        per_value = np.diff(cuts, axis=1) * shifted**2 - 2 * shifted * sums
        return np.asarray(self.squares[:, -1] + per_value.sum(axis=1))


def _prefix(rows: Array) -> Array:
    out = np.zeros((rows.shape[0], rows.shape[1] + 1))
    np.cumsum(rows, axis=1, out=out[:, 1:])
    return out


def _without_gaps(means: Array) -> Array:
    """Fill empty intervals by the nearest value before them, or after them at the beginning."""
    known = np.isfinite(means)
    places = np.where(known, np.arange(means.shape[1]), -1)
    before = np.maximum.accumulate(places, axis=1)
    first = known.argmax(axis=1)[:, None]
    return np.take_along_axis(means, np.where(before < 0, first, before), axis=1)


def _work(cuts: NDArray[np.int64], size: int) -> float:
    """Candidates of the recursion; its first and last layers are one pass each."""
    g, places = cuts.shape
    return float(g * places) * (1 + max(size - 2, 0) * log2(max(places, 2)))


def _start(rows: _Sorted, size: int) -> Array:
    """Values to start from: the best cuts among as many places as are affordable, or plain intervals."""
    places = int(EXACT_WORK / (len(rows.rows) * (1 + max(size - 2, 0) * 14)))
    if places >= 4 * size:
        return rows.means(_best_cuts(rows, rows.some_cuts(min(places, PLACES_MAX)), size))
    values = rows.means(rows.some_cuts(size))
    missing = size - values.shape[1]
    return (
        values[:, :size] if missing <= 0 else np.concatenate([values, values[:, -1:].repeat(missing, axis=1)], axis=1)
    )


def _best_cuts(rows: _Sorted, cuts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Solve the recursion over the given places to cut; returns ``(g, k + 1)`` of them."""
    g, places = cuts.shape
    table = _Intervals(
        cuts.astype(np.float64),
        np.take_along_axis(rows.sums, cuts, axis=1),
        np.take_along_axis(rows.squares, cuts, axis=1),
    )
    every = np.broadcast_to(np.arange(places), (g, places))
    least = table.error(np.zeros((g, 1), dtype=np.int64), every)
    chosen: list[NDArray[np.int32]] = []
    for _ in range(size - 2):
        least, best = _next_layer(least, table)
        chosen.append(best)
    ends = np.full((g, 1), places - 1)
    path = [ends]
    if size > 1:
        ends = (least + table.error(every, ends)).argmin(axis=1)[:, None]
        path.append(ends)
    for best in reversed(chosen):
        ends = np.take_along_axis(best, ends, axis=1).astype(np.int64)
        path.append(ends)
    path.append(np.zeros((g, 1), dtype=np.int64))
    return np.take_along_axis(cuts, np.concatenate(path[::-1], axis=1), axis=1)


@dataclass(frozen=True)
class _Intervals:
    """Prefix sums at the places to cut, ``(g, places)`` each."""

    counts: Array
    sums: Array
    squares: Array

    def error(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        """SSE of the intervals of each row; ``(g, c)`` with indices that broadcast."""
        at = [np.take_along_axis(each, end, axis=1) for each in (self.counts, self.sums, self.squares)]
        before = [np.take_along_axis(each, start, axis=1) for each in (self.counts, self.sums, self.squares)]
        return _sse(*(a - b for a, b in zip(at, before, strict=True)))

    def flat_error(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        """The same with indices into the flattened rows."""
        flat = [each.reshape(-1) for each in (self.counts, self.sums, self.squares)]
        return _sse(*(each[end] - each[start] for each in flat))


def _sse(count: Array, total: Array, squares: Array) -> Array:
    error = squares - total * total / np.maximum(count, 1.0)
    return np.maximum(error, 0.0)


def _next_layer(before: Array, table: _Intervals) -> tuple[Array, NDArray[np.int32]]:
    """Allow one more interval: least error up to each place, and where the last interval then begins.

    Places are solved in halving strides; the best start of each lies between those of its solved neighbours.
    """
    g, places = before.shape
    least, best = np.zeros_like(before), np.zeros((g, places), dtype=np.int32)
    offsets = (np.arange(g) * places)[:, None]
    stride = 1 << max((places - 1).bit_length() - 1, 0)
    flat_before = before.reshape(-1)
    while stride:
        ends = np.arange(stride, places, 2 * stride)
        low = best[:, ends - stride].astype(np.int64)
        above = ends + stride
        high = np.where(above < places, best[:, np.minimum(above, places - 1)], ends).astype(np.int64)
        high = np.minimum(high, ends)
        lengths = (high - low + 1).reshape(-1)
        firsts = np.cumsum(lengths) - lengths
        starts = np.arange(int(lengths.sum())) + np.repeat((low + offsets).reshape(-1) - firsts, lengths)
        until = np.repeat((ends + offsets).reshape(-1), lengths)
        errors = flat_before[starts] + table.flat_error(starts, until)
        smallest = np.minimum.reduceat(errors, firsts)
        there = np.where(errors == np.repeat(smallest, lengths), starts, g * places)
        least[:, ends] = smallest.reshape(g, -1)
        best[:, ends] = np.minimum.reduceat(there, firsts).reshape(g, -1) - offsets
        stride //= 2
    return least, best
