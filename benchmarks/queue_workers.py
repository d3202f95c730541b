"""The processes of `benchmarks.queue`, each with its own connection: `claim` and `submit`.

Each says `ready`, waits for a line, does its work, and prints how much it did and when it began and ended, as JSON.
"""

import json
import sys
import time

from benchmarks.queued import new_job
from service.contract.ids import WORKER, new_id
from service.store.attempts import claim
from service.store.jobs import insert_job
from service.store.session import Database


def claim_all(database: Database, most: int) -> int:
    """Take jobs until none is left; returns how many."""
    worker_id = new_id(WORKER)
    for number in range(most):
        with database.write() as session:
            if claim(session, queue="cpu", worker_id=worker_id, host="h", pid=1, lease_seconds=600.0) is None:
                return number
    return most


def submit_all(database: Database, model_id: str, count: int) -> int:
    """Insert jobs, each in a transaction of its own."""
    for _ in range(count):
        with database.write() as session:
            insert_job(session, new_job(model_id))
    return count


def main(work: str, url: str, model_id: str, count: str) -> None:
    """Do one of the two."""
    database = Database(url)
    database.ping()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    done = claim_all(database, int(count)) if work == "claim" else submit_all(database, model_id, int(count))
    print(json.dumps({"done": done, "began": began, "ended": time.monotonic()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
