"""How a command's job ended: everything that the table, the JSON document and the JUnit file are made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.exits import ExitCode
from service.contract.errors import Problem
from service.contract.report import Report
from service.contract.resources import ArtifactResource, JobResource


@dataclass
class Outcome:
    """The end of a job as the command met it, or as far as it came."""

    label: str
    exit_code: ExitCode = ExitCode.FAILED
    seconds: float = 0.0
    job: JobResource | None = None
    report: Report | None = None
    artifact: ArtifactResource | None = None
    path: Path | None = None
    sha256: str | None = None
    problem: Problem | None = None

    def as_json(self) -> dict[str, Any]:
        """The one document that `--json` prints."""
        artifact = self.artifact.model_dump(mode="json") if self.artifact else None
        if artifact is not None and self.path is not None:
            artifact["path"] = str(self.path)
        return {
            "exit_code": int(self.exit_code),
            "job": self.job.model_dump(mode="json") if self.job else None,
            "report": self.report.model_dump(mode="json") if self.report else None,
            "artifact": artifact,
            "problem": self.problem.model_dump(mode="json") if self.problem else None,
        }
