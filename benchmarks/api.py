"""How many times per second does the service answer GET /v1/jobs/{id}?

It is compared with a bare FastAPI route that does the same SELECT through SQLAlchemy: one uvicorn process each, the
same database, the same few connections, rounds in turn. Limit: at least 0.6 of the bare route's answers per second, for
jobs that run and for jobs that wait, whose place in the queue is told too.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.databases import KINDS, databases
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.queued import add_model, fill
from benchmarks.requests_per_second import get, measure
from service.contract.keys import new_api_key
from service.store.keys import insert_key
from service.store.session import Database

SHARE_MIN = 0.6
WAITING, WAITING_QUICK = 1000, 20
RUNNING = 50
READ = 40  # different jobs are asked for in turn
CONNECTIONS = 8
ROUNDS, ROUNDS_QUICK = 20, 1
SECONDS, SECONDS_QUICK = 0.35, 0.1  # short turns: what else the machine does meets both alike
STATES = ("running", "queued")
SERVERS = ("bare", "ours")
NO_BROKER = "redis://127.0.0.1:1/0"  # reading jobs asks no broker


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("api", __doc__)
    options.add_argument("--rounds", type=int, help=f"of each way  [default: {ROUNDS}]")
    given = options.parse_args(arguments)
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    seconds = SECONDS_QUICK if given.quick else SECONDS
    waiting = WAITING_QUICK if given.quick else WAITING
    kinds = ("sqlite",) if given.quick else KINDS
    samples: list[Sample] = []
    limits: list[Limit] = []
    with tempfile.TemporaryDirectory(prefix="rankpress-api-") as name, databases(Path(name), kinds, "main") as stores:
        for kind in kinds:
            key, jobs = prepare(stores[kind, "main"], waiting)
            rates = compare(Path(name) / kind, stores[kind, "main"].url, key, jobs, rounds=rounds, seconds=seconds)
            for state in STATES:
                both = {server: Sample(f"{kind}, {state}: {server}", rates[server, state], "1/s") for server in SERVERS}
                samples += both.values()
                share = both["ours"].median / both["bare"].median
                limits.append(Limit(f"{kind}, {state}: ours / bare", share, SHARE_MIN, at_least=True))
    facts = {"waiting_jobs": waiting, "connections": CONNECTIONS, "seconds_each": seconds}
    return conclude("api", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def prepare(database: Database, waiting: int) -> tuple[str, dict[str, list[str]]]:
    """Jobs that run and jobs that wait; returns a key, and some ids of each state."""
    key = new_api_key()
    with database.write() as session:
        insert_key(session, key, "default", "benchmark")
    model_id = add_model(database)
    running = fill(database, model_id, RUNNING, state="running")
    queued = fill(database, model_id, waiting)
    step = max(1, waiting // READ)
    return key, {"running": running[:READ], "queued": queued[::step][:READ]}


def compare(
    folder: Path, url: str, key: str, jobs: dict[str, list[str]], *, rounds: int, seconds: float
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Answers per second of each server for jobs of each state, in turn."""
    rates: dict[tuple[str, str], list[float]] = {(server, state): [] for server in SERVERS for state in STATES}
    requests = {state: [get(f"/v1/jobs/{job_id}", key) for job_id in jobs[state]] for state in STATES}
    with ExitStack() as stack:
        ports = {server: stack.enter_context(served(server, url, folder / server)) for server in SERVERS}
        for number in range(rounds + 1):
            say(f"{url.partition(':')[0]}: round {number} of {rounds}" + ("" if number else " (to warm up)"))
            for (server, state), found in rates.items():
                rate = measure(ports[server], requests[state], connections=CONNECTIONS, seconds=seconds)
                if number:
                    found.append(rate)
    return {way: tuple(found) for way, found in rates.items()}


@contextmanager
def served(server: str, url: str, data_dir: Path, broker_url: str = NO_BROKER) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    data_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.api_servers", server, url, str(data_dir), broker_url]
    log_path = data_dir / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=Path(__file__).parent.parent)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise SystemExit(f"the server did not start:\n{log_path.read_text(encoding='utf-8')}")
        time.sleep(0.5)  # the port is taken before the application is up
        yield int(said)
    finally:
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    sys.exit(main())
