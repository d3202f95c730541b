"""The whole of a job on a network of the corpus, and what must be true of it."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus_cases import Case, Way, make_network, save_dataset, save_network
from safetensors.torch import load_file
from tiny_jobs import Learned, quick, run_learn

from service.contract.plan import Form, LayerPlan, RankRow, make_plan
from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import EXPECTED, Sources
from worker.engine.network.costs import count_macs, count_params
from worker.engine.network.layers import find_layers
from worker.engine.network.load import load_model
from worker.engine.network.operators import reject_unsafe_operators
from worker.engine.verification import verify

FEW: dict[str, Any] = {"method": {"mu": {"steps": 2}}, "training": {"batch_size": 32, "optimizer": {"lr": 0.005}}}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest output


class FreshTorch:
    """A process that has imported nothing but PyTorch, and never this project."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("fresh_torch.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def check(self, artifact: Path, expected: Path, reference: Path) -> dict[str, Any]:
        """Load, compare, train one more step, save and load again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"artifact": str(artifact), "expected": str(expected), "reference": str(reference)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.poll()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@dataclass
class Compressed:
    """A finished job."""

    model: Path
    data: Path
    work_dir: Path
    learned: Learned
    report: Report

    @property
    def artifact(self) -> Path:
        return self.work_dir / "artifact.pt"

    @property
    def plan(self) -> list[LayerPlan]:
        rows = [RankRow.model_validate(row) for row in self.learned.plan["rows"]]
        return make_plan(self.learned.recorder.facts, rows)

    @property
    def compressed(self) -> dict[str, LayerPlan]:
        """Layers that are no longer dense, by name."""
        return {layer.name: layer for layer in self.plan if layer.form is not Form.DENSE}

    def forms(self) -> dict[str, set[str]]:
        """Forms of the kept terms of each compressed layer."""
        return {
            name: {term.form.value for term in layer.terms if term.rank} or {layer.form.value}
            for name, layer in self.compressed.items()
        }


def prepare(folder: Path, case: Case, way: Way, samples: int | None = None) -> tuple[Path, Path]:
    """Write model and data of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    network = make_network(case)
    options = {} if samples is None else {"samples": samples}
    data = save_dataset(folder / "data.npz", network, case, **options)
    return save_network(folder / "model.pt", network, case, way), data


def run_case(folder: Path, model: Path, data: Path, case: Case, spec: Mapping[str, Any] | None = None) -> Compressed:
    """Learn, emit, verify, with few and short steps."""
    asked = quick(**FEW)
    asked = _merge(asked, case.spec if spec is None else spec)
    asked = _merge(asked, {"objective": {"class_dim": case.class_dim}})
    work_dir = folder / "work"
    learned = run_learn(work_dir, model, asked, data)
    emit(model, work_dir)
    kind = data.suffix.removeprefix(".")
    report = verify(Sources(model, data, kind, work_dir), parse_spec(asked), {}, list)
    return Compressed(model, data, work_dir, learned, report)


def check_plan(made: Compressed, case: Case, *, stored_only: bool = False) -> None:
    """Hold the plan against the model, the artifact's counts and the budget.

    `stored_only`: the artifact stores codes beside its parameters, so the number of its parameters is not the plan's.
    """
    reference = load_model(made.model)
    whole = [layer.weight for layer in find_layers(reference)]
    assert {layer.weight for layer in made.plan} >= set(whole), "a layer is missing"
    assert len(made.plan) == len({layer.name for layer in made.plan})
    shown = {layer.name: (layer.kind, layer.form.value, layer.reason) for layer in made.plan}
    kinds = {layer.kind for layer in made.compressed.values()}
    assert case.kinds <= kinds, (sorted(case.kinds - kinds), shown)
    assert made.compressed, shown
    missing = [pattern for pattern in case.compressed if not _any(made.compressed, pattern)]
    assert not missing, (missing, shown)
    artifact = torch.jit.load(str(made.artifact))
    if not stored_only:
        assert count_params(artifact) == sum(layer.compressed_params for layer in made.plan)
    assert made.report.compressed.params == sum(layer.compressed_params for layer in made.plan)
    assert made.report.reference.params == sum(layer.params for layer in made.plan)
    assert count_macs(artifact, _one(made)) == _planned_macs(made, reference)
    reject_unsafe_operators(load_model(made.artifact))  # it may be uploaded again
    budget = made.report.budget
    assert budget is None or budget.reached <= budget.limit
    assert made.artifact.stat().st_size < made.model.stat().st_size


def check_fresh(made: Compressed, case: Case, fresh: FreshTorch, *, cut: bool = False) -> dict[str, Any]:
    """Use the artifact as its owner does; `cut`: a layer is its bias alone, so nothing before it gets a gradient."""
    stored = load_file(made.work_dir / EXPECTED)
    expected = made.work_dir / "told.pt"
    told = {
        f"{kind}s": [stored[f"{kind}.{place}"] for place in range(sum(name.startswith(f"{kind}.") for name in stored))]
        for kind in ("input", "output")
    }
    torch.save(told, expected)
    found = fresh.check(made.artifact, expected, made.model)
    limit = TOLERANCES[case.dtype]
    assert "error" not in found, found["error"]
    assert found["modules"] == [], "the process must know PyTorch alone"
    assert found["difference"] <= limit, found
    assert found["repeated"] <= limit, found
    assert found["frozen"] == [], found
    assert cut or found["without_gradient"] == [], found
    assert found["not_finite"] == [], found
    assert len(found["without_effect"]) <= found["parameters"] // 2, found
    assert found["parameters"] > 0, found
    assert found["moved"] > 0, found
    assert found["codes_changed"] == [], found
    assert found["saved_again"] <= limit / 10, found
    return found


def _one(made: Compressed) -> tuple[torch.Tensor, ...]:
    stored = load_file(made.work_dir / EXPECTED)
    return tuple(stored[f"input.{place}"][:1] for place in range(sum(name.startswith("input.") for name in stored)))


def _planned_macs(made: Compressed, reference: torch.jit.ScriptModule) -> int:
    """Multiply-adds of the layers by the plan, and those of the reference that are no layer's, such as attention."""
    known = sum(layer.macs or 0 for layer in made.plan)
    planned = sum(layer.compressed_macs or 0 for layer in made.plan)
    return planned + count_macs(reference, _one(made)) - known


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping) and key != "budget"
        made[key] = _merge(made[key], value) if both else value
    return made


def labels_of(data: Path) -> dict[str, np.ndarray]:
    """Targets of a dataset."""
    with np.load(data) as arrays:
        return {name: arrays[name] for name in arrays if name.startswith("targets")}
