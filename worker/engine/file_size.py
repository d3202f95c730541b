"""The artifact's bytes, and the size of a network in them: numbers, code, and the tensors' places in the archive."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from worker.engine.assembly import Recipe, assemble, load_state, make_recipe
from worker.engine.csteps.additive import Projection
from worker.engine.layer_problem import LayerProblem
from worker.engine.network.export import export_bytes
from worker.engine.network.fresh_types import fresh_types
from worker.engine.selection.network import Network
from worker.engine.selection.steering import least_projections

FILE_OVERHEAD_BYTES = 4096  # measured on emitted files; a bound, where the file itself is not measured
NEGLIGIBLE = 0.005  # of a limit: what is bounded so low is not worth an export
LEAST_EXPORTS = 2  # the second sees what is left when layers that are too small for their code stay dense


def artifact_bytes(source: Path, recipe: Recipe, state: Mapping[str, Tensor] | None = None) -> bytes:
    """Make the artifact, the same bytes in every process that has the same `PYTHONHASHSEED`.

    Parameters
    ----------
    source : Path
        The reference's file.
    recipe : list of dict
        What each compressed layer becomes.
    state : mapping, optional
        Its numbers; without them the file has others in their places, and the same size.
    """
    with fresh_types():
        network = assemble(source, recipe, torch.device("cpu"), as_stored=True)
        load_state(network, state or {})
        return export_bytes(network)


@dataclass(frozen=True)
class FileMeasure:
    """Size of the file that projections would become, by writing it; of a recipe that was written before, as it was."""

    source: Path
    problems: Sequence[LayerProblem]
    known: dict[str, int] = field(default_factory=dict)

    def __call__(self, projections: Sequence[Projection]) -> int:
        """Bytes."""
        recipe = make_recipe(self.problems, projections)
        key = json.dumps(recipe)
        if key not in self.known:
            self.known[key] = len(artifact_bytes(self.source, recipe))
        return self.known[key]


def bounded_network(problems: Sequence[LayerProblem], file_bytes: int) -> Network:
    """Size a network by its file, with bounds for the code of what its layers become."""
    rest = file_bytes + FILE_OVERHEAD_BYTES - sum(problem.dense_size for problem in problems)
    bounded = [replace(each, overheads=tuple(c.term.overhead_bytes for c in each.choices)) for each in problems]
    return Network(tuple(bounded), rest)


def is_negligible(network: Network, limit: int) -> bool:
    """Tell whether bounds of code and places cost next to nothing of a limit."""
    return FILE_OVERHEAD_BYTES + sum(sum(problem.overheads) for problem in network.problems) <= NEGLIGIBLE * limit


def measured_network(network: Network, weights: Sequence[Tensor], measure: FileMeasure) -> Network:
    """Replace the bounds by what files have: the dense one, and the smallest, whose code is shared out by the bounds.

    Parameters
    ----------
    network : Network
        With bounds.
    weights : sequence of Tensor
        W of each problem.
    measure : FileMeasure
        Writes files.
    """
    made = least_projections(network, weights)
    dense = measure([replace(each, dense=True) for each in made])
    network = replace(network, rest=dense - sum(problem.dense_size for problem in network.problems))
    for _ in range(LEAST_EXPORTS):
        code = sum(_code(problem, each) for problem, each in zip(network.problems, made, strict=True))
        if code == 0:
            break
        scale = max(1 + (measure(made) - network.size(made)) / code, 0.0)
        network = replace(network, problems=tuple(_scaled(problem, scale) for problem in network.problems))
        before, made = made, [_dense_if_smaller(p, each) for p, each in zip(network.problems, made, strict=True)]
        if [each.dense for each in made] == [each.dense for each in before]:
            break
    return network


def _code(problem: LayerProblem, made: Projection) -> int:
    return 0 if made.dense else problem.overhead_of(made.counts(problem.choices))


def _scaled(problem: LayerProblem, scale: float) -> LayerProblem:
    return replace(problem, overheads=tuple(round(scale * each) for each in problem.overheads))


def _dense_if_smaller(problem: LayerProblem, made: Projection) -> Projection:
    return replace(made, dense=problem.size_of(made.counts(problem.choices)) > problem.dense_size)
