"""What a call of the client can raise."""

from service.contract.errors import Problem


class ClientError(Exception):
    """Base of everything the client raises by itself."""


class ServiceProblem(ClientError):  # noqa: N818 - the word on the wire
    """The service answered, and refused; `problem` says what it expected, what it found and what to change."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.code.value}: {problem.detail}")
        self.problem = problem


class ServiceUnavailable(ClientError):  # noqa: N818 - as the standard library's own ConnectionRefused
    """Nothing that speaks the service's language answered at this address."""


class DownloadDamagedError(ClientError):
    """The bytes that arrived do not have the SHA-256 that the service recorded."""


class WaitTimeout(ClientError):  # noqa: N818 - a timeout is no error of the job
    """The job was not finished in the time that the caller gave it; it goes on."""
