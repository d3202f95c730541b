"""A Tucker-2 term: a convolution as 1×1, a smaller k×k, and 1×1 (methods 0)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.terms import Tucker2TermSpec
from worker.engine.csteps.tucker import Bases, bases_of, errors_of_all_ranks, hooi, hosvd
from worker.engine.forms.factor_operators import convolution
from worker.engine.forms.geometry import CONVOLUTIONS, TRANSPOSED, Geometry
from worker.engine.forms.term import Ask, Counts, Facts, NotApplicableError, Price, Term

Ranks = tuple[int, int]


@dataclass(frozen=True)
class TuckerFactors:
    """A weight as ``outputs · core · inputsᵀ`` along its channels.

    Parameters
    ----------
    outputs : Tensor
        ``(n, r₁)``, of orthonormal columns where a C step made them.
    core : Tensor
        ``(r₁, r₂, k…)``.
    inputs : Tensor
        ``(c, r₂)``, as `outputs`.
    """

    outputs: Tensor
    core: Tensor
    inputs: Tensor

    @property
    def ranks(self) -> Ranks:
        """(r₁, r₂): of the outputs, of the inputs."""
        return int(self.core.shape[0]), int(self.core.shape[1])

    @property
    def units(self) -> int:
        """The rank of the outputs."""
        return self.ranks[0]

    def tensors(self) -> dict[str, Tensor]:
        """Both bases and the core."""
        return {"outputs": self.outputs, "core": self.core, "inputs": self.inputs}

    def facts(self) -> Facts:
        """Both ranks."""
        return {"rank_out": self.ranks[0], "rank_in": self.ranks[1]}


class Tucker2Term(Term):
    """Tucker-2 on one convolution, transposed or not, without groups.

    Its units are the rank of the outputs; that of the inputs is chosen with it, so the term is not graded.

    Parameters
    ----------
    geometry : Geometry
        The layer.
    ranks : (int, int), optional
        Ranks (r₁, r₂) of the outputs and of the inputs; without them the C step chooses both.
    """

    type_name: ClassVar[str] = "tucker2"

    def __init__(self, geometry: Geometry, ranks: Ranks | None = None) -> None:
        self.geometry = geometry
        self.transposed = geometry.kind in TRANSPOSED
        first, second, *kernel = geometry.weight_shape
        self.channels = (second, first) if self.transposed else (first, second)  # outputs, inputs
        self.kernel = tuple(kernel)
        self.ranks = ranks

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Term:
        """Make the term of a `Tucker2TermSpec`."""
        assert isinstance(spec, Tucker2TermSpec)  # noqa: S101  registered for this spec
        if geometry.kind not in (*CONVOLUTIONS, *TRANSPOSED) or geometry.groups != 1 or prod(geometry.kernel) == 1:
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, Form.TUCKER2)
        made = cls(geometry)
        if spec.ranks is None:
            return made
        return cls(geometry, (min(spec.ranks[0], made.channels[0]), min(spec.ranks[1], made.channels[1])))

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Term:
        """Make the term again."""
        return cls(geometry, None if facts["ranks"] is None else (facts["ranks"][0], facts["ranks"][1]))

    def facts(self) -> Facts:
        """The ranks, where they are given."""
        return {"ranks": None if self.ranks is None else list(self.ranks)}

    @property
    def form(self) -> Form:
        """Tucker-2."""
        return Form.TUCKER2

    @property
    def key(self) -> object:
        """One set: the sum of two such terms is one of larger ranks."""
        return self.type_name

    @property
    def composed(self) -> bool:
        """It is three small convolutions."""
        return False

    @property
    def units_max(self) -> int:
        """The number of outputs."""
        return self.channels[0]

    def units_asked(self, spec: Any) -> tuple[int, int] | None:  # noqa: ARG002  clipped when the term was made
        """The rank of the outputs where it is given."""
        return None if self.ranks is None else (self.ranks[0], self.ranks[0])

    def least_counts(self, low: int) -> Counts:
        """Counts with a single rank of the inputs, or at the ranks given."""
        if low == 0:
            return Counts()
        return self.counts_at_ranks((low, 1) if self.ranks is None else self.ranks)

    def counts(self, theta: Any) -> Counts:
        """Counts of both bases and the core."""
        return self.counts_at_ranks(theta.ranks) if theta.units else Counts()

    def counts_at_ranks(self, ranks: Ranks) -> Counts:
        """Counts at (r₁, r₂)."""
        out, into = ranks
        per_out, per_in, per_pair = self._counts_per_rank()
        params = per_out.params * out + per_in.params * into + per_pair.params * out * into
        macs = per_out.macs * out + per_in.macs * into + per_pair.macs * out * into
        return Counts(params, macs, params * self.geometry.dtype_bits)

    def details(self, theta: Any) -> Facts:
        """Both ranks."""
        return dict(theta.facts())

    def empty(self, like: Tensor) -> TuckerFactors:
        """Ranks 0."""
        zeros = [like.new_zeros(shape, dtype=torch.float64) for shape in self._shapes((0, 0))]
        return TuckerFactors(*zeros)

    def fit(self, residual: Tensor, ask: Ask, warm: Any = None) -> TuckerFactors:
        """Make the C step: the pair of ranks of least objective of all by HOSVD, then HOOI from the better start.

        HOOI finds a local optimum, and the pair is the best of the truncated HOSVDs: where the Θ before is still
        better at its own ranks, improved by HOOI, it stands.
        """
        weight = self._channels_first(residual)
        whole = hosvd(weight)
        ranks = self._select(errors_of_all_ranks(whole), ask)
        if ranks == (0, 0):
            return self.empty(residual)
        starts = [whole.first(ranks)]
        if warm is not None and warm.units and (warm.ranks == ranks or self._allowed(warm.ranks, ask)):
            starts.append(self._former(weight, warm))
        if len(starts) == 2 and starts[1].ranks == ranks:
            starts = [max(starts, key=lambda start: start.explained)]
        made = [hooi(weight, start) for start in starts]
        return self._theta(min(made, key=lambda bases: self._objective(bases, ask)))

    def project(self, theta: Any) -> Tensor:
        """U · core · Vᵀ."""
        made = torch.einsum("ab...,na,cb->nc...", theta.core, theta.outputs, theta.inputs)
        return made.transpose(0, 1).contiguous() if self.transposed else made

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> TuckerFactors:
        """Both bases and the core."""
        if tensors:
            return TuckerFactors(tensors["outputs"], tensors["core"], tensors["inputs"])
        return TuckerFactors(*(torch.zeros(shape) for shape in self._shapes((facts["rank_out"], facts["rank_in"]))))

    def emit(self, theta: Any, bias: Tensor | None) -> nn.Module:
        """Make the three convolutions; stride, padding and dilation are the core's."""
        (n, c), (out, into), ones = self.channels, theta.ranks, (1,) * len(self.kernel)
        none, whole = [False] * len(ones), [True] * len(ones)
        core = theta.core.transpose(0, 1) if self.transposed else theta.core
        with torch.no_grad():
            first = theta.inputs.T.reshape(into, c, *ones).clone(memory_format=torch.contiguous_format)
            middle = core.clone(memory_format=torch.contiguous_format)
            last = theta.outputs.reshape(n, out, *ones).clone(memory_format=torch.contiguous_format)
            given = None if bias is None else nn.Parameter(bias.detach().clone())
            return nn.Sequential(
                convolution(first, tuple(first.shape), None, self.geometry, none),
                convolution(middle, tuple(middle.shape), None, self.geometry, whole, transposed=self.transposed),
                convolution(last, tuple(last.shape), given, self.geometry, none),
            )

    def _counts_per_rank(self) -> tuple[Counts, Counts, Counts]:
        """Counts of one rank of the outputs, one of the inputs, and one entry of both in the core; bits follow."""
        (n, c), axes, bits = self.channels, len(self.kernel), self.geometry.dtype_bits
        kernel = prod(self.kernel)
        inputs = outputs = 0
        for call in self.geometry.calls:
            samples = prod(call.output_shape[: -axes - 1])
            inputs += samples * prod(call.input_shape[-axes:])
            outputs += samples * prod(call.output_shape[-axes:])
        return (
            Counts(n, n * outputs, n * bits),
            Counts(c, c * inputs, c * bits),
            Counts(kernel, kernel * (inputs if self.transposed else outputs), kernel * bits),
        )

    def _select(self, errors: Tensor, ask: Ask) -> Ranks:
        """Pair of ranks of least pressure·C + error among those allowed; (0, 0) is one of them where low is 0."""
        if self.ranks is not None and ask.high > 0:
            return self.ranks
        price = self._prices(ask.price, errors)
        allowed = torch.zeros_like(errors, dtype=torch.bool)
        allowed[max(ask.low, 1) : ask.high + 1, 1:] = True
        dense = self._dense_price(ask.price)
        cheaper = allowed & (price < dense) if dense > 0 else allowed
        allowed = cheaper if bool(cheaper.any()) or ask.low == 0 else allowed
        if ask.low == 0:
            allowed[0, 0] = True
        objective = torch.where(allowed, ask.pressure * price + errors, torch.inf)
        out, into = divmod(int(objective.argmin()), errors.shape[1])
        return out, into

    def _allowed(self, ranks: Ranks, ask: Ask) -> bool:
        """Whether ranks of a Θ before may stand again."""
        if self.ranks is not None or not ask.low <= ranks[0] <= ask.high:
            return False
        dense = self._dense_price(ask.price)
        return dense <= 0 or ask.price(self.counts_at_ranks(ranks)) < dense

    def _prices(self, price: Price, like: Tensor) -> Tensor:
        """C at every pair of ranks: it is linear in each."""
        per_out, per_in, per_pair = (price(counts) for counts in self._counts_per_rank())
        out = torch.arange(like.shape[0], dtype=like.dtype, device=like.device)[:, None]
        into = torch.arange(like.shape[1], dtype=like.dtype, device=like.device)[None, :]
        return per_out * out + per_in * into + per_pair * out * into

    def _dense_price(self, price: Price) -> float:
        weight = self.geometry.weight_params
        return price(Counts(weight, self.geometry.dense_macs, weight * self.geometry.dtype_bits))

    def _objective(self, bases: Bases, ask: Ask) -> float:
        """The part of pressure·C + error that differs between candidates: without ‖W‖²."""
        return ask.pressure * ask.price(self.counts_at_ranks(bases.ranks)) - bases.explained

    def _former(self, weight: Tensor, warm: TuckerFactors) -> Bases:
        """Bases of a Θ before, made orthonormal again (a checkpoint may have rounded them)."""
        outputs, inputs = (torch.linalg.qr(each.to(weight))[0] for each in (warm.outputs, warm.inputs))
        return bases_of(weight, outputs, inputs)

    def _channels_first(self, weight: Tensor) -> Tensor:
        """The weight as ``(n, c, K)``."""
        ordered = weight.transpose(0, 1) if self.transposed else weight
        return ordered.reshape(*self.channels, -1)

    def _theta(self, bases: Bases) -> TuckerFactors:
        core = bases.core.reshape(*bases.ranks, *self.kernel)
        return TuckerFactors(bases.outputs.contiguous(), core.contiguous(), bases.inputs.contiguous())

    def _shapes(self, ranks: Ranks) -> tuple[tuple[int, ...], ...]:
        return (self.channels[0], ranks[0]), (*ranks, *self.kernel), (self.channels[1], ranks[1])
