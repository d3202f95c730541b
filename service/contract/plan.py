"""The layer plan: for each layer of the model what it became, or why it was left dense."""

from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from service.contract.term_words import size_in_words


class Form(StrEnum):
    """What a layer becomes."""

    DENSE = "dense"
    CHANNEL = "channel"
    SPATIAL = "spatial"
    SPATIAL_TRANSPOSED = "spatial_transposed"
    MATRIX = "matrix"
    CHUNKED = "chunked"
    CONTRACTED = "contracted"  # any other split along the weight's own axes, as two factored operators
    KRONECKER = "kronecker"
    TUCKER2 = "tucker2"
    EMBEDDING = "embedding"  # a table of short rows and a matrix
    PRUNED = "pruned"
    QUANTIZED = "quantized"
    BIAS_ALONE = "bias_alone"  # every term has rank 0
    SUM = "sum"
    COMPOSED = "composed"  # the weight is rebuilt from its factors: fewer parameters, the dense multiply-adds


DENSE_TYPE = "dense"  # of the row of a dense layer, where a term's row has the term's type

# The dense operator uses the composed weight, so its multiply-adds stay; `macs_stay` in the details overrules it.
_COMPOSED_FORMS = frozenset({Form.COMPOSED, Form.QUANTIZED, Form.PRUNED})


class ReasonCode(StrEnum):
    """Why a layer or a term is what it is; the list is closed and documented in docs/reasons.md."""

    # The layer stays dense because of what it is.
    UNSUPPORTED_KIND = "UNSUPPORTED_KIND"
    SHARED_WEIGHT = "SHARED_WEIGHT"
    WEIGHT_NOT_PARAMETER = "WEIGHT_NOT_PARAMETER"
    NOT_FLOATING = "NOT_FLOATING"
    NOT_EXECUTED = "NOT_EXECUTED"
    COST_UNKNOWN = "COST_UNKNOWN"
    UNUSED = "UNUSED"
    # The layer stays dense because of the spec or the budget.
    KEPT_BY_RULE = "KEPT_BY_RULE"
    NO_RULE = "NO_RULE"
    NO_TERM_APPLICABLE = "NO_TERM_APPLICABLE"
    NOT_CHEAPER = "NOT_CHEAPER"
    DENSE_PREFERRED = "DENSE_PREFERRED"
    # A term of a compressed layer.
    TERM_NOT_APPLICABLE = "TERM_NOT_APPLICABLE"
    TERMS_NOT_DISTINCT = "TERMS_NOT_DISTINCT"
    RANK_ABOVE_BREAK_EVEN = "RANK_ABOVE_BREAK_EVEN"
    RANK_ZERO = "RANK_ZERO"
    RANK_FIXED = "RANK_FIXED"
    RANK_SELECTED = "RANK_SELECTED"


REASON_MEANINGS: dict[ReasonCode, str] = {
    ReasonCode.UNSUPPORTED_KIND: "The operator is none whose weight is compressed; a rule can name its matrices.",
    ReasonCode.SHARED_WEIGHT: "What else uses the weight cannot be seen (a fork, an interface, overlapping memory).",
    ReasonCode.WEIGHT_NOT_PARAMETER: "The weight is computed or a constant, not a parameter of the model.",
    ReasonCode.NOT_FLOATING: "The weight does not hold floating point numbers.",
    ReasonCode.NOT_EXECUTED: "The layer did not run for the example inputs, so its cost is unknown.",
    ReasonCode.COST_UNKNOWN: "The layer ran, but its multiply-adds could not be counted.",
    ReasonCode.UNUSED: "No method of the model reads the parameters; the compressed file is without them.",
    ReasonCode.KEPT_BY_RULE: "A rule of the spec keeps the layer dense.",
    ReasonCode.NO_RULE: "No rule of the spec matches the layer.",
    ReasonCode.NO_TERM_APPLICABLE: "None of the rule's terms applies to this kind of layer.",
    ReasonCode.NOT_CHEAPER: "No rank of the layer's terms costs less than the dense layer.",
    ReasonCode.DENSE_PREFERRED: "The loop found the dense layer worth its cost, or no form was cheaper in the end.",
    ReasonCode.TERM_NOT_APPLICABLE: "The term does not apply to this kind of layer and was dropped.",
    ReasonCode.TERMS_NOT_DISTINCT: "For this layer the term is the same matrix as an earlier one and was dropped.",
    ReasonCode.RANK_ABOVE_BREAK_EVEN: "The fixed rank costs no less than the dense layer; the term was left out.",
    ReasonCode.RANK_ZERO: "The selection gave the term rank 0; it was dropped from the sum.",
    ReasonCode.RANK_FIXED: "The rank is the one the spec fixes.",
    ReasonCode.RANK_SELECTED: "The rank was learned.",
}


class LayerFacts(BaseModel):
    """A layer of the reference model as it was found; one line of the plan begins with it."""

    model_config = ConfigDict(extra="forbid")

    position: int
    name: str
    kind: str
    weight: str | None = None
    weight_shape: list[int] = []
    input_shape: list[int] | None = None
    output_shape: list[int] | None = None
    calls: int = 0
    params: int = 0
    macs: int | None = None


class RankRow(BaseModel):
    """One row of rank_configurations: what stood for one term of one layer at one C step."""

    model_config = ConfigDict(extra="forbid")

    step: int  # C step, from 0; the final choice carries the step after the last
    layer: str
    term: int  # position in the layer's sum; 0 for a dense layer
    type: str = "low_rank"  # of the term; "dense" of a dense layer
    form: Form
    rank: int | None = None  # units: ranks, kept weights, values; None where there are none: a dense layer
    params: int = 0  # of this term alone; a layer's bias counts with its first term that is kept
    macs: int = 0
    bits: int = 0  # of everything that is stored; 0 where nobody counted them
    details: dict[str, Any] = {}  # what the term says beside its units: {"kept": 120, "index": "bitmap"}
    relative_error: float = 0.0  # of the whole layer: ‖W − ΣΘ‖ / ‖W‖
    reason: ReasonCode | None = None
    chosen: bool = False


class TermPlan(BaseModel):
    """One term of a layer's sum."""

    model_config = ConfigDict(extra="forbid")

    term: int
    type: str = "low_rank"
    form: Form
    rank: int | None = None
    params: int
    macs: int
    bits: int = 0
    details: dict[str, Any] = {}
    summary: str = ""  # the size in words: "rank 5", "4 values", "kept 1.0 %"
    reason: ReasonCode | None = None
    macs_stay: bool = False  # composed: fewer parameters, the dense multiply-adds


class LayerPlan(LayerFacts):
    """What one layer became."""

    form: Form
    reason: ReasonCode | None = None
    message: str | None = None
    relative_error: float = 0.0
    compressed_params: int
    compressed_macs: int | None = None
    compressed_bits: int | None = None  # None where not every part of the layer was counted
    terms: list[TermPlan] = []
    step: int | None = None


def make_plan(facts: Sequence[LayerFacts], rows: Sequence[RankRow]) -> list[LayerPlan]:
    """Say what each layer became: by its chosen rows if they are there, else by its latest step."""
    by_layer: dict[str, list[RankRow]] = defaultdict(list)
    for row in rows:
        by_layer[row.layer].append(row)
    return [_plan(each, _standing(by_layer[each.name])) for each in facts]


def _standing(rows: list[RankRow]) -> list[RankRow]:
    candidates = [row for row in rows if row.chosen] or rows
    latest = max((row.step for row in candidates), default=0)
    return [row for row in candidates if row.step == latest]


def _plan(facts: LayerFacts, rows: list[RankRow]) -> LayerPlan:
    kept = [row for row in rows if row.form is not Form.DENSE and (row.rank or 0) > 0]
    form = Form.SUM if len(kept) > 1 else kept[0].form if kept else _without_terms(rows)
    reason = _reason(rows, kept)
    return LayerPlan(
        **facts.model_dump(),
        form=form,
        reason=reason,
        message=None if reason is None else REASON_MEANINGS[reason],
        relative_error=max((row.relative_error for row in rows), default=0.0),
        compressed_params=sum(row.params for row in rows) if rows else facts.params,
        compressed_macs=_compressed_macs(facts, rows),
        compressed_bits=_compressed_bits(rows, kept),
        terms=[_term(row) for row in sorted(rows, key=lambda row: row.term) if row.form is not Form.DENSE],
        step=rows[0].step if rows else None,
    )


def _without_terms(rows: list[RankRow]) -> Form:
    """Dense, unless every term that was there has rank 0."""
    return Form.BIAS_ALONE if rows and all(row.form is not Form.DENSE for row in rows) else Form.DENSE


def _reason(rows: list[RankRow], kept: list[RankRow]) -> ReasonCode | None:
    """A dense layer's reason is its dense row's, else its first term's; a compressed one's is what all kept share."""
    if kept:
        reasons = {row.reason for row in kept}
        return reasons.pop() if len(reasons) == 1 else None
    dense = [row.reason for row in rows if row.form is Form.DENSE]
    return next((reason for reason in [*dense, *(row.reason for row in rows)] if reason is not None), None)


def _compressed_macs(facts: LayerFacts, rows: list[RankRow]) -> int | None:
    if facts.macs is None or not rows:
        return facts.macs
    return sum(row.macs for row in rows)


def _compressed_bits(rows: list[RankRow], kept: list[RankRow]) -> int | None:
    counted = bool(rows) and all(row.bits > 0 for row in (kept or rows))
    return sum(row.bits for row in rows) if counted else None


def _term(row: RankRow) -> TermPlan:
    shared = row.model_dump(include={"term", "type", "form", "rank", "params", "macs", "bits", "details", "reason"})
    macs_stay = bool(row.details.get("macs_stay", row.form in _COMPOSED_FORMS))
    words = size_in_words(row.type, row.rank or 0, row.details)
    return TermPlan(**shared, summary=words, macs_stay=macs_stay)
