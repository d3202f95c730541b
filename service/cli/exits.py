"""The exit codes of the command."""

from enum import IntEnum

from service.client import ClientError, ServiceProblem, ServiceUnavailable, WaitTimeout
from service.contract.errors import ErrorCode, Problem, ProblemError
from service.contract.resources import JobResource
from service.contract.states import JobState


class ExitCode(IntEnum):
    """What a script can tell from the command's end."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BUDGET_MISSED = 3
    TIMEOUT = 4
    SERVICE_AWAY = 5


_OF_CODE = {
    ErrorCode.CONSTRAINT_UNREACHABLE: ExitCode.BUDGET_MISSED,
    ErrorCode.TIMEOUT: ExitCode.TIMEOUT,
    ErrorCode.UNAVAILABLE: ExitCode.SERVICE_AWAY,
}


def of_refusal(problem: Problem) -> ExitCode:
    """The exit code for a request that was refused."""
    return _OF_CODE.get(problem.code, ExitCode.USAGE if problem.status < 500 else ExitCode.FAILED)


def of_job(job: JobResource) -> ExitCode:
    """The exit code for a job that has ended."""
    if job.state is JobState.SUCCEEDED:
        return ExitCode.DONE
    return _OF_CODE.get(job.problem.code, ExitCode.FAILED) if job.problem else ExitCode.FAILED


def of_error(error: ClientError | ProblemError | OSError) -> tuple[ExitCode, Problem]:
    """The exit code for a call that raised, and the problem to show."""
    if isinstance(error, ServiceProblem):
        return of_refusal(error.problem), error.problem
    if isinstance(error, ProblemError):
        problem = error.problem()
        return of_refusal(problem), problem
    if isinstance(error, ServiceUnavailable):
        return ExitCode.SERVICE_AWAY, ProblemError(ErrorCode.UNAVAILABLE, str(error)).problem()
    if isinstance(error, WaitTimeout):
        return ExitCode.TIMEOUT, ProblemError(ErrorCode.TIMEOUT, str(error)).problem()
    if isinstance(error, OSError):
        return ExitCode.FAILED, ProblemError(ErrorCode.REQUEST_INVALID, str(error)).problem()
    return ExitCode.FAILED, ProblemError(ErrorCode.VERIFICATION_FAILED, str(error)).problem()
