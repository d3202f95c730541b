"""HTTP with the service: one connection pool, problems as exceptions, and retries where they are harmless."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from service.client.errors import ServiceProblem, ServiceUnavailable
from service.contract.errors import ErrorCode, Problem, ProblemError

RETRIED_STATUSES = frozenset({502, 503, 504})
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
RETRY_AFTER_SECONDS_MAX = 10.0

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently an idempotent call is tried again."""

    attempts: int = 5
    first_pause_seconds: float = 0.2
    pause_seconds_max: float = 5.0

    def pause_seconds(self, attempt: int, response: httpx2.Response | None = None) -> float:
        """The pause after this attempt, counted from 0: exponential, with jitter, or what the service asks for."""
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        if asked.isdigit():
            return min(float(asked), RETRY_AFTER_SECONDS_MAX)
        longest = min(self.first_pause_seconds * 2.0**attempt, self.pause_seconds_max)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret


class Transport:
    """One service at one address, with one key."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout_seconds: float,
        retries: Retries,
        http_transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.retries = retries
        url = _parsed(self.base_url)
        headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self.http = httpx2.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, 10.0)),
            trust_env=url.host not in LOOPBACK_HOSTS,  # a proxy set for the outside never sees this machine's own calls
            transport=http_transport,
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        idempotent: bool,
        arguments: Callable[[], Mapping[str, Any]] | None = None,
    ) -> httpx2.Response:
        """Send, and send again while that is harmless; `arguments` makes the body afresh for each attempt."""
        for attempt in range(self.retries.attempts if idempotent else 1):
            last = not idempotent or attempt + 1 == self.retries.attempts
            try:
                response = self.http.request(method, path, **(arguments() if arguments else {}))
            except httpx2.TransportError as error:
                if last:
                    raise self.unavailable(error) from error
                time.sleep(self.retries.pause_seconds(attempt))
                continue
            if attempt and method == "DELETE" and response.status_code == 404:
                return response  # the attempt before, whose answer was lost, has done it
            if last or not _worth_another_try(response):
                return self.checked(response)
            time.sleep(self.retries.pause_seconds(attempt, response))
        raise AssertionError("the last attempt returns or raises")

    def read(self, resource: type[R], method: str, path: str, **options: Any) -> R:
        """Send, and read the answer as a resource of the contract."""
        response = self.request(method, path, **options)
        try:
            return resource.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceUnavailable(
                f"{self.base_url}{path} answered {response.status_code}, but not with a {resource.__name__}: "
                "is this address a Rankpress service of the same version?"
            ) from error

    def checked(self, response: httpx2.Response) -> httpx2.Response:
        """Raise the problem that the response carries, if it carries one."""
        if response.is_success:
            return response
        raise self.refusal(response)

    def refusal(self, response: httpx2.Response) -> ServiceProblem | ServiceUnavailable:
        """The exception that an unsuccessful response stands for."""
        try:
            return ServiceProblem(Problem.model_validate_json(response.content))
        except ValidationError:
            pass
        if response.status_code == 401:
            return ServiceProblem(ProblemError(ErrorCode.UNAUTHENTICATED, "the API key was refused").problem())
        return ServiceUnavailable(
            f"{self.base_url} answered {response.status_code} without a problem description: "
            "is this address a Rankpress service?"
        )

    def unavailable(self, error: Exception) -> ServiceUnavailable:
        """The exception for a connection that failed."""
        said = str(error) or type(error).__name__
        return ServiceUnavailable(
            f"no service answers at {self.base_url} ({said}); is `rankpress serve` running there?"
        )


def _parsed(base_url: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"the service's URL must look like http://127.0.0.1:8080; found {base_url!r}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"the service's URL must begin with http:// or https://; found {base_url!r}")
    return url


def _worth_another_try(response: httpx2.Response) -> bool:
    if response.status_code in RETRIED_STATUSES:
        return True
    return response.status_code == 409 and ErrorCode.IDEMPOTENCY_IN_FLIGHT.value in response.text
