"""What the spec's rules make of each layer: the terms it may become, or the reason that it stays dense."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod

from service.contract.layer_rule import PARAMETER_PREFIX, LayerRule
from service.contract.plan import Form, LayerFacts, ReasonCode
from service.contract.report import ReportWarning
from service.contract.spec import CostWeights, JobSpec, Metric
from service.contract.term_specs import TermSpec
from service.contract.terms import GeneralReshape, LowRankTermSpec
from worker.engine.csteps.additive import TermChoice
from worker.engine.forms.geometry import CONVOLUTIONS, TRANSPOSED, Call, Geometry
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Counts, NotApplicableError, Price, Term
from worker.engine.layer_problem import DroppedTerm, LayerProblem, dense_size, sum_size
from worker.engine.network.layers import Layer


@dataclass
class Decisions:
    """What the rules say of all layers."""

    facts: list[LayerFacts]
    problems: list[LayerProblem]
    dense: dict[str, ReasonCode]
    dropped: dict[str, tuple[DroppedTerm, ...]]
    layers: dict[str, Layer]
    warnings: list[ReportWarning] = field(default_factory=list)


@dataclass(frozen=True)
class Pricing:
    """How a layer is priced and counted: the weights of C, the rule's factor, and the metric of size."""

    weights: CostWeights
    factor: float
    metric: Metric

    @property
    def price(self) -> Price:
        """C in millions of its units."""
        scale = self.factor / 1e6
        return Price(scale * self.weights.macs, scale * self.weights.params, scale * self.weights.bytes)


def apply_rules(layers: Sequence[Layer], spec: JobSpec) -> Decisions:
    """Match every layer with the first rule that holds, and build its terms."""
    decisions = Decisions([], [], {}, {}, {layer.name: layer for layer in layers})
    used: set[int] = set()
    for position, layer in enumerate(layers):
        decisions.facts.append(_facts(position, layer))
        index = rule_for(layer, spec.layers)
        if index is not None:
            used.add(index)
        if layer.reason is not None or layer.macs is None:
            decisions.dense[layer.name] = layer.reason or ReasonCode.COST_UNKNOWN
        elif index is None:
            decisions.dense[layer.name] = ReasonCode.NO_RULE
        else:
            _apply(layer, index, spec, decisions)
    for index, rule in enumerate(spec.layers):
        if index not in used:
            decisions.warnings.append(_unmatched(index, rule, layers))
    return decisions


def rule_for(layer: Layer, rules: Sequence[LayerRule]) -> int | None:
    """Position of the first rule that matches a layer."""
    return next((index for index, rule in enumerate(rules) if _matches(rule, layer)), None)


def name_parameters(layers: Sequence[Layer], parameters: Sequence[Layer], spec: JobSpec) -> list[Layer]:
    """Layers as the rules see them: a parameter that a rule names is a layer of its own, whatever operator uses it.

    Parameters
    ----------
    layers : sequence of Layer
        As they were found.
    parameters : sequence of Layer
        Every parameter as a layer of kind "parameter".
    spec : JobSpec
        Whose rules may begin with "parameter:".
    """
    patterns = [rule.match.removeprefix(PARAMETER_PREFIX) for rule in spec.layers if _names_parameters(rule)]
    named = [
        each
        for each in parameters
        if any(fnmatchcase(name, pattern) for name in each.names or (each.name,) for pattern in patterns)
    ]
    weights = {each.weight: each for each in named}
    made: list[Layer] = []
    for layer in layers:
        own = weights.pop(layer.weight, None)
        taken = sum(each.params for each in named if each.owner == layer.name and each.weight != layer.weight)
        kept = replace(layer, params=layer.params - taken)
        made.append(kept if own is None else replace(own, params=kept.params))  # the operator's bias stays with it
    return made + list(weights.values())


def size_metric(spec: JobSpec) -> Metric:
    """What size is counted in: the budget's metric, else the heaviest weight of the cost."""
    if spec.budget is not None:
        return spec.budget.metric
    weights = spec.cost_weights()
    metrics: tuple[Metric, ...] = ("params", "macs", "bytes")
    return max(metrics, key=lambda metric: float(getattr(weights, metric)))


def geometry_of(layer: Layer) -> Geometry:
    """Geometry of a compressible layer."""
    calls = tuple(Call(tuple(given), tuple(made)) for given, made in layer.call_shapes)
    axes = max(len(layer.weight_shape) - 2, 0) if layer.kind in (*CONVOLUTIONS, *TRANSPOSED) else 0
    return Geometry(
        layer.kind,
        tuple(layer.weight_shape),
        calls,
        layer.stride or (1,) * axes,
        layer.padding or (0,) * axes,
        layer.dilation or (1,) * axes,
        layer.output_padding or (0,) * axes,
        layer.groups,
        layer.macs if layer.kind == "parameter" else None,
        layer.dtype_bits,
    )


def terms_of(rule: LayerRule, layer: Layer) -> list[TermSpec]:
    """Terms of a rule for one layer; `auto` is the `best` reshape for k×k convolutions, else one matrix.

    A parameter of three or more axes, such as the stacked weights of experts or of attention's heads, is read as the
    matrix nearest to a square that its axes give in their order.

    The sum of `channel` and `spatial` was the default until it was measured: at equal multiply-adds it has a lower
    weight error than the better of the two in a third of the layers of three ResNets (docs/benchmarks.md).
    """
    if rule.terms != "auto":
        return list(rule.terms)
    if layer.kind == "parameter" and len(layer.weight_shape) > 2:
        return [LowRankTermSpec(reshape=_nearest_to_square(layer.weight_shape))]
    kernel = layer.weight_shape[2:] if layer.kind in (*CONVOLUTIONS, *TRANSPOSED) else ()
    wide = [size for size in kernel if size > 1]
    if len(wide) > 1:
        return [LowRankTermSpec(reshape="best")]
    return [LowRankTermSpec(reshape="channel" if wide else "matrix")]


def _nearest_to_square(shape: Sequence[int]) -> GeneralReshape:
    cuts = [(prod(shape[:at]), prod(shape[at:])) for at in range(1, len(shape))]
    return GeneralReshape(view=list(shape), permute=list(range(len(shape))), matrix=min(cuts, key=sum))


def _apply(layer: Layer, rule_index: int, spec: JobSpec, decisions: Decisions) -> None:
    rule = spec.layers[rule_index]
    if rule.keep == "dense":
        decisions.dense[layer.name] = ReasonCode.KEPT_BY_RULE
        return
    if 0 in layer.weight_shape:  # there is nothing to make less of
        decisions.dense[layer.name] = ReasonCode.NOT_CHEAPER
        return
    geometry = geometry_of(layer)
    pricing = Pricing(spec.cost_weights(), rule.cost_factor, size_metric(spec))
    chosen: list[tuple[int, TermChoice]] = []
    dropped: list[DroppedTerm] = []
    for index, term_spec in enumerate(terms_of(rule, layer)):
        group = f"{rule_index}.{index}" if getattr(term_spec, "joint", False) else None
        made = _choice(term_spec, rule, geometry, pricing, [choice for _, choice in chosen], group)
        if isinstance(made, TermChoice):
            chosen.append((index, made))
        else:
            dropped.append(DroppedTerm(index, term_spec.type, made[0], made[1]))
    decisions.dropped[layer.name] = tuple(dropped)
    if chosen and all(choice.rank_high == 0 for _, choice in chosen):
        decisions.dense[layer.name] = ReasonCode.KEPT_BY_RULE  # max_rank 0 throughout: no term may take part
        return
    if not chosen:
        decisions.dense[layer.name] = _why_dense({drop.reason for drop in dropped})
        return
    problem = _problem(layer, geometry, rule, pricing, chosen, dropped)
    if problem.fixed and problem.least_size >= problem.dense_size:
        decisions.dense[layer.name] = ReasonCode.RANK_ABOVE_BREAK_EVEN
        return
    decisions.problems.append(problem)


def _problem(
    layer: Layer,
    geometry: Geometry,
    rule: LayerRule,
    pricing: Pricing,
    chosen: Sequence[tuple[int, TermChoice]],
    dropped: Sequence[DroppedTerm],
) -> LayerProblem:
    fixed = all(choice.fixed for _, choice in chosen)
    least = sum(choice.rank_low for _, choice in chosen) if fixed else (1 if rule.min_rank is None else rule.min_rank)
    weight = geometry.weight_params
    return LayerProblem(
        layer,
        geometry,
        tuple(choice for _, choice in chosen),
        tuple(index for index, _ in chosen),
        least,
        pricing.price(Counts(weight, geometry.dense_macs, weight * geometry.dtype_bits)),
        pricing.metric,
        tuple(dropped),
    )


def _why_dense(reasons: set[ReasonCode]) -> ReasonCode:
    above = ReasonCode.RANK_ABOVE_BREAK_EVEN
    if reasons <= {ReasonCode.NOT_CHEAPER, above}:
        return above if above in reasons else ReasonCode.NOT_CHEAPER
    return ReasonCode.NO_TERM_APPLICABLE


def _choice(
    spec: TermSpec,
    rule: LayerRule,
    geometry: Geometry,
    pricing: Pricing,
    before: Sequence[TermChoice],
    group: str | None,
) -> TermChoice | tuple[Form, ReasonCode]:
    """Make the term with its price and the bounds of its units, or say why it takes no part."""
    try:
        term = term_class(spec.type).from_spec(spec, geometry)
    except NotApplicableError as refusal:
        return refusal.form, refusal.reason
    if any(other.term.key == term.key for other in before):
        return term.form, ReasonCode.TERMS_NOT_DISTINCT
    if group is not None:  # what its layers share is decided by them together; only a number of values is known
        low = term.units_max if term.units_asked(spec) == (term.units_max, term.units_max) else 0
        if low > highest_units(term, pricing.metric):
            return term.form, ReasonCode.NOT_CHEAPER
        return TermChoice(term, pricing.price, low, term.units_max, joint_group=group, given=True)
    return _bounded(term, spec, rule, pricing)


def _bounded(term: Term, spec: TermSpec, rule: LayerRule, pricing: Pricing) -> TermChoice | tuple[Form, ReasonCode]:
    """Bound the units by the spec, and by what costs less than the dense layer."""
    asked = term.units_asked(spec)
    if isinstance(spec, LowRankTermSpec) and spec.rank is None:
        if rule.rank is not None:
            asked = (rule.rank, rule.rank)
        elif rule.max_rank is not None and asked is None:
            asked = (0, rule.max_rank)
    highest = highest_units(term, pricing.metric)
    low, high = asked if asked is not None else (0, term.units_max)
    if low == high > 0:
        if low > highest:
            return term.form, ReasonCode.RANK_ABOVE_BREAK_EVEN if term.graded else ReasonCode.NOT_CHEAPER
        return TermChoice(term, pricing.price, low, high, given=True)
    if highest < 1:
        return term.form, ReasonCode.NOT_CHEAPER
    bounded = min(high, highest)
    given = spec.fixes_its_size
    return TermChoice(term, pricing.price, min(low, bounded), bounded, min(term.units_max, high), given=given)


def highest_units(term: Term, metric: Metric) -> int:
    """Most units at which a term alone is smaller than the dense layer; 0 if there are none."""
    dense = dense_size(term.geometry, metric)

    def size(units: int) -> int:
        counts = term.counts_at(units) if term.graded else term.least_counts(units)
        return sum_size(term.geometry, metric, [term.composed], [counts])

    low, high = 0, term.units_max
    while low < high:  # sizes grow with the units
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) < dense else (low, middle - 1)
    return low


def _names_parameters(rule: LayerRule) -> bool:
    return rule.match.startswith(PARAMETER_PREFIX)


def _matches(rule: LayerRule, layer: Layer) -> bool:
    if _names_parameters(rule):
        pattern = rule.match.removeprefix(PARAMETER_PREFIX)
        return layer.kind == "parameter" and any(fnmatchcase(name, pattern) for name in layer.names or (layer.name,))
    return fnmatchcase(layer.name, rule.match) and (rule.kind is None or rule.kind == layer.kind)


def _unmatched(index: int, rule: LayerRule, layers: Sequence[Layer]) -> ReportWarning:
    if _names_parameters(rule):
        return ReportWarning(
            code="RULE_MATCHED_NOTHING",
            message=f"rule {index} ('{rule.match}') decides no parameter: it names those of the network, as "
            "state_dict() does, that hold floating point numbers and have two or more axes",
        )
    names = ", ".join(layer.name for layer in layers[:5])
    kind = f" of kind {rule.kind}" if rule.kind else ""
    return ReportWarning(
        code="RULE_MATCHED_NOTHING",
        message=f"rule {index} ('{rule.match}'{kind}) decides no layer; the model's layers are {names}"
        + (", …" if len(layers) > 5 else ""),
    )


def _facts(position: int, layer: Layer) -> LayerFacts:
    return LayerFacts(
        position=position,
        name=layer.name,
        kind=layer.kind,
        weight=layer.weight,
        weight_shape=list(layer.weight_shape),
        input_shape=list(layer.input_shape) if layer.input_shape is not None else None,
        output_shape=list(layer.output_shape) if layer.output_shape is not None else None,
        calls=layer.calls,
        params=layer.params,
        macs=layer.macs,
    )
