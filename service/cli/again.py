"""`retry` and `delete`: what can be done with something that has ended."""

import click

from service.cli.compress import finish, timeout_option
from service.cli.connection import connect, json_option, url_option
from service.cli.exits import ExitCode
from service.cli.outcome import Outcome
from service.cli.output import note, print_json
from service.cli.trip import Trip


@click.command()
@click.argument("job_id")
@click.option("--from-start", is_flag=True, help="Do not go on from the job's last checkpoint.")
@click.option("--wait", is_flag=True, help="Follow the new job to its end and show the result.")
@timeout_option
@json_option
@url_option
def retry(job_id: str, timeout_seconds: float | None, *, from_start: bool, wait: bool, as_json: bool, url: str) -> int:
    """Try a failed or canceled job again, as a new job, and print its id.

    It goes on from the last checkpoint if one is kept. Interrupting the command leaves the new job alone.
    """
    with connect(url) as client:
        if wait:
            outcome = Outcome(label=job_id)
            trip = Trip(client, outcome, timeout_seconds, cancel_on_interrupt=False)
            trip.run(lambda: client.retry(job_id, from_start=from_start), None)
            return finish(outcome, as_json=as_json, junit=None, report_file=None)
        job = client.retry(job_id, from_start=from_start)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(job.id)
    return ExitCode.DONE


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@json_option
@url_option
def delete(ids: tuple[str, ...], *, as_json: bool, url: str) -> int:
    """Delete jobs that have ended, models, datasets or artifacts, each by its ID."""
    with connect(url) as client:
        for id_ in ids:
            try:
                client.delete(id_)
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            if not as_json:
                note(f"deleted {id_}")
    if as_json:
        print_json({"deleted": list(ids)})
    return ExitCode.DONE
