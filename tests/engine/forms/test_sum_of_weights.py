"""Composed weights and their sum, against the dense weight they stand for."""

import torch

from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.modules import SumOfWeights
from worker.engine.forms.reshape import Reshape

REFERENCE = Geometry("linear", (3, 4), ())
RESHAPES = (Reshape((2, 3, 2), (0, 2, 1), (2, 6)), Reshape((12,), (0,), (4, 3)))


def test_a_sum_of_weights_is_the_sum_of_what_the_terms_stand_for() -> None:
    torch.manual_seed(0)
    parts, expected = [], torch.zeros(3, 4)
    for reshape in RESHAPES:
        term = LowRankTerm(reshape, REFERENCE)
        p, q = reshape.matrix
        factors = Factors(torch.randn(p, 2), torch.randn(2, q))
        parts.append(term.emit_weight(factors))
        assert torch.allclose(torch.jit.script(parts[-1])(), term.project(factors))
        expected += term.project(factors)
    module = torch.jit.script(SumOfWeights(list(parts)))
    made = module()
    assert torch.allclose(made, expected, atol=1e-6)
    made.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
