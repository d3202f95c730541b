"""How small the result must be, and what the cost C of the papers counts."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.numbers import Fraction, NonNegative
from service.contract.strict import StrictModel

Metric = Literal["macs", "params", "bytes"]


class Budget(StrictModel):
    """How small the result must be; exactly one limit."""

    max_macs_fraction: Fraction | None = None
    max_params_fraction: Fraction | None = None
    max_macs: PositiveInt | None = None
    max_params: PositiveInt | None = None
    max_bytes_fraction: Fraction | None = None
    max_bytes: PositiveInt | None = None  # of the file

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "budget",
                "a budget has exactly one of {names}; found {found}",
                {"names": ", ".join(type(self).model_fields), "found": " and ".join(given) or "none"},
            )
        return self

    @property
    def metric(self) -> Metric:
        """What is limited."""
        metrics: tuple[Metric, ...] = ("macs", "params", "bytes")
        return next(metric for metric in metrics if any(self._given(metric)))

    def limit(self, reference: int) -> int:
        """The limit in units of the metric, for a reference network of this size."""
        absolute, fraction = self._given(self.metric)
        return absolute if absolute is not None else int((fraction or 0.0) * reference)

    def _given(self, metric: Metric) -> tuple[int | None, float | None]:
        return getattr(self, f"max_{metric}"), getattr(self, f"max_{metric}_fraction")


class CostWeights(StrictModel):
    """The C of the papers as a weighted sum of counts."""

    macs: NonNegative = 0.0
    params: NonNegative = 0.0
    bytes: NonNegative = 0.0

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if self.macs == self.params == self.bytes == 0:
            raise PydanticCustomError("cost", "at least one of the weights macs, params and bytes must be above 0")
        return self
