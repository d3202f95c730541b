from sqlalchemy import update
from submissions import claim_job, submit_job

from service.contract.ids import WORKER, new_id
from service.contract.states import AttemptOutcome
from service.store.attempts import requeue
from service.store.checkpoints import insert_checkpoint
from service.store.metrics import QueueFigures, read_figures, waiting_by_queue
from service.store.tables import Attempt, Job
from service.store.time import database_time
from service.store.workers import register_worker, retire_worker


def test_an_empty_store_has_zeros(database):
    with database.read() as session:
        figures = read_figures(session)
        assert waiting_by_queue(session) == {}
    assert figures.queues == {}
    assert set(figures.jobs.values()) == {0}
    assert figures.counters == {}


def test_queues_are_told_apart_and_backoff_is_no_age(database):
    submit_job(database, queue="gpu")
    submit_job(database)
    taken = claim_job(database)
    submit_job(database)
    with database.write() as session:
        requeue(session, taken.job_id, taken.epoch, outcome=AttemptOutcome.CRASHED, delay_seconds=3600, counted=True)
    with database.write() as session:
        # The one that waits has become claimable 100 s ago, whenever it was submitted.
        session.execute(
            update(Job)
            .where(Job.queue == "gpu")
            .values(created_at=database_time(-5000), not_before=database_time(-100))
        )
    with database.read() as session:
        figures = read_figures(session)
        assert waiting_by_queue(session) == {"cpu": 2, "gpu": 1}
    cpu, gpu = figures.queues["cpu"], figures.queues["gpu"]
    assert (cpu.claimable, cpu.backing_off, gpu.claimable, gpu.backing_off) == (1, 1, 1, 0)
    assert cpu.oldest_age_seconds < 60
    assert 100 <= gpu.oldest_age_seconds < 160
    assert figures.jobs["queued"] == 3
    assert figures.counters["attempts_ended"] == {"crashed": 1}
    assert figures.counters["jobs_submitted"] == {"": 3}


def test_the_age_of_a_checkpoint_is_what_a_kill_would_cost(database):
    submit_job(database)
    taken = claim_job(database)
    age = {"started_at": database_time(-500)}
    with database.write() as session:
        session.execute(update(Attempt).values(age))
    with database.read() as session:
        figures = read_figures(session)
    assert figures.queues["cpu"].running == 1
    assert 500 <= figures.queues["cpu"].checkpoint_age_seconds < 560
    with database.write() as session:
        insert_checkpoint(session, taken.job_id, taken.epoch, position=3, blob_key="k", sha256="0" * 64, bytes=1)
    with database.read() as session:
        assert read_figures(session).queues["cpu"].checkpoint_age_seconds < 60


def test_workers_count_for_each_queue_that_they_serve(database):
    with database.write() as session:
        both, gone = new_id(WORKER), new_id(WORKER)
        register_worker(session, both, host="h", pid=1, queues=["gpu", "cpu"], slots=2)
        register_worker(session, gone, host="h", pid=2, queues=["cpu"], slots=8)
        retire_worker(session, gone)
    with database.read() as session:
        found = read_figures(session).queues
    assert found == {"gpu": QueueFigures(workers=1, slots=2), "cpu": QueueFigures(workers=1, slots=2)}
