"""The command itself: its groups of commands, and how each end becomes an exit code."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import click

from service.cli import about, again, compress, doctor, exits, jobs, keys, serve, worker, workers
from service.cli.exits import ExitCode
from service.cli.output import note, print_json, print_problem
from service.client import ClientError
from service.contract.errors import ErrorCode, Problem, ProblemError


def _version() -> str:
    try:
        return version("rankpress")
    except PackageNotFoundError:
        return "unknown"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(_version(), prog_name="rankpress")
def cli() -> None:
    """Compress trained TorchScript networks.

    Exit codes: 0 done, 1 failed or canceled, 2 usage or a refused request, 3 budget missed, 4 timeout,
    5 no service there.
    """


for _command in (
    serve.serve,
    worker.worker,
    compress.compress,
    compress.submit,
    compress.watch,
    compress.fetch,
    jobs.cancel,
    again.retry,
    again.delete,
    jobs.jobs,
    jobs.inspect,
    workers.workers,
    serve.migrate,
    doctor.doctor,
    keys.keys,
    about.capabilities,
    about.schema,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(int(run(given)))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code; with `--json` a refusal too is one JSON document."""
    as_json = "--json" in arguments
    try:
        ended = cli.main(args=arguments, prog_name="rankpress", standalone_mode=False)
        return int(ended) if isinstance(ended, int) else ExitCode.DONE
    except click.ClickException as error:
        error.show()
        return _refused(
            ExitCode.USAGE, ProblemError(ErrorCode.REQUEST_INVALID, error.format_message()).problem(), as_json
        )
    except (ClientError, ProblemError, OSError) as error:
        code, problem = exits.of_error(error)
        print_problem(problem)
        return _refused(code, problem, as_json)
    except (click.Abort, KeyboardInterrupt):
        note("interrupted")
        return ExitCode.FAILED


def _refused(code: ExitCode, problem: Problem, as_json: bool) -> ExitCode:
    if as_json:
        print_json({"exit_code": int(code), "problem": problem.model_dump(mode="json")})
    return code
