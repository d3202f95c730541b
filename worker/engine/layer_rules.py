"""What the spec's rules make of each layer: the terms it may become, or the reason that it stays dense."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from service.contract.layer_rule import LayerRule
from service.contract.plan import Form, LayerFacts, ReasonCode
from service.contract.report import ReportWarning
from service.contract.spec import CostWeights, JobSpec, Metric
from service.contract.terms import LowRankTermSpec
from worker.engine.csteps.additive import TermChoice
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.reshape import reshape_of
from worker.engine.network.layers import Layer

UNITS: dict[Metric, str] = {"macs": "multiply-adds", "params": "parameters"}  # of a size, in words


@dataclass(frozen=True)
class DroppedTerm:
    """A term of the rule that is not part of the layer's sum."""

    index: int
    form: Form
    reason: ReasonCode


@dataclass(frozen=True)
class LayerProblem:
    """A layer that can be compressed.

    Parameters
    ----------
    layer : Layer
        As it was found.
    choices : tuple of TermChoice
        Terms of its sum, priced in C (per million units, the rule's factor applied).
    term_indices : tuple of int
        Position of each choice among the rule's terms.
    rank_total_low : int
        Least sum of the ranks.
    dense_price : float
        C of the dense layer.
    metric : "macs" or "params"
        What size is counted in: the budget's metric, else that of the cost.
    dropped : tuple of DroppedTerm
        Terms that do not take part.
    """

    layer: Layer
    choices: tuple[TermChoice, ...]
    term_indices: tuple[int, ...]
    rank_total_low: int
    dense_price: float
    metric: Metric
    dropped: tuple[DroppedTerm, ...] = ()

    @property
    def dense_size(self) -> int:
        """Size of the dense layer without its bias."""
        geometry = self.choices[0].term.geometry
        return geometry.dense_macs if self.metric == "macs" else geometry.weight_params

    def size(self, ranks: Sequence[int]) -> int:
        """Size of the sum at given ranks, without the bias."""
        return sum(term_size(choice.term, rank, self.metric) for choice, rank in zip(self.choices, ranks, strict=True))

    @property
    def fixed(self) -> bool:
        """Whether every rank is given."""
        return all(choice.rank_low == choice.rank_high for choice in self.choices)

    @property
    def least_ranks(self) -> list[int]:
        """Ranks of least size that the rule allows."""
        ranks = [choice.rank_low for choice in self.choices]
        missing = self.rank_total_low - sum(ranks)
        per_rank = [(term_size(c.term, 1, self.metric), place) for place, c in enumerate(self.choices)]
        for _, place in sorted(per_rank):
            room = max(min(missing, self.choices[place].rank_high - ranks[place]), 0)
            ranks[place] += room
            missing -= room
        return ranks

    @property
    def least_size(self) -> int:
        """Size at the lowest ranks that the rule allows, or of the dense layer if that is less."""
        return min(self.size(self.least_ranks), self.dense_size)


@dataclass
class Decisions:
    """What the rules say of all layers."""

    facts: list[LayerFacts]
    problems: list[LayerProblem]
    dense: dict[str, ReasonCode]
    dropped: dict[str, tuple[DroppedTerm, ...]]
    warnings: list[ReportWarning] = field(default_factory=list)


def apply_rules(layers: Sequence[Layer], spec: JobSpec) -> Decisions:
    """Match every layer with the first rule that holds, and build its terms."""
    decisions = Decisions([], [], {}, {})
    used: set[int] = set()
    metric = size_metric(spec)
    for position, layer in enumerate(layers):
        decisions.facts.append(_facts(position, layer))
        index = next((i for i, rule in enumerate(spec.layers) if _matches(rule, layer)), None)
        if index is not None:
            used.add(index)
        if layer.reason is not None or layer.macs is None:
            decisions.dense[layer.name] = layer.reason or ReasonCode.COST_UNKNOWN
        elif index is None:
            decisions.dense[layer.name] = ReasonCode.NO_RULE
        else:
            _apply(layer, spec.layers[index], spec.cost_weights(), metric, decisions)
    for index, rule in enumerate(spec.layers):
        if index not in used:
            decisions.warnings.append(_unmatched(index, rule, layers))
    return decisions


def size_metric(spec: JobSpec) -> Metric:
    """What size is counted in: the budget's metric, else the heavier weight of the cost."""
    if spec.budget is not None:
        return spec.budget.metric
    weights = spec.cost_weights()
    return "macs" if weights.macs > weights.params else "params"


def term_size(term: LowRankTerm, rank: int, metric: Metric) -> int:
    """Size of one term at a rank."""
    return term.macs(rank) if metric == "macs" else term.params(rank)


def geometry_of(layer: Layer) -> Geometry:
    """Geometry of a compressible layer."""
    calls = tuple(Call(tuple(given), tuple(made)) for given, made in layer.call_shapes)
    if layer.kind == "linear":
        return Geometry("linear", tuple(layer.weight_shape), calls)
    stride, padding, dilation = ((pair[0], pair[1]) for pair in (layer.stride, layer.padding, layer.dilation))
    return Geometry("conv2d", tuple(layer.weight_shape), calls, stride, padding, dilation)


def terms_of(rule: LayerRule, layer: Layer) -> list[LowRankTermSpec]:
    """Terms of a rule for one layer; `auto` is `channel` + `spatial` for k×k convolutions, else `matrix`."""
    if rule.terms != "auto":
        return list(rule.terms)
    if layer.kind == "conv2d" and tuple(layer.weight_shape[2:]) != (1, 1):
        return [LowRankTermSpec(reshape="channel"), LowRankTermSpec(reshape="spatial")]
    return [LowRankTermSpec(reshape="matrix")]


def _apply(layer: Layer, rule: LayerRule, weights: CostWeights, metric: Metric, decisions: Decisions) -> None:
    if rule.keep == "dense":
        decisions.dense[layer.name] = ReasonCode.KEPT_BY_RULE
        return
    geometry = geometry_of(layer)
    chosen: list[tuple[int, TermChoice]] = []
    dropped: list[DroppedTerm] = []
    for index, term_spec in enumerate(terms_of(rule, layer)):
        made = _choice(term_spec, rule, geometry, weights, metric, [choice for _, choice in chosen])
        if isinstance(made, TermChoice):
            chosen.append((index, made))
        else:
            dropped.append(DroppedTerm(index, made[0], made[1]))
    decisions.dropped[layer.name] = tuple(dropped)
    if chosen and all(choice.rank_high == 0 for _, choice in chosen):
        decisions.dense[layer.name] = ReasonCode.KEPT_BY_RULE  # max_rank 0 throughout: no term may take part
        return
    if not chosen:
        reasons = {drop.reason for drop in dropped}
        above = ReasonCode.RANK_ABOVE_BREAK_EVEN
        only_not_cheaper = reasons <= {ReasonCode.NOT_CHEAPER, above}
        decisions.dense[layer.name] = (
            (above if above in reasons else ReasonCode.NOT_CHEAPER)
            if only_not_cheaper
            else ReasonCode.NO_TERM_APPLICABLE
        )
        return
    fixed = all(choice.rank_low == choice.rank_high for _, choice in chosen)
    least = sum(choice.rank_low for _, choice in chosen) if fixed else (1 if rule.min_rank is None else rule.min_rank)
    problem = LayerProblem(
        layer,
        tuple(choice for _, choice in chosen),
        tuple(index for index, _ in chosen),
        least,
        _price(geometry.dense_macs, geometry.weight_params, weights, rule),
        metric,
        tuple(dropped),
    )
    if fixed and problem.size([choice.rank_low for choice in problem.choices]) >= problem.dense_size:
        decisions.dense[layer.name] = ReasonCode.RANK_ABOVE_BREAK_EVEN
        return
    decisions.problems.append(problem)


def _choice(
    spec: LowRankTermSpec,
    rule: LayerRule,
    geometry: Geometry,
    weights: CostWeights,
    metric: Metric,
    before: Sequence[TermChoice],
) -> TermChoice | tuple[Form, ReasonCode]:
    """Make the term with its price and rank bounds, or say why it takes no part."""
    reshape = reshape_of(spec, geometry.weight_shape)
    if reshape is None:
        return _named_form(spec), ReasonCode.TERM_NOT_APPLICABLE
    term = LowRankTerm(reshape, geometry)
    if any(other.term.key == term.key for other in before):
        return term.form, ReasonCode.TERMS_NOT_DISTINCT
    price = _price(term.macs_per_rank, term.params_per_rank, weights, rule)
    dense = geometry.dense_macs if metric == "macs" else geometry.weight_params
    offset = geometry.dense_macs if metric == "macs" and term.composed else 0
    per_rank = term.macs_per_rank if metric == "macs" else term.params_per_rank
    highest = min((dense - offset - 1) // per_rank, term.rank_max)  # the last rank below break-even
    rank = spec.rank if spec.rank is not None else rule.rank
    if rank is not None:
        if rank > highest:
            return term.form, ReasonCode.RANK_ABOVE_BREAK_EVEN
        return TermChoice(term, price, rank, rank)
    asked = spec.max_rank if spec.max_rank is not None else rule.max_rank
    high = highest if asked is None else min(highest, asked)
    if highest < 1:
        return term.form, ReasonCode.NOT_CHEAPER
    low = min(spec.min_rank or 0, high)
    return TermChoice(term, price, low, high, term.rank_max if asked is None else min(term.rank_max, asked))


def _price(macs: int, params: int, weights: CostWeights, rule: LayerRule) -> float:
    """C in millions of its units, with the rule's factor."""
    return rule.cost_factor * (weights.macs * macs + weights.params * params) / 1e6


def _matches(rule: LayerRule, layer: Layer) -> bool:
    return fnmatchcase(layer.name, rule.match) and (rule.kind is None or rule.kind == layer.kind)


def _unmatched(index: int, rule: LayerRule, layers: Sequence[Layer]) -> ReportWarning:
    names = ", ".join(layer.name for layer in layers[:5])
    kind = f" of kind {rule.kind}" if rule.kind else ""
    return ReportWarning(
        code="RULE_MATCHED_NOTHING",
        message=f"rule {index} ('{rule.match}'{kind}) decides no layer; the model's layers are {names}"
        + (", …" if len(layers) > 5 else ""),
    )


def _named_form(spec: LowRankTermSpec) -> Form:
    return Form(spec.reshape) if isinstance(spec.reshape, str) else Form.COMPOSED


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
