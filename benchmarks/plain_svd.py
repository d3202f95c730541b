"""Plain SVD beside the loop: the reference's own weights are truncated, and the factored network is trained.

Same engine, objective, data and number of epochs; what is left out is the loop of L and C steps. It is written as a
method so that everything around it is a job's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import worker.engine.learn as engine
from service.contract.spec import JobSpec
from service.contract.states import Phase
from worker.engine.learn import Sources, learn
from worker.engine.methods.context import Context, Outcome, ProgressMeter
from worker.engine.methods.factored import Learned, finish
from worker.engine.methods.loop import weights_of
from worker.engine.observer import Observer
from worker.engine.selection.steering import least_projections, pressure_for
from worker.engine.selection.units import fill

DIRECT_MU = 1.0  # one C step without training: only λ/μ matters


class PlainSvd:
    """Truncation and training.

    Parameters
    ----------
    ranks : mapping, optional
        Units of each term of the layers that are truncated; without it they are chosen by energy per cost.
    """

    def __init__(self, ranks: Mapping[str, list[int]] | None) -> None:
        self._ranks = ranks

    def run(self, context: Context) -> Outcome:
        """Truncate, then train for the epochs of the whole job."""
        if context.limit is None:
            raise ValueError("plain SVD is compared within a budget")
        context.observer.phase(Phase.LEARNING)
        module = context.copy()
        weights = weights_of(context, module)
        targets = [weight.detach() for weight in weights]
        network = context.network
        if self._ranks is None:
            _, made = pressure_for(network, targets, context.limit, mu=DIRECT_MU)
            made = fill(network, targets, made, context.limit, mu=DIRECT_MU)
        else:
            fixed = tuple(_fixed(problem, self._ranks.get(problem.layer.name)) for problem in network.problems)
            made = [
                replace(each, dense=problem.layer.name not in self._ranks)
                for problem, each in zip(
                    fixed, least_projections(replace(network, problems=fixed), targets), strict=True
                )
            ]
        epochs = context.epochs_of_steps + context.spec.fine_tune.resolved_epochs(context.epochs_of_steps)
        meter = ProgressMeter(context.observer, epochs, 1)
        return finish(context, Learned(module, targets, made, 0, DIRECT_MU), meter, epochs)


def _fixed(problem: Any, ranks: list[int] | None) -> Any:
    """Give a problem's terms these units; a layer that is not named keeps its own bounds."""
    if ranks is None:
        return problem
    choices = tuple(choice.at_rank(rank) for choice, rank in zip(problem.choices, _padded(ranks, problem), strict=True))
    return replace(problem, choices=choices)


def _padded(ranks: list[int], problem: Any) -> list[int]:
    return [*ranks, *[0] * (len(problem.choices) - len(ranks))]


def learn_plain_svd(
    sources: Sources, spec: JobSpec, observer: Observer, ranks: Mapping[str, list[int]] | None
) -> dict[str, Any]:
    """Run `learn` with plain SVD in the place of the spec's method."""
    with patch.object(engine, "method_for", lambda _name: PlainSvd(ranks)):
        return learn(sources, spec, observer)
