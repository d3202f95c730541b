"""What has been kept for long enough goes; what is in use, or young, stays; two reconcilers do it once."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, update
from submissions import OWNER, claim_job, received, submit_job

from service.contract.ids import JOB, WORKER, new_id
from service.contract.resources import ResultSummary
from service.jobs import files
from service.reconcile import Reconciler
from service.store import retention
from service.store.artifacts import insert_artifact
from service.store.attempts import finish_succeeded
from service.store.jobs import NewJob, insert_job, request_cancel
from service.store.tables import Artifact, Dataset, Job, Model, Worker
from service.store.time import database_time
from service.store.workers import register_worker, retire_worker

DAY = 24 * 3600.0
KEEP = {f"{what}_keep_seconds": DAY for what in ("job", "model", "dataset", "artifact")}
RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
NEW_JOB = {
    "owner": OWNER,
    "dataset_id": None,
    "requested_spec": {},
    "spec": {},
    "spec_sha256": "0" * 64,
    "queue": "cpu",
    "max_attempts": 3,
    "run_seconds_limit": 60.0,
}
JOBS = 45  # more than one batch


@pytest.fixture
def sweepers(services):
    """Two of them, as two API processes have."""
    settings = services.settings.model_copy(update=KEEP)
    return [Reconciler(services.database, services.bell, settings, services.blobs) for _ in range(2)]


def both(sweepers, rule):
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda sweeper: getattr(sweeper, rule)(), sweepers))


def count(database, table):
    with database.read() as session:
        return session.execute(select(func.count()).select_from(table)).scalar_one()


def grow_old(database, table, column, **where):
    conditions = [getattr(table, name) == value for name, value in where.items()]
    with database.write() as session:
        session.execute(update(table).where(*conditions).values({column: database_time(-2 * DAY)}))


def cancel(database, job_id):
    with database.write() as session:
        request_cancel(session, job_id, None)


def make_artifact(services, job_id):
    claimed = claim_job(services.database)
    assert claimed.job_id == job_id
    file = received(services, job_id.encode())
    key = services.blobs.keep(file.staged)
    with services.database.write() as session:
        insert_artifact(
            session, job_id, claimed.epoch, name="a", format="torchscript", blob_key=key, sha256=file.sha256, bytes=1
        )
        finish_succeeded(session, job_id, claimed.epoch, RESULT)
    return key


def test_nothing_is_deleted_unless_it_is_asked_for(services):
    job_id = submit_job(services.database)
    cancel(services.database, job_id)
    grow_old(services.database, Job, "finished_at")
    grow_old(services.database, Model, "created_at")
    sweeper = Reconciler(services.database, services.bell, services.settings, services.blobs)
    found = sweeper.run_once()
    assert {name: n for name, n in found.items() if name.startswith("old_")} == dict.fromkeys(
        ["old_jobs", "old_artifacts", "old_models", "old_datasets", "old_workers", "old_idempotency_keys"], 0
    )


def test_jobs_that_ended_long_ago_go_once(services, sweepers):
    ended = [submit_job(services.database) for _ in range(JOBS)]
    for job_id in ended:
        cancel(services.database, job_id)
    grow_old(services.database, Job, "finished_at")
    waiting, young = submit_job(services.database), submit_job(services.database)
    cancel(services.database, young)
    grow_old(services.database, Job, "created_at")
    assert both(sweepers, "old_jobs") == JOBS
    with services.database.read() as session:
        assert set(session.scalars(select(Job.id))) == {waiting, young}


def test_artifacts_go_and_their_jobs_stay(services, sweepers):
    first, second = submit_job(services.database), submit_job(services.database)
    old, young = make_artifact(services, first), make_artifact(services, second)
    grow_old(services.database, Artifact, "created_at", job_id=first)
    os.utime(services.blobs.local_path(old), (0, 0))
    assert both(sweepers, "old_artifacts") == 1
    assert [services.blobs.exists(key) for key in (old, young)] == [False, True]
    assert count(services.database, Job) == 2


def test_models_go_when_they_are_old_and_unused(services, sweepers, upload):
    database = services.database
    unused, young = upload(b"unused"), upload(b"young")
    waited_for, lately = (submit_job(database, content=content) for content in ("waited for", "lately used"))
    cancel(database, lately)
    grow_old(database, Model, "created_at")
    grow_old(database, Job, "created_at", id=waited_for)
    with database.write() as session:
        session.execute(update(Model).where(Model.id == young.id).values(created_at=database_time()))
    assert both(sweepers, "old_models") == 1
    with database.read() as session:
        assert list(session.scalars(select(Model.id).where(Model.deleted_at.is_not(None)))) == [unused.id]
    grow_old(database, Job, "created_at")
    cancel(database, waited_for)
    assert both(sweepers, "old_models") == 2
    assert both(sweepers, "unnamed_uploads") == 1  # the others are still named by their jobs
    assert count(database, Model) == 3


def test_datasets_too(services, sweepers):
    write = files.store_dataset(services.blobs, received(services, b"numbers"))
    with services.database.write() as session:
        write(session, OWNER)
    assert both(sweepers, "old_datasets") == 0
    grow_old(services.database, Dataset, "created_at")
    assert both(sweepers, "old_datasets") == 1
    assert both(sweepers, "unnamed_uploads") == 1
    assert count(services.database, Dataset) == 0


def test_a_model_that_is_named_at_the_last_moment_stays(services, upload):
    """The submission holds the row while the rule runs: it is passed over, or on SQLite waited for."""
    model = upload()
    grow_old(services.database, Model, "created_at")

    def sweep():
        with services.database.write() as session:
            return retention.drop_old_models(session, DAY)[0]

    with ThreadPoolExecutor(1) as pool:
        with services.database.write() as session:
            assert files.existing_model(session, OWNER, model.id, lock=True)
            sweeping = pool.submit(sweep)
            time.sleep(0.2)
            insert_job(session, NewJob(model_id=model.id, id=new_id(JOB), **NEW_JOB))
        assert sweeping.result() == 0


def test_workers_that_are_gone_are_forgotten(services, sweepers):
    gone, live = new_id(WORKER), new_id(WORKER)
    with services.database.write() as session:
        for worker_id in (gone, live):
            register_worker(session, worker_id, host="h", pid=1, queues=["cpu"], slots=1)
        retire_worker(session, gone)
    assert both(sweepers, "old_workers") == 0
    with services.database.write() as session:
        session.execute(update(Worker).where(Worker.id == gone).values(gone_at=database_time(-8 * DAY)))
    assert both(sweepers, "old_workers") == 1
    assert count(services.database, Worker) == 1
