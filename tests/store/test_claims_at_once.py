"""Many threads take from one queue: each job is claimed once, whichever database it is."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from submissions import claim_job, submit_job

from service.contract.events import EventKind
from service.contract.states import AttemptOutcome
from service.store.attempts import requeue
from service.store.events import append_events, list_events
from service.store.leases import expire_leases
from service.store.models import upsert_model

THREADS = 8
JOBS = 40


def test_no_job_is_claimed_twice(database):
    ids = {submit_job(database) for _ in range(JOBS)}

    def drain(number):
        taken = []
        while (claimed := claim_job(database, worker_id=f"worker {number}")) is not None:
            taken.append(claimed.job_id)
        return taken

    with ThreadPoolExecutor(THREADS) as pool:
        taken = Counter(job_id for part in pool.map(drain, range(THREADS)) for job_id in part)
    # A locked row is passed over, so a thread may stop early; every job is taken once for all that.
    for _ in range(JOBS - len(taken)):
        taken[claim_job(database).job_id] += 1
    assert taken == dict.fromkeys(ids, 1)


def test_a_lost_lease_is_requeued_by_one_of_many(database):
    job_id = submit_job(database)
    claim_job(database, lease_seconds=-1)

    def sweep(_):
        with database.write() as session:
            return expire_leases(session, grace_seconds=0, retry_base_seconds=0, retry_cap_seconds=0)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(sweep, range(THREADS)))
    assert sorted(map(len, results)) == [0] * (THREADS - 1) + [1]
    assert claim_job(database).job_id == job_id


def test_finishing_and_requeueing_at_once_lets_one_win(database):
    job_id = submit_job(database)
    claimed = claim_job(database)

    def give_back(_):
        with database.write() as session:
            return requeue(
                session, job_id, claimed.epoch, outcome=AttemptOutcome.CRASHED, delay_seconds=0, counted=True
            )

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(give_back, range(THREADS)))
    assert results.count("queued") == 1
    assert results.count(None) == THREADS - 1


def test_events_written_at_once_have_no_gap(database):
    job_id = submit_job(database)

    def write(number):
        with database.write() as session:
            append_events(session, job_id, None, [(EventKind.LOG, {"n": number})] * 2)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(20)))
    with database.read() as session:
        assert [event.id for event in list_events(session, job_id, 0, 100)] == list(range(1, 42))


def test_the_same_content_uploaded_at_once_is_one_model(database):
    def upload(_):
        with database.write() as session:
            return upsert_model(session, "owner", None, "f" * 64, 1, "sha256/ff/" + "f" * 62).id

    with ThreadPoolExecutor(THREADS) as pool:
        assert len(set(pool.map(upload, range(THREADS)))) == 1
