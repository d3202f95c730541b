"""`/metrics` for Prometheus: what this process has seen, and what the database says of all machines."""

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.contract.states import AttemptOutcome, JobState, Phase
from service.jobs.observe import Figures
from service.services import Services
from service.settings import QUEUES
from service.store import counters as names
from service.store.metrics import QueueFigures, StoreFigures

DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"  # a client may send any method at all
_SERIES_MAX = 2000

router = APIRouter(tags=["metrics"])

QueueFigure = Callable[[QueueFigures], float]
_QUEUE_GAUGES: tuple[tuple[str, str, QueueFigure], ...] = (
    ("queue_oldest_age_seconds", "How long the first claimable job has been so.", lambda q: q.oldest_age_seconds),
    ("running_jobs", "Jobs that run.", lambda q: q.running),
    (
        "checkpoint_age_seconds",
        "Largest time, of the running jobs, since the newest checkpoint or, if later, the attempt's start.",
        lambda q: q.checkpoint_age_seconds,
    ),
    ("workers", "Live workers that serve the queue; one of two queues counts in both.", lambda q: q.workers),
    ("worker_slots", "Slots of those workers.", lambda q: q.slots),
    ("worker_slots_busy", "Slots of those workers that are taken.", lambda q: q.busy),
)


class HttpDurations:
    """The histogram of how long requests took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histogram = Histogram(
            "rankpress_http_request_duration_seconds",
            "From the request's first byte to the answer's last, by route template.",
            ("method", "route", "status"),
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._series: dict[tuple[str, str, int], Histogram] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        key = (method, route, status)
        series = self._series.get(key)
        if series is None:
            series = self._histogram.labels(method if method in _METHODS else _OTHER, route, str(status))
            if len(self._series) < _SERIES_MAX:  # methods are the client's to invent
                self._series[key] = series
        series.observe(seconds)


class Metrics:
    """The registry of one application."""

    def __init__(self, services: Services) -> None:
        self.registry = CollectorRegistry()
        self.http_durations = HttpDurations(self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(_ProcessFigures(services))
        self.registry.register(_DatabaseFigures(services))


class _ProcessFigures(Collector):
    """What is known without the database."""

    def __init__(self, services: Services) -> None:
        self._bell = services.bell

    def collect(self) -> Iterable[Metric]:
        build = GaugeMetricFamily(
            "rankpress_build_info", "The running version; always 1.", labels=("version", "python")
        )
        build.add_metric((version("rankpress"), platform.python_version()), 1)
        yield build
        yield CounterMetricFamily(
            "rankpress_bell_failures",
            "Messages of this process that the broker did not take; the reconciler rings again.",
            self._bell.failures,
        )


class _DatabaseFigures(Collector):
    """What the database says of all machines, read at each scrape; without it `rankpress_database_up` is 0."""

    def __init__(self, services: Services) -> None:
        self._figures = Figures(services)

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would read the database

    def collect(self) -> Iterable[Metric]:
        figures = self._figures.now()
        up = 0 if figures is None else 1
        yield GaugeMetricFamily("rankpress_database_up", "Whether the database gave its figures for this scrape.", up)
        if figures is not None:
            yield from _queue_metrics(figures)
            yield from _counter_metrics(figures)


def _queue_metrics(figures: StoreFigures) -> Iterable[Metric]:
    queues = {name: figures.queues.get(name, QueueFigures()) for name in sorted({*QUEUES, *figures.queues})}
    depth = GaugeMetricFamily(
        "rankpress_queue_depth",
        "Jobs that wait: claimable, or backing off until a later time.",
        labels=("queue", "waiting"),
    )
    for name, queue in queues.items():
        depth.add_metric((name, "claimable"), queue.claimable)
        depth.add_metric((name, "backoff"), queue.backing_off)
    yield depth
    for metric, told, figure in _QUEUE_GAUGES:
        gauge = GaugeMetricFamily(f"rankpress_{metric}", told, labels=("queue",))
        for name, queue in queues.items():
            gauge.add_metric((name,), figure(queue))
        yield gauge
    jobs = GaugeMetricFamily("rankpress_jobs", "Jobs that there are.", labels=("state",))
    for state, number in figures.jobs.items():
        jobs.add_metric((state,), number)
    yield jobs


def _counter_metrics(figures: StoreFigures) -> Iterable[Metric]:
    counted = figures.counters
    ended = {state: 0.0 for state in JobState if state.terminal}
    for metric, told, name, label, zeros in (
        ("jobs_submitted", "Jobs that were accepted.", names.JOBS_SUBMITTED, None, {}),
        ("jobs_ended", "Jobs that reached a terminal state.", names.JOBS_ENDED, "state", ended),
        (
            "attempts_ended",
            "Attempts that ended.",
            names.ATTEMPTS_ENDED,
            "outcome",
            dict.fromkeys(AttemptOutcome, 0.0),
        ),
        ("lease_expiries", "Leases that ran out: a worker died or was cut off.", names.LEASE_EXPIRIES, None, {}),
        (
            "fenced_writes_refused",
            "Writes refused because their attempt was not the live one any more.",
            names.FENCED_WRITES_REFUSED,
            None,
            {},
        ),
    ):
        yield _counter(metric, told, label, zeros | dict(counted.get(name, {})))
    phases = SummaryMetricFamily("rankpress_phase_duration_seconds", "Time in each phase.", labels=("phase",))
    seconds = counted.get(names.PHASE_SECONDS, {})
    numbers = {str(phase): 0.0 for phase in Phase if phase is not Phase.DONE} | dict(counted.get(names.PHASE_COUNT, {}))
    for phase, number in numbers.items():
        phases.add_metric((phase,), count_value=int(number), sum_value=seconds.get(phase, 0.0))
    yield phases


def _counter(metric: str, told: str, label: str | None, values: Mapping[Any, float]) -> Metric:
    if label is None:
        return CounterMetricFamily(f"rankpress_{metric}", told, sum(values.values()))
    counter = CounterMetricFamily(f"rankpress_{metric}", told, labels=(label,))
    for value, number in values.items():
        counter.add_metric((str(value),), number)
    return counter


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Every metric, in the text format of Prometheus."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    found: Metrics = request.app.state.metrics
    text = await run_sync(encode, found.registry, limiter=request.app.state.lookers)
    return Response(text, media_type=None, headers={"content-type": content_type, "cache-control": "no-store"})
