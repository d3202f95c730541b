"""The objective and the teacher of a job, tried on the reference before anything is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import JobSpec
from worker.engine.data import Dataset
from worker.engine.forward import call_nested, flatten, names_of
from worker.engine.objective import Objective, pair_targets, resolve_loss
from worker.engine.objective_module import ModuleObjective, load_objective
from worker.engine.teacher import Teacher

TRIED_SAMPLES = 8


def make_objective(
    spec: JobSpec,
    module: Path | None,
    dataset: Dataset | None,
    reference: torch.jit.ScriptModule,
    device: torch.device,
) -> tuple[Objective, Teacher | None] | None:
    """Make objective and teacher of a job; None without data.

    Parameters
    ----------
    spec : JobSpec
        What to do.
    module : Path or None
        The TorchScript file of an objective that the user brings.
    dataset : Dataset or None
        What is learned from.
    reference : ScriptModule
        Its outputs are held against the targets, or tried in the module.
    device : torch.device
        Where all of this stands.

    Raises
    ------
    ProblemError
        With the code of what does not fit.
    """
    if dataset is None:
        if spec.objective.module is not None:
            raise ProblemError(ErrorCode.SPEC_INVALID, "objective.loss is a module, and the job has no data; send data")
        return None
    if spec.objective.module is None:
        objective: Objective = _named(spec, dataset, reference, device)
    else:
        objective = _own(spec, module, dataset, reference, device)
    return objective, Teacher(reference, dataset, device) if objective.needs_teacher else None


def _named(spec: JobSpec, dataset: Dataset, reference: torch.jit.ScriptModule, device: torch.device) -> Objective:
    resolved = spec.objective.model_copy(update={"loss": resolve_loss(spec.objective, dataset)})
    raw = _outputs(dataset, reference, device, 2)[0]
    prefix = spec.data.targets if isinstance(spec.data.targets, str) else ""
    objective = Objective(resolved, pair_targets(dataset.target_names, prefix, names_of(raw)))
    objective.check(flatten(raw), dataset)
    return objective


def _own(
    spec: JobSpec, module: Path | None, dataset: Dataset, reference: torch.jit.ScriptModule, device: torch.device
) -> Objective:
    if module is None:
        raise ProblemError(
            ErrorCode.OBJECTIVE_INVALID,
            f"objective.loss names the module {spec.objective.module}, and no file is there",
        )
    objective = ModuleObjective(spec.objective, load_objective(module, device), dataset)
    objective.try_out(*_outputs(dataset, reference, device, TRIED_SAMPLES))
    fewest = min(dataset.size("select"), dataset.size("report"))
    if not objective.separable and fewest < 2:
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"the loss module takes batches alone, and a held-out part has {fewest} sample; give val_* and test_* "
            "arrays with more, or a loss of single samples",
        )
    return objective


def _outputs(
    dataset: Dataset, reference: torch.jit.ScriptModule, device: torch.device, samples: int
) -> tuple[Any, Any]:
    with torch.no_grad():
        batch = dataset.rows("train", np.arange(min(samples, dataset.size("train"))), device)
        return call_nested(reference.eval(), batch.inputs), batch
