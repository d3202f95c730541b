"""Kinds of numbers that a spec holds."""

from typing import Annotated, Literal

from pydantic import Field

Auto = Literal["auto"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Magnitude = Annotated[float, Field(ge=1e-12, le=1e12)]  # what single precision can still be multiplied with

MAX_EPOCHS = 10_000
