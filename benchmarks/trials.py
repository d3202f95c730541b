"""Compressions whose error is compared: each is run once for each seed, and its outcome kept in a file.

A trial goes through the engine as a job does (`learn`, on the same spec), and its final network is scored on the test
images beside the reference. What is kept makes a benchmark resumable: a trial with the same settings is not repeated.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.outcome import machine_facts, say
from benchmarks.plain_svd import learn_plain_svd
from service.contract.plan import RankRow
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.evaluation import paired_difference
from worker.engine.forward import call
from worker.engine.learn import FINAL_PLAN, Sources, learn
from worker.engine.network.costs import count_macs, count_params
from worker.engine.network.load import load_model
from worker.engine.observer import Recorder

CPU = torch.device("cpu")
SCORED_BATCH = 1000


@dataclass(frozen=True)
class Subject:
    """A reference network and a dataset, as files."""

    name: str
    model: Path
    data: Path

    @cached_property
    def wrong(self) -> np.ndarray:
        """Which test samples the reference gets wrong."""
        return wrong_on_test(load_model(self.model, CPU), self)


@dataclass(frozen=True)
class Trial:
    """One compression of a subject.

    Parameters
    ----------
    name : str
        Of the row in the table.
    spec : dict
        The job's spec, without its seed.
    ranks : str, optional
        For plain SVD: name of the row whose ranks it takes; its own by energy per cost where that is empty.
    """

    name: str
    spec: dict[str, Any]
    ranks: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is plain SVD with training, without the loop."""
        return self.ranks is not None


class Kept:
    """Outcomes in a JSON file, by the settings that they hang on."""

    def __init__(self, folder: Path, name: str, *, quick: bool) -> None:
        self.path = folder / f"{name}.trials{'.local' if quick else ''}.json"
        self._trials = self._read()

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the outcome under these settings, if there is one."""
        return next((each["outcome"] for each in self._trials if each["key"] == key), None)

    def add(self, key: dict[str, Any], outcome: dict[str, Any]) -> None:
        """Add an outcome to the file, and take over what a run beside this one has added."""
        self._trials = self._read()
        self._trials.append({"key": key, "outcome": outcome, "machine": machine_facts()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}")
        lines = ",\n".join(json.dumps(each) for each in self._trials)  # a line each: they name every wrong sample
        partial.write_text(f'{{"trials": [\n{lines}\n]}}\n', encoding="utf-8")
        partial.replace(self.path)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        trials: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))["trials"]
        return trials


@dataclass
class Bench:
    """Runs trials of one subject, or finds them in what was kept."""

    subject: Subject
    kept: Kept
    version: str  # of the method; outcomes of another version are not taken over

    def outcomes(self, trial: Trial, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Outcome for each seed."""
        return [self._outcome(trial, seed) for seed in seeds]

    def _outcome(self, trial: Trial, seed: int) -> dict[str, Any]:
        key = {
            "subject": self.subject.name,
            "trial": trial.name,
            "spec": trial.spec,
            "ranks": trial.ranks,
            "seed": seed,
            "version": self.version,
        }
        found = self.kept.find(key)
        if found is not None:
            return found
        began = time.perf_counter()
        ranks = self._ranks_of(trial, seed)
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_trial(self.subject, trial, seed, Path(folder), ranks)
        outcome["seconds"] = round(time.perf_counter() - began, 1)
        self.kept.add(key, outcome)
        say(
            f"{self.subject.name}, {trial.name}, seed {seed}: test error {outcome['test_error_percent']:.2f} % at "
            f"{outcome['params_fraction']:.4f} of the parameters, {outcome['seconds']} s, ranks {outcome['ranks']}"
        )
        return outcome

    def _ranks_of(self, trial: Trial, seed: int) -> dict[str, list[int]] | None:
        if not trial.ranks:
            return None
        key = {"subject": self.subject.name, "trial": trial.ranks, "spec": trial.spec, "ranks": None}
        found = self.kept.find({**key, "seed": seed, "version": self.version})
        if found is not None:
            ranks: dict[str, list[int]] = found["ranks"]
            return ranks
        raise SystemExit(f"{trial.name} takes its ranks from {trial.ranks}, which has not run with seed {seed}")


def run_trial(
    subject: Subject, trial: Trial, seed: int, folder: Path, ranks: dict[str, list[int]] | None
) -> dict[str, Any]:
    """Compress by the engine, write the artifact, and score that on the test samples beside the reference."""
    spec = parse_spec({"device": "cpu", **trial.spec, "seed": seed})
    sources, recorder = Sources(subject.model, subject.data, "npz", folder), Recorder()
    notes = learn_plain_svd(sources, spec, recorder, ranks) if trial.plain else learn(sources, spec, recorder)
    made = emit(subject.model, folder)
    plan = json.loads((folder / FINAL_PLAN).read_text(encoding="utf-8"))
    rows = [RankRow.model_validate(row) for row in plan["rows"]]
    compressed, reference = load_model(Path(made["path"]), CPU), load_model(subject.model, CPU)
    wrong = wrong_on_test(compressed, subject)
    difference = paired_difference("error", wrong.astype(np.float64), subject.wrong.astype(np.float64))
    example = [torch.from_numpy(_test(subject)[0][:1])]
    return {
        "test_error_percent": 100 * float(wrong.mean()),
        "reference_error_percent": 100 * float(subject.wrong.mean()),
        "difference_percent": [100 * each for each in (difference.difference, difference.low, difference.high)],
        "wrong": np.flatnonzero(wrong).tolist(),
        "ranks": ranks_of(rows),
        "notes": notes,
        "learning_rate": recorder.specs[-1]["training"]["optimizer"]["lr"],
        "params_fraction": count_params(compressed) / count_params(reference),
        "macs_fraction": count_macs(compressed, example) / count_macs(reference, example),
        "file_bytes_fraction": made["bytes"] / subject.model.stat().st_size,
        "stored_bits_fraction": stored_bits(rows, count_params(reference)),
    }


def wrong_on_test(module: torch.jit.ScriptModule, subject: Subject) -> np.ndarray:
    """Which test samples a network gets wrong; boolean, in the file's order."""
    inputs, targets = _test(subject)
    module.eval()
    found = []
    with torch.no_grad():
        for at in range(0, len(inputs), SCORED_BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(inputs[at : at + SCORED_BATCH]))
            found.append(call(module, (batch,))[0].argmax(dim=1).numpy() != targets[at : at + SCORED_BATCH])
    return np.concatenate(found)


def _test(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    with np.load(subject.data) as file:
        return file["test_inputs"], file["test_targets"]


def ranks_of(rows: Sequence[RankRow]) -> dict[str, list[int]]:
    """Units of each term of each compressed layer."""
    found: dict[str, dict[int, int]] = {}
    for row in rows:
        if row.chosen and row.rank is not None:
            found.setdefault(row.layer, {})[row.term] = row.rank
    return {layer: [units for _, units in sorted(terms.items())] for layer, terms in found.items()}


def stored_bits(rows: Sequence[RankRow], reference_params: int) -> float:
    """Bits that the weights of all layers are stored in, over 32 for each of the reference's parameters."""
    return sum(row.bits for row in rows if row.chosen) / (32 * reference_params)


def median_of(outcomes: Sequence[dict[str, Any]], name: str = "test_error_percent") -> float:
    """Median over the seeds."""
    return median(float(each[name]) for each in outcomes)
