"""All layer problems at once, and what is asked of their projections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection
from worker.engine.csteps.parallel import map_layers
from worker.engine.layer_problem import LayerProblem

Thetas = Sequence[Any]  # Θ of each term of one layer
AfterLayer = Callable[[int, int], None]  # told when a layer is projected: how many are, of how many
Made = TypeVar("Made")


@dataclass(frozen=True)
class Network:
    """All layer problems, with the size of everything else.

    Parameters
    ----------
    problems : tuple of LayerProblem
        Layers that can be compressed.
    rest : int
        Size of the network without these layers' weights, in the metric of the problems.
    """

    problems: tuple[LayerProblem, ...]
    rest: int

    def size(self, projections: Sequence[Projection]) -> int:
        """Size of the whole network with these projections."""
        return self.rest + sum(p.size_with(made) for p, made in zip(self.problems, projections, strict=True))

    @property
    def least_size(self) -> int:
        """Size that no choice of ranks can go below."""
        return self.rest + sum(problem.least_size for problem in self.problems)

    @property
    def dense_size(self) -> int:
        """Size of the reference."""
        return self.rest + sum(problem.dense_size for problem in self.problems)


def every_layer(
    function: Callable[[int], Made], weights: Sequence[Tensor], after_layer: AfterLayer | None = None
) -> list[Made]:
    """Call a function for the place of each layer: side by side on a CPU, all at once on a GPU."""
    on_gpu = any(weight.is_cuda for weight in weights)
    sizes = [weight.numel() for weight in weights]
    return map_layers(function, range(len(weights)), sizes=sizes, together=on_gpu, after=after_layer)


def composed(problem: LayerProblem, factors: Thetas) -> Tensor:
    """Sum of a layer's terms as a dense weight, float64."""
    parts = [choice.term.project(made) for choice, made in zip(problem.choices, factors, strict=True)]
    return torch.stack(parts).sum(dim=0)


def held_against(network: Network, weights: Sequence[Tensor], projections: Sequence[Projection]) -> list[Projection]:
    """Give each projection the error ‖W − Σ Θ‖² to these weights, whatever it was fitted to (W − β/μ)."""
    return [
        made
        if made.dense
        else replace(made, error=float((weight.detach().double() - composed(problem, made.factors)).square().sum()))
        for problem, weight, made in zip(network.problems, weights, projections, strict=True)
    ]


def nothing_yet(network: Network, weights: Sequence[Tensor]) -> list[Thetas]:
    """Θ = 0 for every layer, as the loop begins."""
    return [
        tuple(choice.term.empty(weight) for choice in problem.choices)
        for problem, weight in zip(network.problems, weights, strict=True)
    ]


def settle_dense(network: Network, projections: Sequence[Projection]) -> list[Projection]:
    """Leave dense every layer whose sum costs no less than its dense form in the metric (never worse)."""
    return [
        Projection(made.factors, 0.0, made.objective, made.sweeps, dense=True)
        if made.dense or problem.size_with(made) >= problem.dense_size
        else made
        for problem, made in zip(network.problems, projections, strict=True)
    ]
