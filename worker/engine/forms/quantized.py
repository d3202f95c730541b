"""Weights of a few values, stored as packed codes (methods L.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.terms import QuantizeTermSpec
from worker.engine.csteps.codebook import fit_codebook
from worker.engine.csteps.grids import (
    fit_binary,
    fit_fixed_point,
    fit_power_of_two,
    fit_scaled_binary,
    fit_ternary,
    power_count,
    power_levels,
)
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.outputs import output_axis
from worker.engine.forms.packing import pack_codes, packed_bytes
from worker.engine.forms.term import Accuracy, Ask, Counts, Facts, NotApplicableError, Term
from worker.engine.forms.unpacked import CodebookWeight, GridWeight, PowerWeight, unpacked


@dataclass(frozen=True)
class Codes:
    """Θ of a quantized weight.

    Parameters
    ----------
    values : Tensor
        ``(g, k)`` of codebooks, ``(g, 1)`` scales of a grid.
    codes : Tensor
        ``(g, n/g)``: the weight with the axis of the groups first; no elements where Δ(Θ) = 0. uint8 or int32.
    size : int
        Number of different codes.
    """

    values: Tensor
    codes: Tensor
    size: int

    @property
    def units(self) -> int:
        """Number of values."""
        return self.size if self.codes.numel() else 0

    def tensors(self) -> dict[str, Tensor]:
        """Values and codes."""
        return {"values": self.values, "codes": self.codes}

    def facts(self) -> Facts:
        """Shapes."""
        return {"size": self.size, "values": list(self.values.shape), "codes": list(self.codes.shape)}

    def to(self, dtype: torch.dtype) -> "Codes":
        """The same with values of another dtype, on the CPU."""
        return replace(self, values=self.values.cpu().to(dtype), codes=self.codes.cpu())


class QuantizeTerm(Term):
    """A weight whose elements take k values.

    Parameters
    ----------
    scheme : str
        As the spec names it.
    size : int
        k asked for; a codebook is never larger than what it is made for.
    bits : int
        Of a grid of 2ᵇ codes; 0 for other schemes.
    per_channel : bool
        One codebook or scale for each output channel.
    unpack : "load" or "call"
        When the emitted module unpacks.
    geometry : Geometry
        The layer.
    """

    type_name = "quantize"

    def __init__(
        self, scheme: str, size: int, geometry: Geometry, *, bits: int = 0, per_channel: bool = False, unpack: str
    ) -> None:
        self.scheme = scheme
        self.bits = bits
        self.geometry = geometry
        self.unpack = unpack
        self.axis = output_axis(geometry)
        shape = geometry.weight_shape
        if not shape or not geometry.weight_params:
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, Form.QUANTIZED)
        self.per_channel = per_channel and len(shape) > 1
        self.groups = shape[self.axis] if self.per_channel else 1
        self.size = self._size(size)

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Self:
        """Make the term of a `QuantizeTermSpec`."""
        assert isinstance(spec, QuantizeTermSpec)  # noqa: S101  registered for this spec
        grid = spec.scheme in {"fixed_point", "power_of_two"}
        return cls(
            spec.scheme,
            spec.codebook_size,
            geometry,
            bits=(spec.bits or 0) if grid else 0,
            per_channel=spec.per_channel,
            unpack=spec.unpack,
        )

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Self:
        """Make the term again."""
        return cls(
            facts["scheme"],
            facts["size"],
            geometry,
            bits=facts["bits"],
            per_channel=facts["per_channel"],
            unpack=facts["unpack"],
        )

    def facts(self) -> Facts:
        """The scheme and its sizes."""
        return {
            "scheme": self.scheme,
            "size": self.size,
            "bits": self.bits,
            "per_channel": self.per_channel,
            "unpack": self.unpack,
        }

    @property
    def form(self) -> Form:
        """Quantized."""
        return Form.QUANTIZED

    @property
    def key(self) -> object:
        """The scheme and its size."""
        return ("quantize", self.scheme, self.size, self.per_channel)

    @property
    def units_max(self) -> int:
        """The number of values."""
        return self.size

    def units_asked(self, spec: Any) -> tuple[int, int]:  # noqa: ARG002
        """All of the values, always."""
        return self.size, self.size

    def least_counts(self, low: int) -> Counts:
        """Counts of a weight of that many values."""
        return self._counts(min(max(low, 1), self.size))

    def counts(self, theta: Codes) -> Counts:
        """Counts of what is stored; every weight has its code."""
        return self._counts(theta.size) if theta.units else Counts()

    def details(self, theta: Codes) -> Facts:
        """Number of values, and bits of one weight."""
        bits = 8 * packed_bytes(self.geometry.weight_params, theta.size) / self.geometry.weight_params
        return {"scheme": self.scheme, "values": theta.size, "codebooks": self.groups, "bits_per_weight": bits}

    def empty(self, like: Tensor) -> Codes:
        """No codes."""
        values = like.new_zeros((self.groups, self._stored), dtype=torch.float64)
        return Codes(values, torch.zeros(0, dtype=torch.uint8, device=like.device), self.size)

    def fit(self, residual: Tensor, ask: Ask, warm: Codes | None = None) -> Codes:
        """Best codes and values; nothing where that is allowed and cheaper."""
        return self._worth_it(self._fit_rows(self._rows(residual), ask, warm), residual, ask)

    @classmethod
    def fit_joint(
        cls, terms: Sequence[Self], residuals: Sequence[Tensor], asks: Sequence[Ask], warm: Sequence[Any] | None
    ) -> list[Codes]:
        """One codebook or scale for all layers; they all have the first term's scheme."""
        sizes = [residual.numel() for residual in residuals]
        device = residuals[0].device
        rows = torch.cat([term._rows(each).to(device) for term, each in zip(terms, residuals, strict=True)], dim=1)
        largest = max(terms, key=lambda term: term.size)
        start = next((each for each in warm or [] if each.units == largest.size), None)
        made = largest._fit_rows(rows, asks[0], start)
        codes = torch.split(made.codes, sizes, dim=1)
        return [  # copies: what checkpoints hold shares no memory
            replace(made, codes=part.to(each.device, copy=True), values=made.values.to(each.device, copy=True))
            for part, each in zip(codes, residuals, strict=True)
        ]

    def project(self, theta: Codes) -> Tensor:
        """Look up or scale."""
        shape = self.geometry.weight_shape
        if not theta.units:
            return theta.values.new_zeros(shape)
        if self.scheme == "codebook":
            rows = theta.values.gather(1, theta.codes.long())
        elif self.scheme == "power_of_two":
            rows = power_levels(self.bits).to(theta.values)[theta.codes.int()] * theta.values
        else:
            slope, origin = self._line
            rows = (theta.codes.to(theta.values.dtype) * slope - origin) * theta.values
        return rows.reshape(self._moved_shape).movedim(0, self.axis)

    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Codes:
        """Values and codes, or zeros of their shapes."""
        if tensors:
            return Codes(tensors["values"], tensors["codes"], facts["size"])
        kind = torch.uint8 if facts["size"] <= 256 else torch.int32
        return Codes(torch.zeros(facts["values"]), torch.zeros(facts["codes"], dtype=kind), facts["size"])

    def emit_weight(self, theta: Codes) -> nn.Module:
        """Packed codes, and the values as parameters; a grid of {−1, 1} or of powers of two has none."""
        codes, values = pack_codes(theta.codes, theta.size), theta.values.detach().clone()
        shape = self._moved_shape
        if self.scheme == "codebook":
            module: nn.Module = CodebookWeight(values, codes, size=theta.size, shape=shape, axis=self.axis)
        elif self.scheme == "power_of_two":
            levels = power_levels(self.bits).to(values)
            module = PowerWeight(values, codes, levels, size=theta.size, shape=shape, axis=self.axis)
        else:
            slope, origin = self._line
            module = GridWeight(
                values,
                codes,
                size=theta.size,
                slope=slope,
                origin=origin,
                shape=shape,
                axis=self.axis,
                learned=self.scheme != "binary",
            )
        return unpacked(module, self.unpack)

    # --- sizes ------------------------------------------------------------------------------------------------------

    def _size(self, asked: int) -> int:
        if self.scheme == "codebook":
            return min(asked, max(self.geometry.weight_params // self.groups, 1))
        if self.scheme == "power_of_two":
            return 1 + 2 * power_count(self.bits)
        if self.scheme == "fixed_point":
            return 2 if self.bits == 1 else 2**self.bits - 1
        return asked

    @property
    def _stored(self) -> int:
        """Stored values of one group."""
        return self.size if self.scheme == "codebook" else 1

    @property
    def _line(self) -> tuple[int, int]:
        """Level of a code: slope·code − origin."""
        return (2, 1) if self.size == 2 else (1, (self.size - 1) // 2)

    @property
    def _moved_shape(self) -> list[int]:
        shape = list(self.geometry.weight_shape)
        return [shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :]]

    def _counts(self, size: int) -> Counts:
        weights = self.geometry.weight_params
        values = self.groups * (size if self.scheme == "codebook" else 1)
        levels = self.size if self.scheme == "power_of_two" else 0
        bits = 8 * packed_bytes(weights, size) + (values + levels) * self.geometry.dtype_bits
        return Counts(params=weights + values, bits=bits)

    # --- fitting ----------------------------------------------------------------------------------------------------

    def _rows(self, residual: Tensor) -> Tensor:
        return residual.movedim(self.axis, 0).reshape(self.groups, -1)

    def _fit_rows(self, rows: Tensor, ask: Ask, warm: Codes | None) -> Codes:
        fits = warm is not None and warm.units > 0 and warm.values.shape == (self.groups, self._stored)
        started = warm.values if warm is not None and fits else None
        in_loop = ask.accuracy is not Accuracy.EXACT
        if self.scheme == "codebook":
            made = fit_codebook(rows, self.size, started, in_loop=in_loop)
            return Codes(made.values, made.codes, self.size)
        if self.scheme == "binary":
            ones = torch.ones(self.groups, 1, dtype=torch.float64, device=rows.device)
            return Codes(ones, fit_binary(rows), 2)
        if self.scheme == "scaled_binary":
            scales, codes = fit_scaled_binary(rows)
        elif self.scheme == "ternary":
            scales, codes = fit_ternary(rows)
        elif self.scheme == "fixed_point":
            scales, codes = fit_fixed_point(rows, self.bits, started, in_loop=in_loop)
        else:
            scales, codes = fit_power_of_two(rows, self.bits)
        return Codes(scales, codes, self.size)

    def _worth_it(self, made: Codes, residual: Tensor, ask: Ask) -> Codes:
        if ask.low > 0:
            return made
        gain = residual.square().sum() - (residual - self.project(made)).square().sum()
        return made if float(gain) > ask.pressure * ask.price(self.counts(made)) else self.empty(residual)
