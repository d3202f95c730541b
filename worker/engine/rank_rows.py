"""Rank configurations as rows: what stood at a step, and the final choice for every layer."""

from collections.abc import Sequence
from math import sqrt

from service.contract.plan import Form, RankRow, ReasonCode
from worker.engine.csteps.additive import Projection
from worker.engine.layer_rules import Decisions, LayerProblem


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
        rows.append(
            RankRow(
                step=step,
                layer=facts.name,
                term=0,
                form=Form.DENSE,
                params=facts.params,
                macs=facts.macs or 0,
                reason=decisions.dense[facts.name],
                chosen=True,
            )
        )
    return rows


def layer_rows(step: int, problem: LayerProblem, norm: float, made: Projection, *, chosen: bool) -> list[RankRow]:
    """Rows of one layer that the rules let be compressed."""
    layer = problem.layer
    bias_params = layer.params - problem.choices[0].term.geometry.weight_params
    if made.dense:
        return [
            RankRow(
                step=step,
                layer=layer.name,
                term=0,
                form=Form.DENSE,
                params=layer.params,
                macs=layer.macs or 0,
                reason=ReasonCode.DENSE_PREFERRED,
                chosen=chosen,
            )
        ]
    error = sqrt(max(made.error, 0.0) / norm) if norm > 0 else 0.0
    rows = []
    bias_given = False
    for index, choice, rank in zip(problem.term_indices, problem.choices, made.ranks, strict=True):
        carries_bias = rank > 0 and not bias_given
        bias_given = bias_given or carries_bias
        fixed = choice.rank_low == choice.rank_high
        selected = ReasonCode.RANK_FIXED if fixed else ReasonCode.RANK_SELECTED
        rows.append(
            RankRow(
                step=step,
                layer=layer.name,
                term=index,
                form=choice.term.form,
                rank=rank,
                params=choice.term.params(rank) + (bias_params if carries_bias else 0),
                macs=choice.term.macs(rank),
                relative_error=error,
                reason=selected if rank > 0 else ReasonCode.RANK_ZERO,
                chosen=chosen,
            )
        )
    rows.extend(
        RankRow(
            step=step,
            layer=layer.name,
            term=drop.index,
            form=drop.form,
            rank=0,
            relative_error=error,
            reason=drop.reason,
            chosen=chosen,
        )
        for drop in problem.dropped
    )
    return rows
