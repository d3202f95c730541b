"""The closed list of problem codes, the RFC 9457 problem object, and the one exception that carries it."""

from collections.abc import Sequence
from enum import StrEnum
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict

PROBLEM_TYPE_PREFIX = "/problems/"


class ErrorCode(StrEnum):
    """Every code a problem or a failed job can carry; the list is closed so that clients can switch on it."""

    # A request that cannot be served.
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_INVALID = "REQUEST_INVALID"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    TOO_LARGE = "TOO_LARGE"
    RANGE_NOT_SATISFIABLE = "RANGE_NOT_SATISFIABLE"
    IDEMPOTENCY_IN_FLIGHT = "IDEMPOTENCY_IN_FLIGHT"
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    STATE_CONFLICT = "STATE_CONFLICT"
    UNAVAILABLE = "UNAVAILABLE"
    STORAGE_FULL = "STORAGE_FULL"
    # A spec that cannot be run.
    SPEC_INVALID = "SPEC_INVALID"
    TERMS_NOT_DISTINCT = "TERMS_NOT_DISTINCT"
    SIZE_MISSING = "SIZE_MISSING"
    EXAMPLE_INPUTS_MISSING = "EXAMPLE_INPUTS_MISSING"
    # A model or dataset that cannot be used.
    MODEL_CORRUPT = "MODEL_CORRUPT"
    MODEL_NOT_TORCHSCRIPT = "MODEL_NOT_TORCHSCRIPT"
    MODEL_REJECTED_UNSAFE = "MODEL_REJECTED_UNSAFE"
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"
    NO_COMPRESSIBLE_LAYER = "NO_COMPRESSIBLE_LAYER"
    MODEL_RAISED = "MODEL_RAISED"
    INPUT_SHAPE_MISMATCH = "INPUT_SHAPE_MISMATCH"
    DATASET_INVALID = "DATASET_INVALID"
    OBJECTIVE_INVALID = "OBJECTIVE_INVALID"
    OBJECTIVE_RAISED = "OBJECTIVE_RAISED"
    # A job that could not end well.
    CONSTRAINT_UNREACHABLE = "CONSTRAINT_UNREACHABLE"
    VERIFICATION_FAILED = "VERIFICATION_FAILED"
    DIVERGED = "DIVERGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TIMEOUT = "TIMEOUT"
    WORKER_LOST = "WORKER_LOST"
    DEVICE_UNAVAILABLE = "DEVICE_UNAVAILABLE"
    INTERNAL = "INTERNAL"


_STATUS_AND_TITLE: dict[ErrorCode, tuple[HTTPStatus, str]] = {
    ErrorCode.UNAUTHENTICATED: (HTTPStatus.UNAUTHORIZED, "The API key is missing or wrong"),
    ErrorCode.NOT_FOUND: (HTTPStatus.NOT_FOUND, "There is no such resource"),
    ErrorCode.METHOD_NOT_ALLOWED: (HTTPStatus.METHOD_NOT_ALLOWED, "The resource does not answer this method"),
    ErrorCode.REQUEST_INVALID: (HTTPStatus.UNPROCESSABLE_ENTITY, "The request is not valid"),
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The content type is not accepted here"),
    ErrorCode.TOO_LARGE: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is larger than the limit"),
    ErrorCode.RANGE_NOT_SATISFIABLE: (HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "The range lies outside the file"),
    ErrorCode.IDEMPOTENCY_IN_FLIGHT: (HTTPStatus.CONFLICT, "The first request with this key is still in flight"),
    ErrorCode.IDEMPOTENCY_MISMATCH: (HTTPStatus.UNPROCESSABLE_ENTITY, "The key was used for another request"),
    ErrorCode.STATE_CONFLICT: (HTTPStatus.CONFLICT, "The resource's state does not allow this"),
    ErrorCode.UNAVAILABLE: (HTTPStatus.SERVICE_UNAVAILABLE, "The service cannot answer now"),
    ErrorCode.STORAGE_FULL: (HTTPStatus.INSUFFICIENT_STORAGE, "There is no room left to store this"),
    ErrorCode.SPEC_INVALID: (HTTPStatus.UNPROCESSABLE_ENTITY, "The job spec is not valid"),
    ErrorCode.TERMS_NOT_DISTINCT: (HTTPStatus.UNPROCESSABLE_ENTITY, "Two terms of a sum have the same reshape"),
    ErrorCode.SIZE_MISSING: (HTTPStatus.UNPROCESSABLE_ENTITY, "The spec does not say how small the result must be"),
    ErrorCode.EXAMPLE_INPUTS_MISSING: (HTTPStatus.UNPROCESSABLE_ENTITY, "Without data the spec needs example_inputs"),
    ErrorCode.MODEL_CORRUPT: (HTTPStatus.UNPROCESSABLE_ENTITY, "The model file is damaged or incomplete"),
    ErrorCode.MODEL_NOT_TORCHSCRIPT: (HTTPStatus.UNPROCESSABLE_ENTITY, "The file is not a TorchScript archive"),
    ErrorCode.MODEL_REJECTED_UNSAFE: (HTTPStatus.UNPROCESSABLE_ENTITY, "The model holds code that is not allowed"),
    ErrorCode.MODEL_UNSUPPORTED: (HTTPStatus.UNPROCESSABLE_ENTITY, "The model uses something not supported"),
    ErrorCode.NO_COMPRESSIBLE_LAYER: (HTTPStatus.UNPROCESSABLE_ENTITY, "No layer of the model can be compressed"),
    ErrorCode.MODEL_RAISED: (HTTPStatus.UNPROCESSABLE_ENTITY, "The model raised an error in forward"),
    ErrorCode.INPUT_SHAPE_MISMATCH: (HTTPStatus.UNPROCESSABLE_ENTITY, "The data does not fit the model"),
    ErrorCode.DATASET_INVALID: (HTTPStatus.UNPROCESSABLE_ENTITY, "The dataset cannot be used"),
    ErrorCode.OBJECTIVE_INVALID: (HTTPStatus.UNPROCESSABLE_ENTITY, "The objective's module cannot be used as a loss"),
    ErrorCode.OBJECTIVE_RAISED: (HTTPStatus.UNPROCESSABLE_ENTITY, "The objective's module raised an error"),
    ErrorCode.CONSTRAINT_UNREACHABLE: (HTTPStatus.UNPROCESSABLE_ENTITY, "The budget cannot be reached"),
    ErrorCode.VERIFICATION_FAILED: (HTTPStatus.UNPROCESSABLE_ENTITY, "The artifact does not answer like the network"),
    ErrorCode.DIVERGED: (HTTPStatus.UNPROCESSABLE_ENTITY, "Training diverged"),
    ErrorCode.OUT_OF_MEMORY: (HTTPStatus.UNPROCESSABLE_ENTITY, "The job needed more memory than it may use"),
    ErrorCode.TIMEOUT: (HTTPStatus.UNPROCESSABLE_ENTITY, "The job ran past its deadline"),
    ErrorCode.WORKER_LOST: (HTTPStatus.UNPROCESSABLE_ENTITY, "The job's workers died without progress"),
    ErrorCode.DEVICE_UNAVAILABLE: (HTTPStatus.UNPROCESSABLE_ENTITY, "The device asked for is not there"),
    ErrorCode.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "The service met an error of its own"),
}


class FieldError(BaseModel):
    """One place of the request that is wrong: `pointer` is a JSON pointer into the spec or body."""

    model_config = ConfigDict(extra="forbid")

    pointer: str
    code: str
    message: str


class Problem(BaseModel):
    """An RFC 9457 problem; a failed job carries the same object."""

    model_config = ConfigDict(extra="forbid")

    type: str
    title: str
    status: int
    detail: str
    code: ErrorCode
    request_id: str | None = None
    errors: list[FieldError] = []


class ProblemError(Exception):
    """The exception that every layer raises for what the user can mend; the edges render it as a `Problem`."""

    def __init__(self, code: ErrorCode, detail: str, *, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = list(errors)

    @property
    def status(self) -> int:
        """The HTTP status that belongs to the code."""
        return int(_STATUS_AND_TITLE[self.code][0])

    def problem(self, request_id: str | None = None) -> Problem:
        """Render as the object that goes on the wire."""
        status, title = _STATUS_AND_TITLE[self.code]
        slug = self.code.value.lower().replace("_", "-")
        return Problem(
            type=f"{PROBLEM_TYPE_PREFIX}{slug}",
            title=title,
            status=int(status),
            detail=self.detail,
            code=self.code,
            request_id=request_id,
            errors=self.errors,
        )


def title_of(code: ErrorCode) -> str:
    """The one-line meaning of a code, for the documentation of problems."""
    return _STATUS_AND_TITLE[code][1]
