"""What a spec means once its own rules are applied: every `auto` that needs neither model nor data."""

from functools import reduce
from operator import getitem
from typing import Any

from service.contract.spec import JobSpec


def resolve_at_submit(spec: JobSpec) -> dict[str, Any]:
    """Return the spec as JSON with all defaults, and with the growth of μ, the epochs of fine-tuning and C resolved.

    The result is itself a valid spec, and resolving it again changes nothing.
    """
    resolved = spec.on_the_wire()
    for path, value in spec.method.resolutions().items():
        *parents, last = path.split(".")
        reduce(getitem, parents, resolved["method"])[last] = value
    epochs = spec.method.epochs_of_steps(spec.training.epochs_per_step)
    resolved["fine_tune"]["epochs"] = spec.fine_tune.resolved_epochs(epochs)
    if spec.cost == "auto":
        resolved["cost"] = spec.cost_metric
    return resolved
