"""What training minimises, as a spec says it."""

from typing import Literal

from pydantic import Field

from service.contract.numbers import Positive
from service.contract.strict import StrictModel


class Objective(StrictModel):
    """What training minimises."""

    loss: Literal["auto", "cross_entropy", "mse", "distillation"] = "auto"
    distillation: float = Field(default=0.7, ge=0, le=1)  # weight of T²·KL to the reference's outputs
    temperature: Positive = 2.0
    class_dim: int = 1
    ignore_index: int = -100
