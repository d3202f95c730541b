"""C steps of quantization to a grid: the scale of least ‖w − a·level‖², one for each row (methods L.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.csteps.sparse import falling

ALTERNATIONS_MAX = 10
STALL_RELATIVE = 1e-7  # of ‖w‖² explained
STARTS = tuple(0.93**step for step in range(32))  # parts of max|w| that the outermost level is placed at
FINER = tuple(0.92 + 0.01 * step for step in range(17))  # of the best of these, once more
BINS_PER_LEVEL = 32  # of the histogram that the search of a scale is made on
BINS_MIN, BINS_MAX, BINS_TOTAL = 512, 16384, 2**20
FINAL_ALTERNATIONS = 4  # on the weights themselves
POWERS_MAX = 120  # exponents of a grid of powers of two; more are below the resolution of float32
_BUCKETS = 160  # exponents under the highest that are told apart
_CLIPPED_MAX = 24  # how far under the highest exponent the grid's end is tried
_NO_EXPONENT = -(10**6)  # of 0
Grid = tuple[Tensor, Tensor]  # scales (g, 1) float64, codes (g, n)


def fit_binary(rows: Tensor) -> Tensor:
    """Codes of {−1, 1}: 1 where the weight is not negative. Exact.

    Parameters
    ----------
    rows : Tensor
        ``(g, n)``.
    """
    return (rows >= 0).to(torch.uint8)


def fit_scaled_binary(rows: Tensor) -> Grid:
    """Find {−a, a}: a is the mean of |w|. Exact."""
    return rows.abs().mean(dim=1, keepdim=True).to(torch.float64), fit_binary(rows)


def fit_ternary(rows: Tensor) -> Grid:
    """Find {−a, 0, a}: a is the mean of the j largest |w|, j maximising (their sum)²/j. Exact."""
    sums = falling(rows.abs().to(torch.float64)).cumsum(dim=1)
    numbers = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    kept = (sums.square() / numbers).argmax(dim=1, keepdim=True)
    scale = sums.gather(1, kept) / (kept + 1)
    return scale, _codes(_rounded(rows, scale, 1), 1)


def fit_fixed_point(rows: Tensor, bits: int, warm: Tensor | None = None, *, in_loop: bool = False) -> Grid:
    """Find a·{−q, …, q}, q = 2ᵇ⁻¹ − 1: levels and scale in turn from several starts.

    One bit is {−a, a} and two are {−a, 0, a}, which are exact; more are the best of the local optima found.

    Parameters
    ----------
    rows : Tensor
        ``(g, n)``.
    bits : int
        b.
    warm : Tensor, optional
        ``(g, 1)``, one more start; the result is never worse than what it leads to.
    in_loop : bool
        With `warm`: search from it alone.

    Returns
    -------
    scales : Tensor
        ``(g, 1)``, float64.
    codes : Tensor
        ``(g, n)``, level plus q.
    """
    if bits <= 2:
        return fit_scaled_binary(rows) if bits == 1 else fit_ternary(rows)
    highest = 2 ** (bits - 1) - 1
    work = rows.to(torch.float64)
    finals = [] if warm is None else [warm.to(work)]
    if warm is None or not in_loop:
        finals.append(_search(work.abs(), highest))
    scale, error = _alternate(work, None, finals[0], highest, FINAL_ALTERNATIONS)
    for start in finals[1:]:
        other, other_error = _alternate(work, None, start, highest, FINAL_ALTERNATIONS)
        scale = torch.where(other_error < error, other, scale)
    return scale, _codes(_rounded(work, scale, highest), highest)


def fit_power_of_two(rows: Tensor, bits: int) -> Grid:
    """Find {0, ±2ᵉ, ±2ᵉ⁻¹, …}, 2ᵇ⁻¹ − 1 exponents: e by trying every one. Exact.

    Between two neighbouring powers the nearer one changes at 1.5 times the lower, so sums over weights of equal
    exponent and equal half of their mantissa are all that the error of an e needs.

    Returns
    -------
    scales : Tensor
        ``(g, 1)``, float64: 2ᵉ.
    codes : Tensor
        ``(g, n)``: 0 for 0, 1 + 2j for 2ᵉ⁻ʲ, 2 + 2j for −2ᵉ⁻ʲ.
    """
    powers = power_count(bits)
    work = rows.detach().cpu().to(torch.float64)
    mantissas, exponents = torch.frexp(work)  # |mantissa| in [0.5, 1)
    upper = mantissas.abs() >= 0.75
    exponents = torch.where(work != 0, exponents - 1, _NO_EXPONENT)
    top = exponents.amax(dim=1, keepdim=True)
    places = (2 * (top - exponents).clamp(max=_BUCKETS - 1) + upper.to(exponents.dtype)).long()
    scaled = torch.ldexp(work, -top).abs()
    tables = [
        torch.zeros(len(work), 2 * _BUCKETS, dtype=torch.float64).scatter_add_(1, places, each)
        for each in (torch.ones_like(scaled), scaled)  # the sum of squares is the same for every e
    ]
    below = torch.arange(_BUCKETS).repeat_interleave(2)  # how far under the highest exponent a bucket lies
    nearest = torch.arange(2).repeat(_BUCKETS) - below  # its nearest power, counted from there
    errors = []
    for shift in range(min(powers, _BUCKETS) + _CLIPPED_MAX):
        end = 1 - shift
        power = nearest.clamp(min=end - powers + 1, max=end)
        level = torch.where(-below >= end - powers, torch.exp2(power.double()), 0.0)
        errors.append((tables[0] * level.square() - 2 * tables[1] * level).sum(dim=1))
    ends = top + 1 - torch.stack(errors).argmin(dim=0)[:, None]
    powers_of = torch.minimum(torch.maximum(exponents + upper.to(exponents.dtype), ends - powers + 1), ends)
    codes = torch.where(exponents >= ends - powers, 1 + 2 * (ends - powers_of) + (work < 0), 0)
    empty = top == _NO_EXPONENT
    scales = torch.where(empty, 0.0, torch.exp2(torch.where(empty, 0, ends).double()))
    return scales.to(rows.device), torch.where(empty, 0, codes).to(torch.uint8).to(rows.device)


def power_count(bits: int) -> int:
    """Exponents of a grid of powers of two in b bits: 2ᵇ⁻¹ − 1, as far as they matter."""
    return min((1 << (bits - 1)) - 1, POWERS_MAX)


def power_levels(bits: int) -> Tensor:
    """Levels of the codes of `fit_power_of_two` at scale 1, float64."""
    powers = torch.exp2(-torch.arange(power_count(bits), dtype=torch.float64))
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.stack([powers, -powers], dim=1).reshape(-1)])


def _alternate(rows: Tensor, counts: Tensor | None, scale: Tensor, highest: int, times: int) -> Grid:
    """Levels by rounding, then the scale by least squares; returns it with the error less ‖w‖²."""
    error = torch.full_like(scale, torch.finfo(scale.dtype).max)
    for _ in range(times):
        levels = _rounded(rows, scale, highest)
        weighted = levels if counts is None else levels * counts
        both, own = (weighted * rows).sum(dim=1, keepdim=True), (weighted * levels).sum(dim=1, keepdim=True)
        found = both / own.clamp(min=1e-300)
        gain = -both * found
        stalled = not bool((gain < error - STALL_RELATIVE * error.abs()).any())
        scale, error = torch.where(gain < error, found, scale), torch.minimum(gain, error)
        if stalled:
            break
    return scale, error


def _search(magnitudes: Tensor, highest: int) -> Tensor:
    """Scale from several starts, on a histogram where there are many weights."""
    top = magnitudes.amax(dim=1, keepdim=True)
    bins = min(BINS_PER_LEVEL * highest, BINS_MAX, max(BINS_TOTAL // len(magnitudes), BINS_MIN))
    values, counts = _histogram(magnitudes, top, bins)
    best = _best_of(values, counts, [top * part / highest for part in STARTS], highest)
    return _best_of(values, counts, [best, *(best * part for part in FINER)], highest)


def _best_of(rows: Tensor, counts: Tensor | None, starts: Sequence[Tensor], highest: int) -> Tensor:
    best, least = starts[0], torch.full_like(starts[0], torch.inf)
    for start in starts:
        scale, error = _alternate(rows, counts, start, highest, ALTERNATIONS_MAX)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _rounded(rows: Tensor, scale: Tensor, highest: int) -> Tensor:
    """Nearest levels, float64; 0 where the scale is 0."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (rows.to(torch.float64) / safe).round().clamp(-highest, highest) * (scale > 0)


def _codes(levels: Tensor, highest: int) -> Tensor:
    codes = levels + highest
    return codes.to(torch.uint8) if 2 * highest < 256 else codes.to(torch.int32)


def _histogram(magnitudes: Tensor, top: Tensor, bins: int) -> tuple[Tensor, Tensor | None]:
    """Mean and number of the magnitudes in equal bins; few of them stay as they are."""
    if magnitudes.shape[1] <= bins:
        return magnitudes, None
    safe = torch.where(top > 0, top, torch.ones_like(top))
    places = (magnitudes / safe * (bins - 1)).long()
    zeros = torch.zeros(len(magnitudes), bins, dtype=torch.float64, device=magnitudes.device)
    counts = zeros.scatter_add(1, places, torch.ones_like(magnitudes))
    return zeros.scatter_add(1, places, magnitudes) / counts.clamp(min=1), counts
