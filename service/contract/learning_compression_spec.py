"""The Learning-Compression method, as a spec says it (methods L.1, L.5)."""

from math import log10
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from service.contract.method_specs import MethodSpec
from service.contract.numbers import Auto, Magnitude, Positive
from service.contract.strict import StrictModel

MU_RANGE = 700.0  # the last μ over the first, whatever the number of steps (methods L.7: 1.3^25)
MU_ORDERS_MAX = 20


class MuSchedule(StrictModel):
    """The penalty weights μ₁ < μ₂ < … of the LC loop."""

    initial: Magnitude | Auto = "auto"
    growth: Annotated[float, Field(gt=1)] | Auto = "auto"
    steps: int = Field(default=25, ge=1, le=1000)

    @model_validator(mode="after")
    def _ends_in_range(self) -> Self:
        orders = log10(self.growth_factor) * (self.steps - 1) + (log10(self.initial) if self.initial != "auto" else 0.0)
        if orders > MU_ORDERS_MAX:
            raise PydanticCustomError(
                "mu",
                "mu would grow to 1e{orders}, above 1e{most}; lower growth, steps or initial",
                {"orders": round(orders), "most": MU_ORDERS_MAX},
            )
        return self

    @property
    def growth_factor(self) -> float:
        """The growth, with `auto` = 700^(1/(steps−1)): short runs cover the same range of μ."""
        return self.growth if self.growth != "auto" else MU_RANGE ** (1 / max(self.steps - 1, 1))


class CStepSpec(StrictModel):
    """How the C step alternates over the terms of a sum."""

    sweeps: Annotated[int, Field(ge=1, le=100)] | Auto = "auto"  # auto: until the decrease stalls


class LearningCompressionSpec(MethodSpec):
    """The Learning-Compression method (methods L.1)."""

    engine: ClassVar[str] = "worker.engine.methods.learning_compression:LearningCompression"
    type: Literal["learning_compression"] = "learning_compression"
    mu: MuSchedule = MuSchedule()
    multipliers: bool = True
    lambda_: Positive | None = Field(default=None, alias="lambda")  # per million units of the cost
    c_step: CStepSpec = CStepSpec()

    @property
    def steers_size(self) -> bool:
        """Whether λ is given."""
        return self.lambda_ is not None

    @property
    def step_count(self) -> int:
        """The number of μ."""
        return self.mu.steps

    def epochs_of_steps(self, epochs_per_step: int) -> int:
        """Those of all L steps."""
        return self.mu.steps * epochs_per_step

    def resolutions(self) -> dict[str, Any]:
        """The growth of μ."""
        return {"mu.growth": self.mu.growth_factor}
