"""`doctor`: looks at everything the service stands on, and says what to do about what is not well."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.composition import data_dir_option, extras, open_database, read_settings, require_schema
from service.cli.connection import json_option
from service.cli.exits import ExitCode
from service.cli.output import print_json

if TYPE_CHECKING:
    from service.checks.finding import Finding
    from worker.gpus import Gpu

_COLORS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}


@click.command()
@click.option("--queue", "queues", multiple=True, type=click.Choice(["gpu", "cpu"]), help="Queue to be served here.")
@click.option("--worker", "worker_alone", is_flag=True, help="Only: is this machine's worker alive? For health checks.")
@data_dir_option
@json_option
def doctor(queues: tuple[str, ...], worker_alone: bool, data_dir: Path | None, as_json: bool) -> int:
    """Look at settings, database, schema, clock, keys, broker, store of files, disk, memory and GPUs.

    Each check is ok, warning, failed or skipped, and says what to do. Exit code 1 if one has failed.
    """
    with extras("doctor", "api"):
        given: dict[str, object] = {}
        if queues:
            given["worker_queues"] = ",".join(queues)
        if data_dir is not None:
            given["data_dir"] = data_dir
        findings = _this_worker(data_dir) if worker_alone else _everything(given)
        return _told(findings, as_json=as_json)


def _everything(given: dict[str, object]) -> "Iterator[Finding]":
    from service.checks.configuration import check_settings
    from service.checks.examination import examine

    settings, findings = check_settings(os.environ, given)
    yield from findings
    if settings is not None:
        yield from examine(settings, _gpus())


def _this_worker(data_dir: Path | None) -> "Iterator[Finding]":
    from service.checks.shared import check_this_worker

    settings = read_settings(data_dir=data_dir)
    with open_database(settings) as database:
        require_schema(database)
        yield check_this_worker(settings, database)


def _gpus() -> "Sequence[Gpu] | None":
    """The GPUs that a worker would see; None where its packages are not installed."""
    try:
        from worker.gpus import visible_gpus
    except ModuleNotFoundError:
        return None
    return visible_gpus()


def _told(findings: "Iterable[Finding]", *, as_json: bool) -> ExitCode:
    """Show each finding as it comes, or all of them as one document."""
    all_findings = []
    for finding in findings:
        all_findings.append(finding)
        if not as_json:
            status = click.style(f"{finding.status.value:8}", fg=_COLORS[finding.status.value])
            click.echo(f"{status} {finding.name:9} {finding.found}")
            if finding.advice:
                click.echo(f"{'':18} → {finding.advice}")
    well = all(finding.status.value != "failed" for finding in all_findings)
    if as_json:
        print_json({"ok": well, "checks": [finding.document() for finding in all_findings]})
    return ExitCode.DONE if well else ExitCode.FAILED
