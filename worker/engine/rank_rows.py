"""Rank configurations as rows: what stood at a step, and the final choice for every layer."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from service.contract.plan import Form, RankRow, ReasonCode
from worker.engine.csteps.additive import Projection, TermChoice
from worker.engine.forms.term import Counts
from worker.engine.layer_problem import LayerProblem
from worker.engine.layer_rules import Decisions
from worker.engine.network.layers import Layer


def step_rows(
    step: int, problems: Sequence[LayerProblem], norms: Sequence[float], made: Sequence[Projection]
) -> list[RankRow]:
    """Rows of every layer at one C step; `norms` are ‖W‖²."""
    rows: list[RankRow] = []
    for problem, norm, projection in zip(problems, norms, made, strict=True):
        rows.extend(layer_rows(step, problem, norm, projection, chosen=False))
    return rows


def changed(rows: Sequence[RankRow], before: Sequence[RankRow]) -> list[RankRow]:
    """Rows whose layer has other forms or ranks than before; all of them where there is no before."""
    known: dict[str, list[tuple[int, Form, int | None]]] = {}
    for row in before:
        known.setdefault(row.layer, []).append((row.term, row.form, row.rank))
    now: dict[str, list[tuple[int, Form, int | None]]] = {}
    for row in rows:
        now.setdefault(row.layer, []).append((row.term, row.form, row.rank))
    return [row for row in rows if now[row.layer] != known.get(row.layer)]


def final_rows(step: int, decisions: Decisions, norms: Sequence[float], made: Sequence[Projection]) -> list[RankRow]:
    """Rows of every layer of the model: its chosen form and ranks, or dense with the reason."""
    rows: list[RankRow] = []
    by_name = {problem.layer.name: index for index, problem in enumerate(decisions.problems)}
    for facts in decisions.facts:
        index = by_name.get(facts.name)
        if index is not None:
            problem = decisions.problems[index]
            rows.extend(layer_rows(step, problem, norms[index], made[index], chosen=True))
            continue
        rows.append(_dense_row(step, decisions.layers[facts.name], decisions.dense[facts.name], chosen=True))
    return rows


def layer_rows(step: int, problem: LayerProblem, norm: float, made: Projection, *, chosen: bool) -> list[RankRow]:
    """Rows of one layer that the rules let be compressed."""
    layer = problem.layer
    if made.dense:
        return [_dense_row(step, layer, ReasonCode.DENSE_PREFERRED, chosen=chosen)]
    error = sqrt(max(made.error, 0.0) / norm) if norm > 0 else 0.0
    bias_params = max(layer.params - problem.geometry.weight_params, 0)
    operator_macs = problem.geometry.dense_macs  # counted with the first term whose weight it uses
    bias_at = next((place for place, rank in enumerate(made.ranks) if rank > 0), 0)
    rows = []
    for place, (index, choice, theta) in enumerate(
        zip(problem.term_indices, problem.choices, made.factors, strict=True)
    ):
        row = _term_row(step, layer.name, index, choice, theta).model_copy(
            update={"relative_error": error, "chosen": chosen}
        )
        if place == bias_at:
            bits = row.bits + bias_params * layer.dtype_bits
            row = row.model_copy(update={"params": row.params + bias_params, "bits": bits})
        if theta.units > 0 and choice.term.composed:
            row, operator_macs = row.model_copy(update={"macs": row.macs + operator_macs}), 0
        rows.append(row)
    rows.extend(
        RankRow(
            step=step,
            layer=layer.name,
            term=drop.index,
            type=drop.type,
            form=drop.form,
            rank=0,
            relative_error=error,
            reason=drop.reason,
            chosen=chosen,
        )
        for drop in problem.dropped
    )
    return rows


def _term_row(step: int, layer: str, index: int, choice: TermChoice, theta: Any) -> RankRow:
    counts = choice.term.counts(theta) if theta.units > 0 else Counts()
    selected = ReasonCode.RANK_FIXED if choice.fixed else ReasonCode.RANK_SELECTED
    return RankRow(
        step=step,
        layer=layer,
        term=index,
        type=choice.term.type_name,
        form=choice.term.form_of(theta),
        rank=theta.units,
        params=counts.params,
        macs=counts.macs,
        bits=counts.bits,
        details={**choice.term.details(theta), "macs_stay": choice.term.composed} if theta.units > 0 else {},
        reason=selected if theta.units > 0 else ReasonCode.RANK_ZERO,
    )


def _dense_row(step: int, layer: Layer, reason: ReasonCode, *, chosen: bool) -> RankRow:
    params = 0 if reason is ReasonCode.UNUSED else layer.params
    return RankRow(
        step=step,
        layer=layer.name,
        term=0,
        type="dense",
        form=Form.DENSE,
        params=params,
        macs=layer.macs or 0,
        bits=params * layer.dtype_bits,
        reason=reason,
        chosen=chosen,
    )
