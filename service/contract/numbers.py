"""Kinds of numbers that a spec holds."""

from typing import Annotated, Literal

from pydantic import Field

Auto = Literal["auto"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Magnitude = Annotated[float, Field(ge=1e-12, le=1e12)]  # what single precision can still be multiplied with
Bounded = Annotated[float, Field(ge=-1e12, le=1e12)]  # the same with zero and either sign

MAX_EPOCHS = 10_000
