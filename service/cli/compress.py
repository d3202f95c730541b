"""`compress`, and its parts `submit`, `watch` and `fetch`."""

from pathlib import Path
from typing import Any

import click

from service.cli import spec_options
from service.cli.connection import connect, json_option, url_option
from service.cli.exits import ExitCode
from service.cli.junit import write_junit
from service.cli.outcome import Outcome
from service.cli.output import note, print_json, print_problem
from service.cli.results import report_text
from service.cli.trip import Trip, compressed_model, full_report
from service.client import Client
from service.contract import ids
from service.contract.resources import JobResource
from service.contract.states import JobState

data_option = click.option(
    "--data", help="Inputs and targets: a .npz, .safetensors or WebDataset .tar file, or a dataset's id."
)
objective_option = click.option(
    "--objective", help="A loss of your own: a TorchScript module with loss(outputs, batch), or its id."
)
name_option = click.option("--name", help="A name for the job.")
output_option = click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the small model goes.")
timeout_option = click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0), help="Seconds to wait.")
junit_option = click.option("--junit", type=click.Path(path_type=Path), help="Write the outcome as JUnit XML.")
report_option = click.option("--report", "report_file", type=click.Path(path_type=Path), help="Write the report, JSON.")


@click.command()
@click.argument("model")
@data_option
@objective_option
@spec_options.spec_options
@name_option
@output_option
@timeout_option
@junit_option
@report_option
@json_option
@url_option
def compress(model: str, data: str | None, output: Path | None, **parameters: Any) -> int:
    """Compress MODEL: upload, follow, download.

    MODEL is a TorchScript file, or the id of a model that was uploaded.
    """
    output = output or _default_output(model)
    as_json, junit, report_file = (parameters[name] for name in ("as_json", "junit", "report_file"))
    _check_places(output, junit, report_file)
    _check_inputs(model, data, parameters["objective"])
    outcome = Outcome(label=Path(model).name)
    with connect(parameters["url"]) as client:
        trip = Trip(client, outcome, parameters["timeout_seconds"])
        trip.run(lambda: _start(client, model, data, parameters), output)
    return finish(outcome, as_json=as_json, junit=junit, report_file=report_file)


@click.command()
@click.argument("model")
@data_option
@objective_option
@spec_options.spec_options
@name_option
@json_option
@url_option
def submit(model: str, data: str | None, **parameters: Any) -> int:
    """Start a job on MODEL and print its id, without waiting."""
    _check_inputs(model, data, parameters["objective"])
    with connect(parameters["url"]) as client:
        job = _start(client, model, data, parameters)
    if parameters["as_json"]:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(job.id)
    return ExitCode.DONE


@click.command()
@click.argument("job_id")
@timeout_option
@junit_option
@report_option
@json_option
@url_option
def watch(
    job_id: str,
    timeout_seconds: float | None,
    junit: Path | None,
    report_file: Path | None,
    *,
    as_json: bool,
    url: str,
) -> int:
    """Follow a job to its end and show the result.

    Interrupting the command leaves the job alone.
    """
    _check_places(junit, report_file)
    outcome = Outcome(label=job_id)
    with connect(url) as client:
        Trip(client, outcome, timeout_seconds, cancel_on_interrupt=False).run(lambda: client.job(job_id), None)
    return finish(outcome, as_json=as_json, junit=junit, report_file=report_file)


@click.command()
@click.argument("job_id")
@output_option
@report_option
@json_option
@url_option
def fetch(job_id: str, output: Path | None, report_file: Path | None, *, as_json: bool, url: str) -> int:
    """Download what a finished job made."""
    _check_places(output, report_file)
    with connect(url) as client:
        job = client.job(job_id)
        if job.state is not JobState.SUCCEEDED:
            note(f"job {job_id} is {job.state.value}; only a job that succeeded has something to fetch")
            return ExitCode.FAILED
        artifact = compressed_model(client.artifacts(job_id))
        path = output or Path(artifact.name).name
        client.download(artifact, path)
        if report_file is not None:
            report_file.write_text(full_report(client, job_id).model_dump_json(indent=2), encoding="utf-8")
    if as_json:
        print_json({"artifact": artifact.model_dump(mode="json") | {"path": str(path)}})
    else:
        click.echo(f"{path}  {artifact.bytes:,} bytes  SHA-256 {artifact.sha256}")
    return ExitCode.DONE


def _start(client: Client, model: str, data: str | None, parameters: dict[str, Any]) -> JobResource:
    sizes = spec_options.sizes_of(parameters)
    spec = spec_options.spec_from(parameters["spec_file"], sizes, parameters["lambda_"], parameters["seed"])
    return client.submit(spec, model=model, data=data, objective=parameters["objective"], name=parameters["name"])


def finish(outcome: Outcome, *, as_json: bool, junit: Path | None, report_file: Path | None) -> int:
    """Show and write down how a trip ended; returns the exit code."""
    if junit is not None:
        write_junit(junit, outcome)
    if report_file is not None and outcome.report is not None:
        report_file.write_text(outcome.report.model_dump_json(indent=2), encoding="utf-8")
    if as_json:
        print_json(outcome.as_json())
    elif outcome.report is not None:
        click.echo(report_text(outcome.report))
    if outcome.problem is not None:
        print_problem(outcome.problem)
    if outcome.job is not None:
        _say_how_to_go_on(outcome, outcome.job)
    return outcome.exit_code


def _say_how_to_go_on(outcome: Outcome, job: JobResource) -> None:
    if outcome.path is not None:
        note(f"\nwrote {outcome.path}; more with: rankpress inspect {job.id}")
    elif not job.state.terminal:
        note(f"the job goes on: rankpress watch {job.id}, or rankpress cancel {job.id}")
    elif job.state is JobState.CANCELED:
        note(f"job {job.id} was canceled")
    elif job.state is JobState.SUCCEEDED:
        note(f"\nfetch the model with: rankpress fetch {job.id}")


def _default_output(model: str) -> Path:
    if ids.is_id(model, ids.MODEL):
        return Path(f"{model}.small.pt")
    path = Path(model)
    return path.with_name(f"{path.stem}.small.pt")


def _check_inputs(model: str, data: str | None, objective: str | None) -> None:
    for what, reference, prefix in (
        ("model", model, ids.MODEL),
        ("data", data, ids.DATASET),
        ("objective", objective, ids.MODEL),
    ):
        if reference is not None and not ids.is_id(reference, prefix) and not Path(reference).is_file():
            raise click.UsageError(f"the {what} must be a file or an uploaded id; there is no file {reference!r}")


def _check_places(*paths: Path | None) -> None:
    """Refuse before the work what could only fail after it."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise click.UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise click.UsageError(f"cannot write {path}: it is a folder")
