"""Θ of a low-rank term: two factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.forms.term import Facts


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix as ``left @ right``.

    Parameters
    ----------
    left : Tensor
        ``(p, r)``; with `right` balanced: both carry √σ. Of a grouped layer ``(groups, p, r)``.
    right : Tensor
        ``(r, q)``, of a grouped layer ``(groups, r, q)``.
    place : int, optional
        Which of several reshapes they belong to, where the term chooses one.
    """

    left: Tensor
    right: Tensor
    place: int | None = None

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return int(self.left.shape[-1])

    @property
    def units(self) -> int:
        """The rank."""
        return self.rank

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"left": self.left, "right": self.right}

    def facts(self) -> Facts:
        """The rank, and the choice of the reshape."""
        return {"rank": self.rank} | ({} if self.place is None else {"place": self.place})

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same factors in another dtype, on the CPU."""
        return Factors(self.left.cpu().to(dtype), self.right.cpu().to(dtype), self.place)
