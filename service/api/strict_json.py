"""JSON from outside, read so that whatever passes can be stored and shown again."""

import json
from typing import Any, NoReturn

from service.contract.errors import ErrorCode, FieldError, ProblemError

MAX_DEPTH = 32
_BIGGEST_INTEGER = 2**63 - 1
_INTEGER_DIGITS = 19  # of the biggest; more are not even turned into a number


class _RefusedError(ValueError):
    pass


def load_json(raw: bytes, what: str, code: ErrorCode = ErrorCode.REQUEST_INVALID) -> Any:
    """Read a JSON document, or refuse it with the reason and the place.

    Refused beside what is no JSON: keys that stand twice, NaN and infinities, integers beyond 64 bits, more than 32
    levels, NUL and lone surrogates: each of them means different things to different readers.
    """
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_small_int,
            parse_float=_finite_float,
        )
        _check(value)
    except UnicodeDecodeError as error:
        raise _refusal(code, f"{what} must be UTF-8; byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        found = "nothing" if not raw.strip() else f"an error in line {error.lineno}, column {error.colno}: {error.msg}"
        raise _refusal(code, f"{what} must be JSON; found {found}") from None
    except _RefusedError as error:
        raise _refusal(code, f"{what}: {error}") from None
    except RecursionError:
        raise _refusal(code, f"{what}: objects and lists may be nested {MAX_DEPTH} levels deep; found more") from None
    return value


def _refusal(code: ErrorCode, detail: str) -> ProblemError:
    return ProblemError(code, detail, errors=[FieldError(pointer="", code="json", message=detail)])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedError(f"the key {twice[:100]!r} stands twice in one object; keep one")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not JSON; give a number")


def _small_int(text: str) -> int:
    if len(text.lstrip("-")) > _INTEGER_DIGITS:
        raise _RefusedError(f"integers are at most {_BIGGEST_INTEGER}; found one of {len(text)} digits")
    number = int(text)
    if abs(number) > _BIGGEST_INTEGER:
        raise _RefusedError(f"integers are at most {_BIGGEST_INTEGER}; found {number}")
    return number


def _finite_float(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise _RefusedError(f"the number {text[:40]} is too large for a double")
    return value


def _check(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise _RefusedError(f"objects and lists may be nested {MAX_DEPTH} levels deep; found more")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)


def _check_text(text: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _RefusedError("texts must not hold NUL or half of a surrogate pair")
