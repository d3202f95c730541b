"""Weight decay on the product of two factors instead of on each of them (Khodak et al., ICLR 2021: Frobenius decay)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OPERATORS = {"Linear", "Conv1d", "Conv2d", "Conv3d"}  # whose weight is (outputs, inputs, …)
_EMITTED = ("__factors", "__weight")  # in the names under which the factored network holds what layers became


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


def factor_pairs(module: torch.jit.ScriptModule) -> list[tuple[Tensor, Tensor]]:
    """Parameters (U, V) of a factored network's layers whose weight is the matrix product U V.

    These are two linear layers or ungrouped convolutions in a chain, and weights composed of two matrices. Other forms
    (depthwise, Kronecker, grouped, transposed, quantized) are left out: their parameters decay as those of any layer.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, part in module.named_modules():
        if not any(mark in name.partition(".")[0] for mark in _EMITTED):
            continue
        children = dict(part.named_children())
        own: dict[str, Tensor] = dict(part.named_parameters(recurse=False))
        if list(children) == ["0", "1"] and all(_class_of(each) in _OPERATORS for each in children.values()):
            held = (dict(children["1"].named_parameters()), dict(children["0"].named_parameters()))
            pair = (held[0].get("weight"), held[1].get("weight"))
        else:
            pair = (own.get("left"), own.get("right"))
        left, right = pair
        if left is not None and right is not None and _multiply(left, right):
            pairs.append((left, right))
    return pairs


def _class_of(module: torch.nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))


def _multiply(left: Tensor, right: Tensor) -> bool:
    return (
        left.requires_grad
        and right.requires_grad
        and min(left.dim(), right.dim()) >= 2
        and (left.shape[1] == right.shape[0])
    )
