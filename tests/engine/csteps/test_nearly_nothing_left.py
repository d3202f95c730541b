"""Sums where one term explains nearly everything: what the others are fitted to is rounding alone."""

import pytest
import torch

from service.contract.terms import LowRankTermSpec
from worker.engine.csteps.additive import TermChoice, project
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Accuracy, Price


@pytest.mark.parametrize("value", [0.3, 1.0, 1e-20, 1e20])
def test_a_constant_weight(value: float) -> None:
    calls = (Call((1, 6, 4, 4), (1, 8, 6, 6)),)
    geometry = Geometry("conv_transpose2d", (6, 8, 3, 3), calls, (1, 1), (0, 0), (1, 1), (0, 0))
    specs = [LowRankTermSpec(reshape="channel"), LowRankTermSpec(reshape="spatial")]
    terms = [term_class("low_rank").from_spec(spec, geometry) for spec in specs]
    choices = [TermChoice(term, Price(params=1e-6), 0, term.units_max) for term in terms]
    weight = torch.full((6, 8, 3, 3), value)
    made = None
    for accuracy in (Accuracy.SINGLE, Accuracy.WARM, Accuracy.WARM, Accuracy.EXACT):
        made = project(weight, choices, 0.0, warm=None if made is None else made.factors, accuracy=accuracy)
        assert made.error <= 1e-6 * float(weight.double().square().sum())
        for theta in made.factors:
            assert all(bool(torch.isfinite(each).all()) for each in theta.tensors().values())
