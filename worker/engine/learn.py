"""First stage of a job: from the uploaded files to the trained factored network and its rank configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.plan import ReasonCode
from service.contract.resolve import resolve_at_submit
from service.contract.spec import JobSpec, Metric
from service.contract.states import Phase
from worker.engine.assembly import assemble, code_count, load_state
from worker.engine.data import Dataset
from worker.engine.data_files import open_arrays
from worker.engine.device import choose_device
from worker.engine.examples import example_inputs, suggestion
from worker.engine.file_size import FileMeasure, bounded_network, is_negligible, measured_network
from worker.engine.forward import call_seeded, require_tensor_arguments
from worker.engine.layer_problem import LayerProblem
from worker.engine.layer_rules import Decisions, apply_rules, name_parameters, size_metric
from worker.engine.methods.context import Context, Outcome
from worker.engine.methods.registry import method_for
from worker.engine.network.costs import Census, take_census
from worker.engine.network.layers import Layer, find_layers
from worker.engine.network.load import load_model
from worker.engine.network.operators import reject_unsafe_operators
from worker.engine.objective import Objective
from worker.engine.objectives import make_objective
from worker.engine.observer import Observer, Saved
from worker.engine.refusals import require_problems, require_reachable, unnamed_parameters
from worker.engine.selection.network import Network
from worker.engine.teacher import Teacher
from worker.engine.widening import as_inputs, dtype_bits, floating_dtype, widen

FINAL_STATE = "final.safetensors"
FINAL_PLAN = "final.json"
EXPECTED = "expected.safetensors"
ROUTED_SAMPLES = 64  # on which layers are looked for that the first sample does not run
COMPARED_SAMPLES = 32  # held-out samples on which the reloaded artifact is compared with the trained network


@dataclass(frozen=True)
class Sources:
    """Files of a job on this machine, and where its stages leave theirs."""

    model: Path
    data: Path | None
    data_format: str | None
    work_dir: Path
    objective: Path | None = None  # the module of a loss that the user brings


def learn(sources: Sources, spec: JobSpec, observer: Observer, saved: Saved | None = None) -> dict[str, Any]:
    """Compress a model and leave the factored network's state, recipe and expected outputs in the work directory.

    Parameters
    ----------
    sources : Sources
        Model, data, and the work directory.
    spec : JobSpec
        What to do.
    observer : Observer
        Told of phases, layers, ranks, progress and checkpoints.
    saved : Saved, optional
        Where an earlier attempt stood; its tensors become the run's own.

    Returns
    -------
    dict
        Facts for the log: sizes and notes.

    Raises
    ------
    ProblemError
        With the code of what is wrong with the model, the data, the spec, or the budget.
    """
    observer.phase(Phase.STARTING)
    torch.manual_seed(spec.seed)
    device = choose_device(spec.device)
    reference = load_model(sources.model, device)
    reject_unsafe_operators(reference)
    require_tensor_arguments(reference)
    stored_bits = dtype_bits(reference)
    widen(reference)
    _require_numbers(reference)
    dataset = open_dataset(sources, spec, reference)
    if dataset is None and spec.example_inputs is None:
        raise ProblemError(
            ErrorCode.EXAMPLE_INPUTS_MISSING,
            "there is no data, so example_inputs must say what the model takes; for this model try "
            f'"example_inputs": {json.dumps(suggestion(find_layers(reference)))}',
        )
    observer.phase(Phase.INSPECTING)
    examples = as_inputs(example_inputs(spec, dataset, device), reference)
    census = take_census(reference, tuple(x[:1] for x in examples))
    census = with_stored_bits(_with_routed(census, reference, spec, dataset, examples), stored_bits)
    # Before the layers are told, which ends the time that a first call may take: a loss module may loop for ever too.
    made = make_objective(spec, sources.objective, dataset, reference, device)
    context = _context(sources, spec, observer, reference, device, census, dataset, made, examples, saved)
    del saved  # the context lets go of it
    outcome = method_for(spec.method.type).run(context)
    _leave(sources, context, outcome, examples)
    return {"recipe_layers": len(outcome.recipe), **outcome.notes}


def open_dataset(sources: Sources, spec: JobSpec, reference: torch.jit.ScriptModule) -> Dataset | None:
    """Open the dataset of a job, or None where it has none."""
    if sources.data is None or sources.data_format is None:
        return None
    arrays = open_arrays(sources.data, sources.data_format, sources.work_dir / "arrays")
    names = [argument.name for argument in reference._c._get_method("forward").schema.arguments][1:]
    dataset = Dataset(arrays, spec.data, spec.seed, names)
    dataset.dtype = floating_dtype(reference)
    return dataset


def _with_routed(
    census: Census,
    reference: torch.jit.ScriptModule,
    spec: JobSpec,
    dataset: Dataset | None,
    examples: Sequence[Tensor],
) -> Census:
    """Let layers be compressed that only some samples run, as experts are; for the first sample they cost nothing."""
    if ReasonCode.NOT_EXECUTED not in {layer.reason for layer in census.layers}:
        return census
    if dataset is not None:
        count = min(ROUTED_SAMPLES, spec.training.batch_size, dataset.size("train"))
        examples = as_inputs(dataset.rows("train", np.arange(count), examples[0].device).inputs, reference)
    others = take_census(reference, examples)

    def routed(layers: Sequence[Layer], found: Sequence[Layer]) -> list[Layer]:
        ran = {layer.name for layer in found if layer.reason is None}
        idle = {layer.name for layer in layers if layer.reason is ReasonCode.NOT_EXECUTED}
        return [replace(layer, reason=None, macs=0) if layer.name in idle & ran else layer for layer in layers]

    return replace(
        census,
        layers=routed(census.layers, others.layers),
        parameters=routed(census.parameters, others.parameters),
    )


def with_stored_bits(census: Census, bits: Mapping[str, int]) -> Census:
    """Give each layer the bits that its weight has in the file."""

    def stored(layers: Sequence[Layer]) -> list[Layer]:
        return [replace(layer, dtype_bits=bits.get(layer.weight or "", layer.dtype_bits)) for layer in layers]

    return replace(census, layers=stored(census.layers), parameters=stored(census.parameters))


def _context(
    sources: Sources,
    spec: JobSpec,
    observer: Observer,
    reference: torch.jit.ScriptModule,
    device: torch.device,
    census: Census,
    dataset: Dataset | None,
    made: tuple[Objective, Teacher | None] | None,
    examples: Sequence[Tensor],
    saved: Saved | None,
) -> Context:
    decisions = apply_rules(name_parameters(census.layers, census.parameters, spec), spec)
    observer.layers(decisions.facts)
    for warning in decisions.warnings:
        observer.event(EventKind.WARNING, warning.model_dump(mode="json", exclude_none=True))
    metric = size_metric(spec)
    unnamed = unnamed_parameters(decisions, census.parameters)
    require_problems(decisions, metric, unnamed)
    total = {"macs": census.total_macs, "params": census.total_params, "bytes": sources.model.stat().st_size}[metric]
    limit = None if spec.budget is None else spec.budget.limit(total)
    used = total - _size_of_unused(decisions, metric)
    network, measure = _network(sources.model, reference, decisions.problems, metric, used, limit)
    require_reachable(network, limit, total, metric, unnamed)
    context = Context(
        source=sources.model,
        spec=spec,
        device=device,
        decisions=decisions,
        network=network,
        limit=limit,
        dataset=dataset,
        objective=made[0] if made else None,
        teacher=made[1] if made else None,
        observer=observer,
        saved=saved,
        resolved=resolve_at_submit(spec),
        measure=measure,
    )
    _resolve_what_is_known(context, examples)
    return context


def _network(
    source: Path,
    reference: torch.jit.ScriptModule,
    problems: Sequence[LayerProblem],
    metric: Metric,
    total: int,
    limit: int | None,
) -> tuple[Network, FileMeasure | None]:
    """Size the network; under a budget in bytes with what its code takes of the file, measured where that counts."""
    if metric != "bytes" or limit is None:
        return Network(tuple(problems), total - sum(problem.dense_size for problem in problems)), None
    bounded = bounded_network(problems, total)
    if is_negligible(bounded, limit):
        return bounded, None
    measure = FileMeasure(source, problems)
    parameters = dict(reference.named_parameters())
    weights = [parameters[str(problem.layer.weight)] for problem in problems]
    return measured_network(bounded, weights, measure), measure


def _size_of_unused(decisions: Decisions, metric: Metric) -> int:
    """Size of what no method reads; the artifact is without it."""
    if metric == "macs":
        return 0
    unused = [decisions.layers[name] for name, reason in decisions.dense.items() if reason is ReasonCode.UNUSED]
    return sum(layer.params * (layer.dtype_bits // 8 if metric == "bytes" else 1) for layer in unused)


def _resolve_what_is_known(context: Context, examples: Sequence[Tensor]) -> None:
    spec, resolved = context.spec, context.resolved
    resolved["cost"] = spec.cost_weights().model_dump(mode="json")
    resolved["device"] = context.device.type
    if context.objective is not None:
        resolved["objective"] |= context.objective.resolved
    if context.dataset is not None:
        resolved["example_inputs"] = [
            {"shape": [1, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch."), "high": None} for x in examples
        ]
    context.observer.resolved(resolved)


def _require_numbers(reference: torch.jit.ScriptModule) -> None:
    """Refuse a model with NaN or infinities among its parameters: nothing can be learned from it."""
    for name, parameter in reference.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ProblemError(
                ErrorCode.MODEL_UNSUPPORTED,
                f"parameter '{name}' holds NaN or infinity; train the model to finite weights and upload it again",
            )


def _leave(sources: Sources, context: Context, outcome: Outcome, examples: Sequence[Tensor]) -> None:
    """Write what the later stages read; the network is compared on held-out inputs.

    On the CPU, where the artifact is compared: a CUDA device's TF32 convolutions alone differ by the tolerance.
    """
    cpu = torch.device("cpu")
    network = assemble(sources.model, outcome.recipe, cpu)
    load_state(network, outcome.state)
    network.eval()
    if context.dataset is not None:
        count = min(COMPARED_SAMPLES, context.dataset.size("report"))
        inputs: Sequence[Tensor] = context.dataset.rows("report", np.arange(count), cpu).inputs
    else:
        inputs = [x.to(cpu) for x in examples]
    inputs = as_inputs(inputs, network)
    with torch.no_grad():
        outputs = call_seeded(network, inputs, context.spec.seed)
    compared = {f"input.{i}": x.cpu().contiguous() for i, x in enumerate(inputs)}
    compared |= {f"output.{i}": y.cpu().contiguous() for i, y in enumerate(outputs)}
    save_file(compared, sources.work_dir / EXPECTED)
    save_file(dict(outcome.state), sources.work_dir / FINAL_STATE)
    budget = context.spec.budget
    plan = {
        "recipe": outcome.recipe,
        "notes": outcome.notes,
        "codes": code_count(outcome.recipe),
        "resolved": context.resolved,
        "limit": context.limit,
        "metric": size_metric(context.spec),
        "has_budget": budget is not None,
        "facts": [facts.model_dump(mode="json") for facts in context.decisions.facts],
        "rows": [row.model_dump(mode="json") for row in outcome.rows],
        "warnings": [warning.model_dump(mode="json") for warning in context.decisions.warnings],
        "device": context.device.type,
    }
    (sources.work_dir / FINAL_PLAN).write_text(json.dumps(plan), encoding="utf-8")
