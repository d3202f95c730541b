"""Third stage of a job: the artifact in a fresh process, loaded by stock PyTorch, compared, scored and timed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from platform import machine, processor, python_version
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import LayerFacts, LayerPlan, RankRow, make_plan
from service.contract.report import (
    LATENCY_SLOWER_RATIO,
    BudgetOutcome,
    Fidelity,
    Latency,
    Measured,
    PairedDifference,
    PhaseUse,
    Report,
    ReportWarning,
)
from service.contract.resources import ResultSummary
from service.contract.spec import JobSpec
from worker.engine.agreement import agreement_difference, same_answers
from worker.engine.data import Dataset
from worker.engine.device import choose_device
from worker.engine.emission import ARTIFACT
from worker.engine.evaluation import Scores, evaluate_pair, loss_difference, measure_latency, metric_difference
from worker.engine.examples import example_inputs
from worker.engine.forward import call_seeded
from worker.engine.learn import EXPECTED, FINAL_PLAN, Sources, open_dataset
from worker.engine.network.costs import count_macs, count_params
from worker.engine.network.load import load_model
from worker.engine.objectives import make_objective
from worker.engine.widening import as_inputs

REPORT = "report.json"
_METRICS_THAT_ARE_LOSSES = frozenset({"loss", "mse", "relative_output_error"})
TOLERANCE = 1e-3  # of the largest output: other kernels, other order of sums; a wrong layer is off by far more


@dataclass(frozen=True)
class Pair:
    """Reference and artifact, both on the device of the run."""

    reference: torch.jit.ScriptModule
    compressed: torch.jit.ScriptModule


def verify(
    sources: Sources,
    spec: JobSpec,
    hashes: Mapping[str, str],
    phases: Callable[[], list[PhaseUse]],
    job_id: str | None = None,
) -> Report:
    """Hold the artifact against the trained network, the budget and the reference; write the report.

    Parameters
    ----------
    sources : Sources
        Model, data, and the work directory with the artifact and what `learn` left.
    spec : JobSpec
        What was asked for.
    hashes : mapping
        SHA-256 of model, data and spec.
    phases : callable
        Gives time and memory of the phases so far.
    job_id : str, optional
        Written into the report.

    Raises
    ------
    ProblemError
        ``VERIFICATION_FAILED`` when the artifact does not answer like the trained network, or misses its budget.
    """
    plan = json.loads((sources.work_dir / FINAL_PLAN).read_text(encoding="utf-8"))
    artifact = sources.work_dir / ARTIFACT
    expected = load_file(sources.work_dir / EXPECTED)
    difference, compared = _compare(artifact, expected, spec.seed)
    device = choose_device(spec.device)
    pair = Pair(load_model(sources.model, device), _stock_load(artifact, device))
    dataset = open_dataset(sources, spec, pair.reference)
    examples = as_inputs(example_inputs(spec, dataset, device), pair.reference)
    cpu = torch.device("cpu")
    sizes = [
        _sizes(load_model(sources.model, cpu), sources.model, examples, 0),  # a frozen file's weights are its constants
        _sizes(_stock_load(artifact, cpu), artifact, examples, plan["codes"]),
    ]
    budget = _budget(spec, plan, sizes[0], sizes[1])
    scored = _scores(spec, sources.objective, dataset, pair, device)
    latencies = [
        measure_latency([pair.reference, pair.compressed], examples, size)
        for size in sorted({1, _batch_size(spec, dataset, examples)})
    ]
    agreement, relative = _against_reference(pair, expected, spec, device)
    warnings = [ReportWarning.model_validate(each) for each in plan["warnings"]]
    warnings += _warnings(latencies, device, scored)
    report = Report(
        job_id=job_id,
        reference=_measured(sizes[0], sources.model, [pair_[0] for pair_ in latencies], scored, 0),
        compressed=_measured(sizes[1], artifact, [pair_[1] for pair_ in latencies], scored, 1),
        params_fraction=sizes[1]["params"] / sizes[0]["params"],
        macs_fraction=sizes[1]["macs"] / max(sizes[0]["macs"], 1),
        file_bytes_fraction=artifact.stat().st_size / sources.model.stat().st_size,
        metric_name=scored.compressed.metric_of.name if scored else None,
        higher_is_better=scored.compressed.metric_of.higher_is_better if scored else None,
        report_part=scored.part if scored else None,
        report_samples=int(scored.reference.samples.sum()) if scored else 0,
        differences=scored.differences() if scored else [],
        fidelity=Fidelity(
            max_abs_difference_to_trained=difference,
            samples=compared,
            relative_error_to_reference=relative,
            agreement_with_reference=agreement,
        ),
        budget=budget,
        device=_device_name(device),
        thread_count=torch.get_num_threads(),
        seed=spec.seed,
        hashes={**hashes, "artifact": hashlib.sha256(artifact.read_bytes()).hexdigest()},
        versions=_versions(),
        phases=phases(),
        warnings=warnings,
        training=plan["notes"],
        layers=_layer_plan(plan),
    )
    (sources.work_dir / REPORT).write_text(report.model_dump_json(), encoding="utf-8")
    return report


def _layer_plan(plan: Mapping[str, Any]) -> list[LayerPlan]:
    facts = [LayerFacts.model_validate(each) for each in plan["facts"]]
    return make_plan(facts, [RankRow.model_validate(each) for each in plan["rows"]])


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "numpy": np.__version__, "python": python_version()}
    return found | {"rankpress": version("rankpress")}


@dataclass(frozen=True)
class Scored:
    """Scores of both networks on the report part."""

    part: str
    reference: Scores
    compressed: Scores
    agreement: PairedDifference | None = None  # with the reference, where there are no targets

    def differences(self) -> list[PairedDifference]:
        """Metric and loss, compressed minus reference, with their intervals."""
        made = [metric_difference(self.compressed, self.reference)]
        if made[0].name not in _METRICS_THAT_ARE_LOSSES:
            made.append(loss_difference(self.compressed, self.reference))
        if self.agreement is not None:
            made.append(self.agreement)
        return [each for each in made if isfinite(each.difference) and isfinite(each.low) and isfinite(each.high)]

    @property
    def metric_is_known(self) -> bool:
        """Whether both networks have the metric: one that counts nothing on the part has no value."""
        return isfinite(self.reference.metric) and isfinite(self.compressed.metric)


def summarise(report: Report) -> ResultSummary:
    """Take the few numbers out of a report that a job carries."""
    difference = next((each for each in report.differences if each.name == report.metric_name), None)
    return ResultSummary(
        params_fraction=report.params_fraction,
        macs_fraction=report.macs_fraction,
        file_bytes_fraction=report.file_bytes_fraction,
        metric_name=report.metric_name,
        reference_metric=report.reference.metric,
        compressed_metric=report.compressed.metric,
        metric_difference=difference.difference if difference else None,
        metric_difference_low=difference.low if difference else None,
        metric_difference_high=difference.high if difference else None,
    )


def _stock_load(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load as any user of PyTorch would."""
    loaded: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    return loaded


def _compare(artifact: Path, expected: Mapping[str, Tensor], seed: int) -> tuple[float, int]:
    """Largest difference between the reloaded artifact and the trained network on held-out inputs, on the CPU."""
    try:
        network = _stock_load(artifact, torch.device("cpu")).eval()
    except RuntimeError as error:
        raise ProblemError(ErrorCode.VERIFICATION_FAILED, f"stock PyTorch cannot load the artifact: {error}") from None
    inputs = [expected[f"input.{i}"] for i in range(sum(name.startswith("input.") for name in expected))]
    wanted = [expected[f"output.{i}"] for i in range(sum(name.startswith("output.") for name in expected))]
    with torch.no_grad():
        outputs = call_seeded(network, inputs, seed)
    if [y.shape for y in outputs] != [w.shape for w in wanted]:
        raise ProblemError(
            ErrorCode.VERIFICATION_FAILED,
            f"the artifact's outputs have shapes {[tuple(y.shape) for y in outputs]}, the trained network's "
            f"{[tuple(w.shape) for w in wanted]}",
        )
    differences = [float((y.double() - w.double()).abs().max()) for y, w in zip(outputs, wanted, strict=True)]
    scales = [float(w.double().abs().max()) for w in wanted]
    for difference, scale in zip(differences, scales, strict=True):
        if not difference <= TOLERANCE * scale:  # NaN is never within
            raise ProblemError(
                ErrorCode.VERIFICATION_FAILED,
                f"the artifact's outputs differ from the trained network's by {difference:.3g}; at most "
                f"{TOLERANCE * scale:.3g} is accepted",
            )
    return max(differences, default=0.0), len(inputs[0]) if inputs else 0


def _sizes(module: torch.jit.ScriptModule, path: Path, examples: tuple[Tensor, ...], codes: int) -> dict[str, int]:
    """Numbers of a file (parameters, and `codes` packed in buffers), its bytes, and its multiply-adds on one sample."""
    macs = count_macs(module, tuple(x[:1].cpu() for x in examples))
    return {"params": count_params(module) + codes, "macs": macs, "bytes": path.stat().st_size}


def _budget(
    spec: JobSpec, plan: Mapping[str, Any], reference: Mapping[str, int], compressed: Mapping[str, int]
) -> BudgetOutcome | None:
    if spec.budget is None:
        return None
    metric = spec.budget.metric
    limit, reached, whole = int(plan["limit"]), compressed[metric], reference[metric]
    if reached > limit:
        raise ProblemError(
            ErrorCode.VERIFICATION_FAILED, f"the artifact has {reached} {metric}; the budget allows {limit}"
        )
    return BudgetOutcome(
        metric=metric,
        limit=limit,
        reached=reached,
        fraction_limit=limit / whole,
        fraction_reached=reached / whole,
    )


def _scores(
    spec: JobSpec, module: Path | None, dataset: Dataset | None, pair: Pair, device: torch.device
) -> Scored | None:
    """Score both networks on the report part, which nothing was chosen on."""
    made = make_objective(spec, module, dataset, pair.reference, device)
    if dataset is None or made is None:
        return None
    objective, teacher = made
    compressed, reference = evaluate_pair(pair.compressed, pair.reference, dataset, objective, teacher, device)
    part = "test" if dataset.report_is_test else "report"
    agreement = None
    if objective.spec.loss == "distillation" and teacher is not None:
        agreement = agreement_difference(pair.compressed, dataset, objective, teacher, device)
    return Scored(part, reference, compressed, agreement)


def _against_reference(
    pair: Pair, expected: Mapping[str, Tensor], spec: JobSpec, device: torch.device
) -> tuple[float | None, float | None]:
    """Share of samples with the same largest output, and the relative error of the outputs, on the compared inputs."""
    count = sum(name.startswith("input.") for name in expected)
    inputs = [expected[f"input.{i}"].to(device) for i in range(count)]
    with torch.no_grad():
        wanted = call_seeded(pair.reference.eval(), inputs, spec.seed)
        outputs = call_seeded(pair.compressed.eval(), inputs, spec.seed)
    error = sum(float((y.double() - w.double()).square().sum()) for y, w in zip(outputs, wanted, strict=True))
    scale = sum(float(w.double().square().sum()) for w in wanted)
    relative = (error / scale) ** 0.5 if scale > 0 else None
    same = same_answers(outputs[0], wanted[0], spec.objective.class_dim)
    return None if same is None else float(same.mean()), relative


def _measured(
    sizes: Mapping[str, int], path: Path, latencies: list[Latency], scored: Scored | None, which: int
) -> Measured:
    scores = None if scored is None else (scored.reference, scored.compressed)[which]
    return Measured(
        params=sizes["params"],
        macs=sizes["macs"],
        file_bytes=path.stat().st_size,
        latencies=latencies,
        loss=None if scores is None else _finite(scores.loss),
        metric=None if scores is None else _finite(scores.metric),
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _batch_size(spec: JobSpec, dataset: Dataset | None, examples: Sequence[Tensor]) -> int:
    """What training works with, or the example."""
    return len(examples[0]) if dataset is None else min(spec.training.batch_size, dataset.size("train"))


def _warnings(latencies: list[list[Latency]], device: torch.device, scored: Scored | None) -> list[ReportWarning]:
    warnings = [
        ReportWarning(
            code="SLOWER_THAN_REFERENCE",
            message=f"at batch {reference.batch_size} on {_device_name(device)} a pass takes "
            f"{compressed.median_ms:.3f} ms, the reference's {reference.median_ms:.3f} ms: fewer multiply-adds, but "
            "more operators",
        )
        for reference, compressed in latencies
        if compressed.median_ms > LATENCY_SLOWER_RATIO * reference.median_ms
    ]
    if scored is not None and not scored.metric_is_known:
        warnings.append(
            ReportWarning(
                code="METRIC_UNDEFINED",
                message=f"{scored.compressed.metric_of.name} has no value on the {scored.part} part: what it counts is "
                "not there, or a sum is not finite",
            )
        )
    if scored is not None and scored.part != "test":
        warnings.append(
            ReportWarning(
                code="NO_TEST_DATA",
                message="there are no test_* arrays, so the report is on held-out rows of the training data; the "
                "reference may have been trained on them, which favours it",
            )
        )
    return warnings


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({processor() or machine()})"
