"""How networks are trained, as a spec says it."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.numbers import MAX_EPOCHS, Auto, Fraction, Magnitude
from service.contract.strict import StrictModel

FINE_TUNE_EPOCHS = (5, 30)  # bounds of the automatic number
MOVE_PIXELS_MAX = 256


class SgdSpec(StrictModel):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    lr: Magnitude | Auto = "auto"  # auto: a short range test on a copy; never above 1/μ in the L step
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=0.0, ge=0, le=1e12)
    weight_decay_on: Literal["factors", "product"] = "factors"  # of a factored layer: ‖U‖² + ‖V‖², or ‖UV‖²


class _TypedSchedule(StrictModel):
    model_config = ConfigDict(json_schema_extra={"required": ["type"]})  # by which schedules are told apart


class ConstantSchedule(_TypedSchedule):
    """The same rate throughout."""

    type: Literal["constant"] = "constant"


class CosineSchedule(_TypedSchedule):
    """Half a cosine, from the rate down to a fraction of it."""

    type: Literal["cosine"] = "cosine"
    to: float = Field(default=0.0, ge=0, le=1)
    restart: bool = False  # at each L step, else once over all of them


class ExponentialSchedule(_TypedSchedule):
    """Rate × factor^n, n counting epochs, or L steps."""

    type: Literal["exponential"] = "exponential"
    factor: float = Field(default=0.98, gt=0, le=1)
    per: Literal["step", "epoch"] = "epoch"
    restart: bool = False  # at each L step; for one that counts epochs

    @model_validator(mode="after")
    def _restarts_within_a_step(self) -> Self:
        if self.restart and self.per == "step":
            raise PydanticCustomError(
                "restart_per_step",
                'a schedule that counts steps cannot restart at each of them; set per to "epoch" or remove restart',
            )
        return self


class StepSchedule(_TypedSchedule):
    """The rate falls by a factor at some places, given as fractions of the epochs."""

    type: Literal["step"] = "step"
    factor: float = Field(default=0.1, gt=0, le=1)
    at: list[Fraction] = Field(default_factory=lambda: [0.5, 0.75], min_length=1, max_length=100)
    restart: bool = False  # at each L step, else once over all of them


Schedule = Annotated[
    ConstantSchedule | CosineSchedule | ExponentialSchedule | StepSchedule, Field(discriminator="type")
]
SCHEDULES = ("constant", "cosine", "exponential", "step")


class Augmentation(StrictModel):
    """How images are moved at random while a network is trained on them; they keep their size."""

    crop_pixels: int = Field(default=0, ge=0, le=MOVE_PIXELS_MAX)  # a crop out of the image with a black edge so wide
    flip: bool = False  # left for right, every other time
    shift_pixels: int = Field(default=0, ge=0, le=MOVE_PIXELS_MAX)  # at most; the image's own edge is repeated


class EarlyStop(StrictModel):
    """When the LC loop ends before its last step: the constraint W = Θ is as good as reached."""

    steps: int = Field(default=3, ge=1, le=1000)  # in a row without a change of ranks
    distance: float = Field(default=1e-6, ge=0, le=1)  # Σ‖W − Θ‖² / Σ‖W‖², at most


class Training(StrictModel):
    """The L step, and what the factored network's training shares with it."""

    epochs_per_step: int = Field(default=3, ge=1, le=MAX_EPOCHS)
    batch_size: PositiveInt = 256
    optimizer: SgdSpec = SgdSpec()
    schedule: Schedule | Auto = "auto"  # auto: × 0.95^(25/steps) from step to step, constant within
    augmentation: Augmentation | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    batch_norm: Literal["reestimate", "keep"] = "reestimate"
    early_stop: EarlyStop | None = None  # measured: what it leaves out would have gained a little (docs/method.md)


class FineTune(StrictModel):
    """Training of the factored network after the ranks are fixed."""

    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] | Auto = "auto"
    lr: Magnitude | Auto = "auto"  # auto: that of training.optimizer, or else a range test of its own
    schedule: Schedule | Auto = "auto"  # auto: cosine
    keep: Literal["best", "last"] | Auto = "auto"  # auto: last where the reference remembers the held-out rows

    @model_validator(mode="after")
    def _has_no_steps(self) -> Self:
        if isinstance(self.schedule, ExponentialSchedule) and self.schedule.per == "step":
            raise PydanticCustomError(
                "fine_tune_per_step", 'fine-tuning has no L steps to count; set fine_tune.schedule.per to "epoch"'
            )
        return self

    def resolved_epochs(self, l_step_epochs: int) -> int:
        """As many epochs as all L steps together, between 5 and 30, unless the spec says a number."""
        low, high = FINE_TUNE_EPOCHS
        return min(max(l_step_epochs, low), high) if self.epochs == "auto" else self.epochs
