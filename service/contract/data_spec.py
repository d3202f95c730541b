"""Which arrays of a dataset are what, as a spec says it."""

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.numbers import Bounded, Magnitude
from service.contract.strict import StrictModel

EXAMPLE_ELEMENTS_MAX = 2**32


class DataSpec(StrictModel):
    """Which arrays of the dataset are what, and how raw values become inputs: (x·scale − mean)/std."""

    inputs: str | Annotated[list[str], Field(min_length=1)] = "inputs"
    targets: str | list[str] = "targets"
    scale: Magnitude | None = None
    mean: Bounded | list[Bounded] | None = None
    std: Magnitude | list[Magnitude] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None


class ExampleInput(StrictModel):
    """One input of the model where there is no data; `shape` includes the batch dimension first."""

    shape: list[PositiveInt] = Field(min_length=1, max_length=16)
    dtype: Literal["float32", "float64", "int64", "int32", "uint8", "bool"] = "float32"
    high: Annotated[int, Field(gt=0, lt=2**31)] | None = None  # exclusive bound of random integers

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if prod(self.shape) > EXAMPLE_ELEMENTS_MAX:
            raise PydanticCustomError(
                "shape",
                "the shape has {found} elements; at most {most} are accepted",
                {"found": prod(self.shape), "most": EXAMPLE_ELEMENTS_MAX},
            )
        return self
