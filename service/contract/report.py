"""The report of a finished job: what was measured, on which data, and what each layer became."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.contract.plan import LayerPlan

CONFIDENCE = 0.95
Verdict = Literal["better", "worse", "unclear"]
LATENCY_SLOWER_RATIO = 1.05  # less than that is noise


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Latency(_Part):
    """Median time of one forward pass."""

    batch_size: int
    median_ms: float
    repeats: int


class Measured(_Part):
    """One network: its size and its scores on the report part."""

    params: int
    macs: int
    file_bytes: int
    latencies: list[Latency] = []
    loss: float | None = None
    metric: float | None = None  # the report's `metric_name`


class PairedDifference(_Part):
    """Compressed minus reference over the same samples, with its 95 % interval."""

    name: str
    difference: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    samples: int
    unit_samples: int = 1  # samples in one of the independent units that the interval is of
    higher_is_better: bool | None = None
    verdict: Verdict | None = None  # "unclear" where the interval holds 0


class Fidelity(_Part):
    """How far the reloaded artifact's outputs are from the trained network's, and from the reference's."""

    max_abs_difference_to_trained: float
    samples: int
    relative_error_to_reference: float | None = None
    agreement_with_reference: float | None = None


class BudgetOutcome(_Part):
    """What the size was to be, and what it is."""

    metric: str  # "macs", "params" or "bytes"
    limit: int
    reached: int
    fraction_limit: float
    fraction_reached: float


class PhaseUse(_Part):
    """Time and peak memory of one phase."""

    phase: str
    seconds: float
    peak_memory_bytes: int


class ReportWarning(_Part):
    """Something the reader should know; `code` is stable."""

    code: str
    message: str
    layer: str | None = None


class Report(_Part):
    """Everything that was measured for one job."""

    version: int = 1
    job_id: str | None = None
    reference: Measured
    compressed: Measured
    params_fraction: float
    macs_fraction: float
    file_bytes_fraction: float
    metric_name: str | None = None  # "accuracy", "mse", …; a loss module's own, or "loss" where it has none
    higher_is_better: bool | None = None  # of the metric
    report_part: str | None = None  # "test", "report" or None: where the scores come from
    report_samples: int = 0
    differences: list[PairedDifference] = []
    fidelity: Fidelity
    budget: BudgetOutcome | None = None
    device: str
    thread_count: int
    seed: int
    hashes: dict[str, str]  # model, data, spec, artifact: SHA-256
    versions: dict[str, str]
    phases: list[PhaseUse] = []
    warnings: list[ReportWarning] = []
    training: dict[str, Any] = {}  # epochs, learning rate, step of the best iterate, …
    layers: list[LayerPlan] = []
