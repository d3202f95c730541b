"""One numbered line of a job's history, and the progress of a running job."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class EventKind(StrEnum):
    """What an event tells."""

    STATE = "state"  # data: {state, …}
    PHASE = "phase"  # data: {phase}
    STEP = "step"  # data: {step, total_steps, mu, loss, penalty, distance, cost, …}
    METRIC = "metric"  # data: {name, part, value, …}
    LOG = "log"  # data: {level, message}
    WARNING = "warning"  # data: {code, message, layer?}


class Progress(BaseModel):
    """How far a running job is; `fraction` never falls within one attempt."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    total_steps: int = 0
    fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    eta_seconds: float | None = None
    loss: float | None = None
    cost: float | None = None  # in the budget's metric, as a fraction of the reference


class Event(BaseModel):
    """One line of a job's history; `id` counts up within the job."""

    model_config = ConfigDict(extra="forbid")

    id: int
    epoch: int | None = None  # of the attempt that told it; none for what the service itself did
    kind: EventKind
    data: dict[str, Any]
    created_at: datetime
