"""What the command writes: results on standard output, everything else on standard error."""

import json
from typing import Any

import click

from service.contract.errors import ErrorCode, Problem


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_problem(problem: Problem) -> None:
    """Write a problem and each of its places to standard error."""
    click.echo(f"{click.style('error', fg='red')}: {problem.code.value}: {problem.detail}", err=True)
    said = f"{problem.errors[0].pointer}: {problem.errors[0].message}" if len(problem.errors) == 1 else None
    for item in [] if said is not None and said.removeprefix(": ") in problem.detail else problem.errors:
        click.echo(f"  {item.pointer or '/'}: {item.message}", err=True)
    if problem.code is ErrorCode.UNAUTHENTICATED:
        click.echo(
            "  set RANKPRESS_API_KEY to the service's key; of a service started here it is found by itself", err=True
        )
    if problem.request_id:
        click.echo(f"  request id: {problem.request_id}", err=True)


def note(text: str) -> None:
    """Write a line to standard error."""
    click.echo(text, err=True)
