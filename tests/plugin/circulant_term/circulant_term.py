"""The same in the engine: W[i, j] = row[(i − j) mod n]."""

import torch
from torch import Tensor, nn

from service.contract.plan import ReasonCode
from worker.engine.forms.term import Counts, NotApplicableError, Term


class Row:
    def __init__(self, row: Tensor) -> None:
        self.row = row
        self.units = int(row.numel() > 0)

    def tensors(self):
        return {"row": self.row}

    def facts(self):
        return {"length": self.row.numel()}


class CirculantWeight(nn.Module):
    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(row)

    def forward(self) -> Tensor:
        places = torch.arange(self.row.size(0), device=self.row.device)
        return self.row[(places[:, None] - places[None, :]) % self.row.size(0)]


class CirculantTerm(Term):
    type_name = "circulant"
    units_max = 1

    @classmethod
    def from_spec(cls, spec, geometry):
        if len(geometry.weight_shape) != 2 or len(set(geometry.weight_shape)) != 1:
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE)
        return cls(geometry)

    def units_asked(self, spec):
        return (1, 1)

    def counts_at(self, units):
        n = self.geometry.weight_shape[0] * units
        return Counts(params=n, bits=n * self.geometry.dtype_bits)

    def empty(self, like):
        return Row(like.new_zeros(0))

    def fit(self, residual, ask, warm=None):
        n = len(residual)
        return Row(torch.stack([residual.roll(-shift, 0).diagonal().mean() for shift in range(n)]))

    def project(self, theta):
        n = self.geometry.weight_shape[0]
        return CirculantWeight(theta.row)().detach() if theta.units else theta.row.new_zeros(n, n)

    def restore(self, tensors, facts):
        return Row(tensors.get("row", torch.zeros(facts["length"])))

    def emit_weight(self, theta):
        return CirculantWeight(theta.row)
