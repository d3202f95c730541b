"""Why a spec makes nothing smaller, said before anything is trained."""

from collections.abc import Sequence

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import REASON_MEANINGS, ReasonCode
from service.contract.spec import Metric
from worker.engine.layer_problem import UNITS
from worker.engine.layer_rules import Decisions
from worker.engine.network.layers import Layer
from worker.engine.selection.network import Network

_UNNAMED = {ReasonCode.UNSUPPORTED_KIND, ReasonCode.WEIGHT_NOT_PARAMETER}  # a rule can name what such layers read
_NAMES_MAX = 3


def require_problems(decisions: Decisions, metric: Metric, unnamed: Sequence[Layer] = ()) -> None:
    """Refuse a job none of whose layers can be compressed.

    Parameters
    ----------
    decisions : Decisions
        What the rules say of all layers.
    metric : "macs", "params" or "bytes"
        What size is counted in.
    unnamed : sequence of Layer
        What `unnamed_parameters` gives.

    Raises
    ------
    ProblemError
        ``NO_COMPRESSIBLE_LAYER``, with every reason, and the rules that decide no layer.
    """
    if decisions.problems:
        return
    reasons = sorted(set(decisions.dense.values()))
    said = [f"{reason}: {REASON_MEANINGS[reason]}{_example(decisions, reason)}" for reason in reasons]
    if ReasonCode.NOT_CHEAPER in reasons and metric != "bytes":
        said.append(
            f"Sizes are in {UNITS[metric]} here; codes and single weights save bytes, so they need a budget in bytes."
        )
    said += [f"{warning.message}." for warning in decisions.warnings]
    if unnamed and metric != "macs":
        said.append(f"{_rules_for(unnamed)}.")
    raise ProblemError(
        ErrorCode.NO_COMPRESSIBLE_LAYER,
        f"none of the model's {len(decisions.facts)} layers can be compressed under this spec. "
        f"{' '.join(said) or 'It has no layer with a weight.'}",
    )


def require_reachable(
    network: Network, limit: int | None, total: int, metric: Metric, unnamed: Sequence[Layer] = ()
) -> None:
    """Refuse a budget below the least size that the rules leave.

    Parameters
    ----------
    network : Network
        All layer problems.
    limit : int, optional
        The budget, in units of the metric.
    total : int
        Size of the reference.
    metric : "macs", "params" or "bytes"
        What size is counted in.
    unnamed : sequence of Layer
        What `unnamed_parameters` gives.

    Raises
    ------
    ProblemError
        ``CONSTRAINT_UNREACHABLE``, with the least size and what to change.
    """
    least = network.least_size
    if limit is None or least <= limit:
        return
    raise ProblemError(
        ErrorCode.CONSTRAINT_UNREACHABLE,
        f"the budget is {limit} {UNITS[metric]}, but with every layer at its lowest rank the network has {least} "
        f"({least / total:.4f} of the reference's {total}): {_why_no_less(network, total, metric)}"
        f"{f'. {_rules_for(unnamed)}' if unnamed and metric != 'macs' else ''}",
    )


def unnamed_parameters(decisions: Decisions, parameters: Sequence[Layer]) -> list[Layer]:
    """Parameters that stay dense only because no rule names them, such as those that a weight is computed from.

    Parameters
    ----------
    decisions : Decisions
        What the rules say of all layers.
    parameters : sequence of Layer
        Every parameter as a layer of kind "parameter".

    Returns
    -------
    list of Layer
        The largest first.
    """
    found = [
        each
        for each in parameters
        if each.reason is None
        and decisions.dense.get(each.owner or "") in _UNNAMED
        and each.name not in decisions.layers
        and sum(size > 1 for size in each.weight_shape) > 1
    ]
    return sorted(found, key=lambda each: -each.params)


def _why_no_less(network: Network, total: int, metric: Metric) -> str:
    if metric == "bytes" and any(problem.least_size >= problem.dense_size for problem in network.problems):
        return (
            "of some layers the code and places in the file would take more than is saved, so they stay dense. "
            "Raise the budget, let other terms be used, or compress a larger model"
        )
    if network.least_size < total:
        return "the rest is in what stays dense. Raise the budget, or let more layers or other terms be compressed"
    return "what the rules fix saves nothing. Lower ranks and sizes, or leave them out, so that the budget chooses them"


def _rules_for(unnamed: Sequence[Layer]) -> str:
    shown = [f"parameter:{each.name} ({'×'.join(map(str, each.weight_shape))})" for each in unnamed[:_NAMES_MAX]]
    more = f" and {len(unnamed) - _NAMES_MAX} more" if len(unnamed) > _NAMES_MAX else ""
    return f"Rules can match parameters that no layer compresses by itself: {', '.join(shown)}{more}"


def _example(decisions: Decisions, reason: ReasonCode) -> str:
    """The first layer that a reason holds for, where its kind and shape are the reason."""
    if reason is not ReasonCode.NO_TERM_APPLICABLE:
        return ""
    layer = decisions.layers[next(name for name, why in decisions.dense.items() if why is reason)]
    terms = ", ".join(f"{drop.index} ({drop.type})" for drop in decisions.dropped[layer.name])
    shape = "×".join(map(str, layer.weight_shape))
    return (
        f" For example {layer.name} is of kind {layer.kind} and has a weight of {shape}; its rule's terms are {terms}."
    )
