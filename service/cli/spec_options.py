"""The job spec of a command line: a file, and options that stand above it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from service.contract.errors import ProblemError
from service.contract.spec import parse_spec

F = TypeVar("F", bound=Callable[..., Any])

_SIZES = ("max_macs_fraction", "max_params_fraction", "max_bytes_fraction", "max_macs", "max_params", "max_bytes")
_ONLY_THE_SERVICE_KNOWS = {"term_type", "method_type"}  # codes: a package may be installed there and not here


class _Yaml12Loader(yaml.SafeLoader):
    """YAML as most people write it: `1e-3` is a number, as in YAML 1.2 and JSON."""


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def spec_options(command: F) -> F:
    """Add the options that make up a spec."""
    for option in reversed(
        [
            click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="Job spec, JSON or YAML."),
            click.option("--max-macs-fraction", type=float, help="Multiply-adds of the result over the reference's."),
            click.option("--max-params-fraction", type=float, help="Parameters of the result over the reference's."),
            click.option("--max-bytes-fraction", type=float, help="Bytes of the file over the reference's."),
            click.option("--max-macs", type=int, help="Multiply-adds of the result for one sample."),
            click.option("--max-params", type=int, help="Parameters of the result."),
            click.option("--max-bytes", type=int, help="Bytes of the file."),
            click.option("--lambda", "lambda_", type=float, help="Price per million units of cost, without a budget."),
            click.option("--seed", type=int, help="Seed of everything random in the job."),
        ]
    ):
        command = option(command)
    return command


def spec_from(
    spec_file: Path | None, sizes: dict[str, float | int | None], lambda_: float | None, seed: int | None
) -> dict[str, Any]:
    """Join the file and the options into the document that is sent; a refusal costs no upload.

    What an option says about the size replaces all that the file says about it.
    """
    document = _read(spec_file) if spec_file is not None else {}
    budget = {name: value for name, value in sizes.items() if value is not None}
    if budget or lambda_ is not None:
        document.pop("budget", None)
        method = document.get("method")
        if isinstance(method, dict):
            document["method"] = {name: value for name, value in method.items() if name != "lambda"}
    if budget:
        document["budget"] = budget
    if lambda_ is not None:
        document["method"] = {**(document.get("method") or {}), "lambda": lambda_}
    if seed is not None:
        document["seed"] = seed
    try:
        parse_spec(document)
    except ProblemError as problem:
        if not any(error.code in _ONLY_THE_SERVICE_KNOWS for error in problem.errors):
            raise
    return document


def sizes_of(parameters: dict[str, Any]) -> dict[str, float | int | None]:
    """The budget's options among a command's parameters."""
    return {name: parameters.pop(name) for name in _SIZES}


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise click.UsageError(f"cannot read the spec {path}: {error}") from error
    if not isinstance(document, dict):
        raise click.UsageError(f"the spec {path} must be an object such as {{'budget': …}}")
    return document
