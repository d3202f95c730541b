"""A service of a few lines that answers with the contract's resources and does what a test tells it to."""

import asyncio
import hashlib
import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from service.contract import ids
from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import Event, EventKind, Progress
from service.contract.plan import Form, LayerPlan, RankRow, ReasonCode, TermPlan
from service.contract.report import (
    BudgetOutcome,
    Fidelity,
    Latency,
    Measured,
    PairedDifference,
    Report,
    ReportWarning,
)
from service.contract.resources import JobResource, ModelResource
from service.contract.states import JobState

KEY = "a-key-of-enough-characters"
CONTENT = bytes(range(256)) * 4096
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def plan() -> list[LayerPlan]:
    """A plan of a compressed convolution and a dense linear layer."""
    return [
        LayerPlan(
            position=0,
            name="features.0",
            kind="conv2d",
            macs=1000,
            params=90,
            form=Form.SUM,
            relative_error=0.25,
            compressed_params=40,
            compressed_macs=300,
            terms=[
                TermPlan(term=0, form=Form.CHANNEL, rank=2, params=30, macs=200, reason=ReasonCode.RANK_SELECTED),
                TermPlan(term=1, form=Form.SPATIAL, rank=1, params=10, macs=100, reason=ReasonCode.RANK_SELECTED),
            ],
        ),
        LayerPlan(
            position=1,
            name="head",
            kind="linear",
            macs=50,
            params=55,
            form=Form.DENSE,
            reason=ReasonCode.NOT_CHEAPER,
            compressed_params=55,
            compressed_macs=50,
        ),
    ]


def report(*, reached: int = 350) -> Report:
    """A report with a small loss of accuracy and a slower small batch."""
    times = [Latency(batch_size=1, median_ms=1.0, repeats=20), Latency(batch_size=256, median_ms=9.0, repeats=20)]
    slower = [Latency(batch_size=1, median_ms=1.5, repeats=20), Latency(batch_size=256, median_ms=4.0, repeats=20)]
    return Report(
        reference=Measured(params=145, macs=1050, file_bytes=9000, latencies=times, loss=0.1, metric=0.99),
        compressed=Measured(params=95, macs=reached, file_bytes=6000, latencies=slower, loss=0.12, metric=0.985),
        params_fraction=95 / 145,
        macs_fraction=reached / 1050,
        file_bytes_fraction=6 / 9,
        metric_name="accuracy",
        report_part="test",
        report_samples=400,
        differences=[PairedDifference(name="accuracy", difference=-0.005, low=-0.012, high=0.002, samples=400)],
        fidelity=Fidelity(max_abs_difference_to_trained=1e-6, samples=400),
        budget=BudgetOutcome(
            metric="macs", limit=350, reached=reached, fraction_limit=0.34, fraction_reached=reached / 1050
        ),
        device="cpu",
        thread_count=1,
        seed=0,
        hashes={},
        versions={},
        warnings=[ReportWarning(code="SLOWER", message="batch 1 is slower than the reference")],
        layers=plan(),
    )


@dataclass
class StubService:
    """What the stub will answer, and what it was asked."""

    end: JobState = JobState.SUCCEEDED
    code: ErrorCode | None = None
    steps: int = 3  # polls until the job ends; -1: only by cancel
    reached: int = 350
    fail_first: int = 0  # answers 503 to so many requests first
    break_download_after: int = 0  # the first download's connection ends after so many bytes
    damage: bool = False
    requests: list[Request] = field(default_factory=list)
    submissions: list[dict[str, Any]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    canceled: bool = False
    polls: int = 0
    job_id: str = field(default_factory=lambda: ids.new_id(ids.JOB))
    artifact_id: str = field(default_factory=lambda: ids.new_id(ids.ARTIFACT))
    url: str = ""

    def job(self) -> JobResource:
        """The job as it stands after so many polls."""
        ended = self.canceled or 0 <= self.steps <= self.polls
        state = JobState.CANCELED if self.canceled else (self.end if ended else JobState.RUNNING)
        problem = ProblemError(self.code, "as the test wants it").problem() if self.code and ended else None
        return JobResource(
            id=self.job_id,
            state=state,
            phase="learning",
            progress=Progress(step=self.polls, total_steps=25, fraction=0.5, eta_seconds=61, loss=0.5, cost=0.4),
            attempt=1,
            model_id=ids.new_id(ids.MODEL),
            dataset_id=None,
            requested_spec={},
            spec={},
            result=None,
            problem=problem,
            created_at=NOW,
            started_at=NOW,
            finished_at=None,
        )

    async def authorised(self, request: Request) -> Response | None:
        self.requests.append(request)
        if self.fail_first > 0:
            self.fail_first -= 1
            return problem_answer(ProblemError(ErrorCode.UNAVAILABLE, "busy"))
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return problem_answer(ProblemError(ErrorCode.UNAUTHENTICATED, "no such key"))
        return None

    async def jobs(self, request: Request) -> Response:
        if refusal := await self.authorised(request):
            return refusal
        if request.method == "GET":
            last = request.query_params.get("cursor") == "second"
            page = {"items": [answer(self.job())], "next_cursor": None if last else "second"}
            return JSONResponse(page)
        submission: dict[str, Any] = {"key": request.headers["Idempotency-Key"]}
        if request.headers["Content-Type"].startswith("application/json"):
            submission |= await request.json()
        else:
            async with request.form(max_part_size=1 << 30) as form:
                for name, value in form.multi_items():
                    submission[name] = value if isinstance(value, str) else await value.read()
            submission["spec"] = json.loads(submission["spec"])
        self.submissions.append(submission)
        return JSONResponse(answer(self.job()), 202, {"Location": f"/v1/jobs/{self.job_id}"})

    async def read_job(self, request: Request) -> Response:
        if refusal := await self.authorised(request):
            return refusal
        if request.path_params["job_id"] != self.job_id:
            return problem_answer(ProblemError(ErrorCode.NOT_FOUND, "no such job"))
        self.polls += 1
        return JSONResponse(answer(self.job()))

    async def cancel(self, request: Request) -> Response:
        self.canceled = True
        return JSONResponse(answer(self.job()), 202)

    async def retry(self, request: Request) -> Response:
        self.requests.append(request)
        return JSONResponse(answer(self.job()), 202)

    async def delete(self, request: Request) -> Response:
        self.requests.append(request)
        if request.path_params["id"] != self.job_id:
            return problem_answer(ProblemError(ErrorCode.STATE_CONFLICT, "it is in use: cancel job_x first"))
        return Response(status_code=204)

    async def model(self, request: Request) -> Response:
        body = await request.body()
        disposition = request.headers["Content-Disposition"]
        resource = ModelResource(
            id=ids.new_id(ids.MODEL),
            name=disposition,
            bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            created_at=NOW,
        )
        return JSONResponse(answer(resource), 201)

    async def events(self, request: Request) -> Response:
        after = int(request.query_params["after"])
        found = [
            answer(Event(id=number, kind=EventKind.LOG, data={}, created_at=NOW))
            for number in range(after + 1, min(after + 3, 6))
        ]
        return JSONResponse({"items": found, "next_after": found[-1]["id"] if found else after})

    async def layers(self, request: Request) -> Response:
        row = RankRow(step=0, layer="features.0", term=0, form=Form.CHANNEL, rank=3, chosen=True)
        history = [answer(row)] if request.query_params.get("history") == "true" else None
        return JSONResponse({"items": [answer(layer) for layer in plan()], "history": history})

    async def report(self, request: Request) -> Response:
        return JSONResponse(answer(report(reached=self.reached)))

    async def artifacts(self, request: Request) -> Response:
        digest = hashlib.sha256(CONTENT).hexdigest()
        item = {"id": self.artifact_id, "name": "small.pt", "format": "torchscript"}
        return JSONResponse({"items": [item | {"bytes": len(CONTENT), "sha256": digest}]})

    async def content(self, request: Request) -> Response:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body = CONTENT[start:]
        if self.damage:
            body = body[:-1] + b"\0"
        headers = {"ETag": '"tag"', "Content-Length": str(len(body))}
        stop, self.break_download_after = self.break_download_after, 0

        async def chunks() -> Any:
            if stop:
                yield body[:stop]
                await asyncio.sleep(0.05)
                raise ConnectionResetError("the test breaks the connection")
            yield body

        return StreamingResponse(chunks(), 206 if asked else 200, headers)

    async def capabilities(self, request: Request) -> Response:
        return JSONResponse(
            {
                "version": "0",
                "methods": [],
                "terms": [],
                "layer_kinds": [],
                "outputs": [],
                "data_formats": [],
                "devices": ["cpu"],
                "limits": {},
                "reason_codes": {},
                "error_codes": {},
                "spec_schema": {},
            }
        )

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"status": "unavailable", "checks": {"database": "away"}}, 503)

    def app(self) -> Starlette:
        """The routes."""
        job = "/v1/jobs/{job_id}"
        return Starlette(
            routes=[
                Route("/v1/jobs", self.jobs, methods=["GET", "POST"]),
                Route(job, self.read_job),
                Route("/v1/{kind}/{id}", self.delete, methods=["DELETE"]),
                Route(f"{job}/retry", self.retry, methods=["POST"]),
                Route(f"{job}/cancel", self.cancel, methods=["POST"]),
                Route(f"{job}/events", self.events),
                Route(f"{job}/layers", self.layers),
                Route(f"{job}/report", self.report),
                Route(f"{job}/artifacts", self.artifacts),
                Route("/v1/models", self.model, methods=["POST"]),
                Route("/v1/artifacts/{artifact_id}/content", self.content),
                Route("/v1/capabilities", self.capabilities),
                Route("/v1/health/ready", self.ready),
            ]
        )


def answer(resource: Any) -> dict[str, Any]:
    """A resource as JSON."""
    return dict(resource.model_dump(mode="json"))


def problem_answer(error: ProblemError) -> Response:
    """A refusal as the service writes it."""
    return JSONResponse(answer(error.problem("req_test")), error.status, media_type="application/problem+json")


class Running:
    """The stub behind a real socket, in a thread of its own."""

    def __init__(self, stub: StubService) -> None:
        config = uvicorn.Config(stub.app(), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> str:
        """Start, and return the URL."""
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        """Stop and wait."""
        self.server.should_exit = True
        self.thread.join(5)
