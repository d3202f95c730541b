"""The trip of one job as a command makes it: submit, follow, fetch."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.cli import exits
from service.cli.exits import ExitCode
from service.cli.outcome import Outcome
from service.cli.output import note
from service.cli.progress import JobBar
from service.client import Client, ClientError, ServiceProblem
from service.contract.errors import ErrorCode, ProblemError
from service.contract.report import Report
from service.contract.resources import ArtifactResource, JobResource
from service.contract.states import JobState

CANCEL_SECONDS = 20.0  # how long an interrupted command waits to see the job end


@dataclass
class Trip:
    """One job on its way."""

    client: Client
    outcome: Outcome
    timeout_seconds: float | None = None
    cancel_on_interrupt: bool = True

    def run(self, start: Callable[[], JobResource], output: Path | None) -> Outcome:
        """Go as far as it goes; whatever ends the trip is told by the outcome."""
        outcome, started = self.outcome, time.monotonic()
        try:
            outcome.job = start()
            outcome.job = self.follow(outcome.job)
            outcome.exit_code, outcome.problem = exits.of_job(outcome.job), outcome.job.problem
            if outcome.job.state is JobState.SUCCEEDED:
                self.fetch(outcome.job.id, output)
        except (ClientError, ProblemError, OSError) as error:
            outcome.exit_code, outcome.problem = exits.of_error(error)
        except KeyboardInterrupt:
            outcome.exit_code = ExitCode.FAILED
            note("interrupted")
        outcome.seconds = time.monotonic() - started
        return outcome

    def follow(self, job: JobResource) -> JobResource:
        """Show the job until it ends; an interrupt asks the service to cancel it."""
        self.outcome.job = job
        try:
            with JobBar() as bar:
                return self.client.wait(job.id, timeout_seconds=self.timeout_seconds, on_update=self._shown(bar))
        except KeyboardInterrupt:
            if not self.cancel_on_interrupt:
                raise
            note(f"canceling {job.id} …")
            with suppress(ServiceProblem):  # it may have ended just now
                self.client.cancel(job.id)
            return self.client.wait(job.id, timeout_seconds=CANCEL_SECONDS)

    def fetch(self, job_id: str, output: Path | None) -> None:
        """Take the report, and the TorchScript artifact if there is a place for it."""
        outcome = self.outcome
        outcome.report = full_report(self.client, job_id)
        budget = outcome.report.budget
        if budget is not None and budget.reached > budget.limit:
            outcome.exit_code = ExitCode.BUDGET_MISSED
        if output is not None:
            outcome.artifact = compressed_model(self.client.artifacts(job_id))
            outcome.sha256 = self.client.download(outcome.artifact, output)
            outcome.path = output

    def _shown(self, bar: JobBar) -> Callable[[JobResource], None]:
        def show(job: JobResource) -> None:
            self.outcome.job = job
            bar.show(job)

        return show


def full_report(client: Client, job_id: str) -> Report:
    """The report with the layer plan in it, wherever the service keeps the plan."""
    report = client.report(job_id)
    if not report.layers:
        report.layers = client.layers(job_id).items
    return report


def compressed_model(artifacts: list[ArtifactResource]) -> ArtifactResource:
    """The TorchScript file among a job's artifacts."""
    for artifact in artifacts:
        if artifact.format == "torchscript":
            return artifact
    raise ProblemError(ErrorCode.NOT_FOUND, "the job has no TorchScript artifact; it may not have finished")
