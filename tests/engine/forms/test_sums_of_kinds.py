"""Sums of quantized, sparse and low-rank terms through the C step that all terms share."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.terms import LowRankTermSpec, PruneTermSpec, QuantizeTermSpec
from worker.engine.csteps.additive import TermChoice, project
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.modules import SumOfWeights
from worker.engine.forms.pruned import PruneTerm
from worker.engine.forms.quantized import QuantizeTerm
from worker.engine.forms.term import Accuracy, Ask, Price, Term

GEOMETRY = Geometry("linear", (30, 40), ())
PRICE = Price(bytes=0.1)
TWO_VALUES = QuantizeTermSpec(values=2)
CORRECTIONS = PruneTermSpec(keep_fraction=0.01)
SUMS: list[list[Any]] = [
    [TWO_VALUES, CORRECTIONS],
    [QuantizeTermSpec(scheme="ternary"), PruneTermSpec(keep_fraction=0.05)],
    [QuantizeTermSpec(scheme="fixed_point", bits=3, per_channel=True), CORRECTIONS],
    [QuantizeTermSpec(scheme="power_of_two", bits=3), PruneTermSpec(norm="l1", keep_fraction=0.1)],
    [LowRankTermSpec(reshape="matrix", rank=3), PruneTermSpec(keep_fraction=0.05)],
    [LowRankTermSpec(reshape="matrix", rank=2), TWO_VALUES, CORRECTIONS],
    [PruneTermSpec(keep_fraction=0.2, group="filter"), PruneTermSpec(keep_fraction=0.02)],
]
KINDS: dict[type, type[Term]] = {
    QuantizeTermSpec: QuantizeTerm,
    PruneTermSpec: PruneTerm,
    LowRankTermSpec: LowRankTerm,
}


def choice_of(spec: Any, price: Price = PRICE) -> TermChoice:
    term = KINDS[type(spec)].from_spec(spec, GEOMETRY)
    low, high = term.units_asked(spec) or (0, term.units_max)
    return TermChoice(term, price, low, high)


def weight_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(30, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    spikes = 6 * torch.randn(30, 40, generator=generator) * (torch.rand(30, 40, generator=generator) < 0.02)
    return (smooth + spikes + 0.3 * torch.randn(30, 40, generator=generator)).double()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("specs", SUMS, ids=lambda specs: "+".join(spec.type for spec in specs))
def test_no_fit_of_the_alternation_raises_the_error(specs: list[Any], seed: int) -> None:
    weight, choices = weight_of(seed), [choice_of(spec) for spec in specs]
    thetas: list[Any] = [choice.term.empty(weight) for choice in choices]
    parts = [torch.zeros_like(weight) for _ in choices]
    errors = []
    for sweep in range(6):
        for place, choice in enumerate(choices):
            residual = weight - sum(part for at, part in enumerate(parts) if at != place)
            accuracy = Accuracy.EXACT if sweep in (0, 5) else Accuracy.WARM
            ask = Ask(0.0, choice.rank_low, choice.rank_high, 1.0, PRICE, accuracy)
            thetas[place] = choice.term.fit(residual, ask, thetas[place])
            parts[place] = choice.term.project(thetas[place])
            errors.append(float((weight - torch.stack(parts).sum(dim=0)).square().sum()))
    settled = errors[len(choices) - 1 :]
    # a grid in several bits has local optima, the warm one among the starts
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(settled)), errors


@pytest.mark.parametrize("specs", SUMS, ids=lambda specs: "+".join(spec.type for spec in specs))
def test_the_sum_is_no_worse_than_its_parts_and_is_emitted(specs: list[Any]) -> None:
    weight, choices = weight_of(2), [choice_of(spec) for spec in specs]
    made = project(weight, choices, 0.0)
    for choice in choices:
        alone = choice.term.fit(weight, Ask(0.0, choice.rank_low, choice.rank_high, 1.0, PRICE))
        assert made.error <= float((weight - choice.term.project(alone)).square().sum()) + 1e-9
    total = sum(choice.term.project(theta) for choice, theta in zip(choices, made.factors, strict=True))
    assert float((weight - total).square().sum()) == pytest.approx(made.error)
    composed = [
        choice.term.emit_weight(theta.to(torch.float32))
        for choice, theta in zip(choices, made.factors, strict=True)
        if choice.term.composed
    ]
    module = torch.jit.script(SumOfWeights(composed)).eval() if len(composed) > 1 else composed[0].eval()
    wanted = sum(
        choice.term.project(theta) for choice, theta in zip(choices, made.factors, strict=True) if choice.term.composed
    )
    with torch.no_grad():
        assert torch.allclose(module(), torch.as_tensor(wanted).float(), atol=1e-5)


def test_corrections_find_the_spikes() -> None:
    generator = torch.Generator().manual_seed(5)
    signs = torch.where(torch.rand(30, 40, generator=generator) < 0.5, -1.0, 1.0).double()
    spikes = torch.zeros(30, 40, dtype=torch.float64)
    spikes[3, 4], spikes[20, 30] = 7.0, -9.0
    made = project(signs + spikes, [choice_of(TWO_VALUES), choice_of(PruneTermSpec(keep_fraction=2 / 1200))], 0.0)
    assert made.error < 1e-9
    assert sorted(made.factors[1].positions.tolist()) == [3 * 40 + 4, 20 * 40 + 30]


def test_prices_choose_between_ranks_and_single_weights() -> None:
    """Kept weights and ranks answer to the same price: more spikes, more kept weights."""
    free = [LowRankTermSpec(reshape="matrix"), PruneTermSpec()]
    made = project(weight_of(3), [choice_of(spec, Price(params=1.0)) for spec in free], 1.0)
    rank, kept = made.ranks
    assert 3 <= rank <= 8
    assert 8 <= kept <= 100
    dear = project(weight_of(3), [choice_of(spec, Price(params=1.0)) for spec in free], 8.0)
    assert dear.ranks[1] < kept
    assert dear.objective >= made.objective
