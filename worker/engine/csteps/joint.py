"""The C step of terms that several layers share: one codebook, one number of kept weights (methods L.4).

The problem no longer separates over layers: the joint term is fitted to the residuals of all its layers at once, the
other terms layer by layer, in turn until the decrease stalls.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.engine.csteps.additive import STALL_RELATIVE, SWEEPS_MAX, Moment, Projection, TermChoice, sum_cost


class Joined(Protocol):
    """A layer whose terms may be joint with those of others."""

    @property
    def choices(self) -> Sequence[TermChoice]:
        """Its terms."""


def project_jointly(
    problems: Sequence[Joined],
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    pressure: float,
    mu: float = inf,
) -> list[Projection]:
    """Bring the layers that share a term to one Θ of it, from what each has found alone.

    Parameters
    ----------
    problems : sequence
        Layers with their terms.
    weights : sequence of Tensor
        W (or W − β/μ) of each.
    projections : sequence of Projection
        Of each layer as if its terms were its own.
    pressure, mu : float
        2λ/μ and μ.
    """
    made = list(projections)
    groups: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        for choice in problem.choices:
            if choice.joint_group is not None and not made[index].dense:
                members = groups.setdefault(choice.joint_group, [])
                if index not in members:
                    members.append(index)
    for layers in _connected(groups):
        moment = Moment(pressure, mu)
        for index, projection in zip(layers, _alternate(layers, problems, weights, made, groups, moment), strict=True):
            made[index] = projection
    return made


def _connected(groups: dict[str, list[int]]) -> list[list[int]]:
    """Sets of layers that are linked by any joint term."""
    found: list[set[int]] = []
    for members in groups.values():
        linked = set(members).union(*(each for each in found if each & set(members)))
        found = [each for each in found if not each & linked] + [linked]
    return [sorted(each) for each in found]


def _alternate(
    layers: Sequence[int],
    problems: Sequence[Joined],
    weights: Sequence[Tensor],
    projections: Sequence[Projection],
    groups: dict[str, list[int]],
    moment: Moment,
) -> list[Projection]:
    sums = {index: _Sum(weights[index], problems[index].choices, projections[index]) for index in layers}
    best = inf
    kept: list[Projection] = []
    for sweep in range(1, SWEEPS_MAX + 1):
        for place in range(max(len(each.choices) for each in sums.values())):
            for index in layers:
                if place < len(sums[index].choices) and sums[index].choices[place].joint_group is None:
                    sums[index].fit(place, moment)
            for name, members in groups.items():
                holders = [index for index in members if index in sums and sums[index].holds(place, name)]
                if holders:
                    _fit_joint([sums[index] for index in holders], place, moment)
        made = [each.projection(moment, sweep) for each in sums.values()]
        total = sum(each.objective for each in made)
        if kept and best - total <= STALL_RELATIVE * total:
            return made if total <= best else kept
        best, kept = total, made
    return kept


def _fit_joint(sums: Sequence["_Sum"], place: int, moment: Moment) -> None:
    choices = [each.choices[place] for each in sums]
    thetas = type(choices[0].term).fit_joint(
        [choice.term for choice in choices],
        [each.residual(place) for each in sums],
        [choice.ask(moment) for choice in choices],
        [each.thetas[place] for each in sums],
    )
    for each, theta in zip(sums, thetas, strict=True):
        each.put(place, theta)


class _Sum:
    """One layer's terms under way."""

    def __init__(self, weight: Tensor, choices: Sequence[TermChoice], start: Projection) -> None:
        self.target = weight.detach().to(torch.float64)
        self.choices = choices
        self.start = start
        self.thetas: list[Any] = list(start.factors)
        self.parts = [choice.term.project(theta) for choice, theta in zip(choices, self.thetas, strict=True)]

    def holds(self, place: int, group: str) -> bool:
        return place < len(self.choices) and self.choices[place].joint_group == group

    def residual(self, place: int) -> Tensor:
        others = [part for at, part in enumerate(self.parts) if at != place]
        return self.target - torch.stack(others).sum(dim=0) if others else self.target

    def put(self, place: int, theta: Any) -> None:
        self.thetas[place] = theta
        self.parts[place] = self.choices[place].term.project(theta)

    def fit(self, place: int, moment: Moment) -> None:
        choice = self.choices[place]
        if choice.rank_high > 0:
            self.put(place, choice.term.fit(self.residual(place), choice.ask(moment), self.thetas[place]))

    def projection(self, moment: Moment, sweeps: int) -> Projection:
        error = float((self.target - torch.stack(self.parts).sum(dim=0)).square().sum())
        pairs = list(zip(self.choices, self.thetas, strict=True))
        own = sum(choice.term.own_penalty(theta, choice.ask(moment)) for choice, theta in pairs)
        cost = moment.pressure * sum_cost(self.choices, self.thetas)
        return replace(self.start, factors=tuple(self.thetas), error=error, objective=cost + own + error, sweeps=sweeps)
