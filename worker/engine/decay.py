"""Weight decay on the product of two factors instead of on each of them (Khodak et al., ICLR 2021: Frobenius decay)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProductDecay:
    """(λ/2) Σ ‖U V‖² over pairs of factors.

    Parameters
    ----------
    pairs : sequence of (Tensor, Tensor)
        Parameters U ``(n, r, …)`` and V ``(r, …)``: weights of two linear layers or ungrouped convolutions in a chain,
        the second one first. As matrices they are ``(n·…, r)`` and ``(r, …)``.
    weight_decay : float
        λ.
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    weight_decay: float

    def add_gradient(self) -> None:
        """Add λ U (V Vᵀ) and λ (Uᵀ U) V to the gradients in place."""
        with torch.no_grad():
            for left, right in self.pairs:
                u, v = _matrices(left, right)
                of_left = (u @ (v @ v.T)).reshape(left.movedim(1, -1).shape).movedim(-1, 1)
                of_right = ((u.T @ u) @ v).reshape(right.shape)
                for parameter, gradient in ((left, of_left), (right, of_right)):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.add_(gradient, alpha=self.weight_decay)

    def value(self) -> float:
        """(λ/2) Σ ‖U V‖²."""
        with torch.no_grad():
            squares = [float((u.T @ u).mul(v @ v.T).sum()) for u, v in (_matrices(*pair) for pair in self.pairs)]
        return 0.5 * self.weight_decay * sum(squares)


def _matrices(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.movedim(1, -1).reshape(-1, left.shape[1]), right.reshape(right.shape[0], -1)
