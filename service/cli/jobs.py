"""`jobs`, `inspect` and `cancel`."""

from itertools import islice

import click

from service.cli.connection import connect, json_option, url_option
from service.cli.exits import ExitCode
from service.cli.output import print_json, print_problem
from service.cli.progress import numbers_text, phase_text
from service.cli.results import history_table, layer_table, report_text
from service.cli.tables import percent, table
from service.contract.resources import JobResource, LayerPage
from service.contract.states import JobState


@click.command()
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@json_option
@url_option
def jobs(state: str | None, limit: int, *, as_json: bool, url: str) -> int:
    """List jobs."""
    with connect(url) as client:
        found = list(islice(client.jobs(state=state, page_size=min(limit, 100)), limit))
    if as_json:
        print_json({"items": [job.model_dump(mode="json") for job in found]})
    else:
        head = ("job", "name", "created", "state", "", "MACs", "difference")
        click.echo(table(head, [_job_line(job) for job in found]))
    return ExitCode.DONE


def _job_line(job: JobResource) -> tuple[str, ...]:
    result = job.result
    said = job.problem.code.value if job.problem else numbers_text(job)
    difference = result.metric_difference if result else None
    return (
        job.id,
        job.name or "",
        f"{job.created_at:%Y-%m-%d %H:%M}",
        phase_text(job),
        said,
        percent(result.macs_fraction) if result else "",
        f"{difference:+.4g}" if difference is not None else "",
    )


@click.command()
@click.argument("job_id")
@json_option
@url_option
def cancel(job_id: str, *, as_json: bool, url: str) -> int:
    """Ask the service to stop a job."""
    with connect(url) as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(f"{job.id}: {phase_text(job)}")
    return ExitCode.DONE


@click.command()
@click.argument("job_id")
@click.option("--history", is_flag=True, help="Also every rank configuration that stood on the way.")
@json_option
@url_option
def inspect(job_id: str, *, history: bool, as_json: bool, url: str) -> int:
    """Show a job's state, layer plan and report."""
    with connect(url) as client:
        job = client.job(job_id)
        layers = client.layers(job_id, history=history)
        report = client.report(job_id) if job.state is JobState.SUCCEEDED else None
    if as_json:
        print_json(
            {
                "job": job.model_dump(mode="json"),
                "layers": layers.model_dump(mode="json"),
                "report": report.model_dump(mode="json") if report else None,
            }
        )
        return ExitCode.DONE
    click.echo(f"{job.id}  {job.name or ''}  {phase_text(job)}  {numbers_text(job)}".rstrip())
    click.echo()
    click.echo(layer_table(layers.items) or "no layer plan yet")
    if report is not None:
        click.echo()
        click.echo(report_text(report.model_copy(update={"layers": []})))
    _show_history(layers)
    if job.problem is not None:
        print_problem(job.problem)
    return ExitCode.DONE


def _show_history(layers: LayerPage) -> None:
    if layers.history is not None:
        click.echo()
        click.echo(history_table(layers.history))
