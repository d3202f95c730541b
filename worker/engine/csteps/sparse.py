"""C steps of pruning: which weights or groups are kept, and by how much they shrink (methods L.4)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ROUNDS_MAX = 12  # of a threshold and the price at what it keeps


def largest(energies: Tensor, number: int) -> Tensor:
    """Places of the `number` largest energies, rising; of equal ones the first.

    Parameters
    ----------
    energies : Tensor
        ``(n,)``, finite.
    number : int
        0 to n.

    Returns
    -------
    Tensor
        ``(number,)``, int64.
    """
    if number <= 0:
        return torch.zeros(0, dtype=torch.int64, device=energies.device)
    count = energies.numel()
    if number >= count:
        return torch.arange(count, device=energies.device)
    least = energies.kthvalue(count - number + 1).values
    above = energies > least
    missing = number - int(above.sum())
    above[(energies == least).nonzero().reshape(-1)[:missing]] = True
    return above.nonzero().reshape(-1)


def falling(values: Tensor) -> Tensor:
    """Sort the last axis, largest first; on a CPU without the permutation, which takes most of torch's time."""
    if values.is_cuda:
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.detach().contiguous().numpy(), axis=-1)).flip(-1)


def ball_threshold(norms: Tensor, radius: float) -> float:
    """Find the shrinkage of the Euclidean projection onto the ℓ₁ ball; 0 inside it.

    Of the falling norms uⱼ with sums Sⱼ, the projection keeps the first ρ, ρ the *last* j with uⱼ > (Sⱼ − radius)/j,
    and shrinks by (S_ρ − radius)/ρ (Duchi et al. 2008). Exact.

    Parameters
    ----------
    norms : Tensor
        ``(n,)``, not negative.
    radius : float
        Not negative.
    """
    work = norms.to(torch.float64)
    if norms.numel() == 0 or float(work.sum()) <= radius:
        return 0.0
    if radius <= 0:
        return float(work.max())
    ordered = falling(work)
    numbers = torch.arange(1, ordered.numel() + 1, device=ordered.device, dtype=torch.float64)
    shrinkages = (ordered.cumsum(0) - radius) / numbers
    passing = (ordered > shrinkages).nonzero()  # none where a tiny radius is lost in rounding: the first passes
    return float(shrinkages[int(passing[-1]) if len(passing) else 0])


def number_above(
    energies: Tensor, low: int, high: int, total_price: Callable[[int], float], unit_price: Callable[[int], float]
) -> int:
    """Number of units of least price less energy, where a unit's price falls with their number.

    The total price is concave in the number, so its tangent bounds it from above: thresholds on the energies, each at
    the price of one more unit at the number before, never raise the objective. The better end of two starts (none,
    and all) is taken; with a constant price either is exact.

    Parameters
    ----------
    energies : Tensor
        ``(n,)``, in any order.
    low, high : int
        Bounds of the number.
    total_price, unit_price : callable
        Price of a number of units, and of one more.
    """
    found: set[int] = set()
    for start in (low, high):
        number = start
        for _ in range(_ROUNDS_MAX):
            following = min(max(int((energies > unit_price(number)).sum()), low), high)
            if following == number:
                break
            number = following
        found.add(number)
    if len(found) == 1:
        return found.pop()
    return min(sorted(found), key=lambda number: total_price(number) - float(energies[largest(energies, number)].sum()))
