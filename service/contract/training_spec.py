"""How networks are trained, as a spec says it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from service.contract.numbers import MAX_EPOCHS, Auto, Magnitude, NonNegative
from service.contract.strict import StrictModel

FINE_TUNE_EPOCHS = (5, 30)  # bounds of the automatic number


class SgdSpec(StrictModel):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    lr: Magnitude | Auto = "auto"  # auto: a short range test on a copy; never above 1/μ in the L step
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: NonNegative = 0.0


class Training(StrictModel):
    """The L step."""

    epochs_per_step: int = Field(default=3, ge=1, le=MAX_EPOCHS)
    batch_size: PositiveInt = 256
    optimizer: SgdSpec = SgdSpec()


class FineTune(StrictModel):
    """Training of the factored network after the ranks are fixed."""

    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] | Auto = "auto"

    def resolved_epochs(self, l_step_epochs: int) -> int:
        """As many epochs as all L steps together, between 5 and 30, unless the spec says a number."""
        low, high = FINE_TUNE_EPOCHS
        return min(max(l_step_epochs, low), high) if self.epochs == "auto" else self.epochs
