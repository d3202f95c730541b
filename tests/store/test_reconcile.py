import os
import time

import pytest
from sqlalchemy import update
from submissions import claim_job, submit_job

from service.bell import Bell, broker_queue, make_celery
from service.blobs.store import BlobStore
from service.contract.states import AttemptOutcome, JobState
from service.reconcile import Reconciler
from service.settings import QUEUES, Settings
from service.store.attempts import finish_canceled, requeue
from service.store.checkpoints import insert_checkpoint
from service.store.jobs import get_job
from service.store.models import upsert_model
from service.store.tables import Job, Worker
from service.store.time import database_time
from service.store.workers import register_worker, retire_worker


@pytest.fixture
def sweeper(database, tmp_path):
    settings = Settings(data_dir=tmp_path, retry_base_seconds=0, reconcile_seconds=0.05)
    blobs = BlobStore(settings.resolved_blob_url)
    bell = Bell(make_celery(settings))
    with bell.app.connection_for_write() as connection:  # the broker in memory is one for the whole process
        for queue in QUEUES:
            connection.default_channel.queue_declare(broker_queue(queue))
            connection.default_channel.queue_purge(broker_queue(queue))
    return Reconciler(database, bell, settings, blobs)


def stage(sweeper, content):
    with sweeper.blobs.writer(limit_bytes=100) as writer:
        writer.write(content)
        return writer.finish()


def age(sweeper, key, hours=48):
    old = time.time() - hours * 3600
    os.utime(sweeper.blobs.local_path(key), (old, old))


def test_waiting_jobs_are_rung_for_once(sweeper):
    queue = "cpu"
    assert sweeper.waiting_jobs() == 0
    for _ in range(3):
        submit_job(sweeper.database, queue=queue)
    assert sweeper.waiting_jobs() == 1  # no worker is known: one bell is enough for whoever comes
    assert sweeper.waiting_jobs() == 0
    assert sweeper.bell.queue_depth(queue) == 1


def test_a_silent_worker_loses_its_job_after_the_grace(sweeper):
    job_id = submit_job(sweeper.database)
    claim_job(sweeper.database, lease_seconds=-5)
    assert sweeper.expired_leases() == 0
    with sweeper.database.write() as session:
        from service.store.attempts import heartbeat

        assert heartbeat(session, job_id, 1, lease_seconds=-15)
    assert sweeper.expired_leases() == 1
    with sweeper.database.read() as session:
        assert get_job(session, job_id, None).state == JobState.QUEUED


def test_orphans_go_when_they_are_old_and_rows_keep_their_blobs(sweeper):
    kept, old, young = (sweeper.blobs.keep(stage(sweeper, text)) for text in (b"kept", b"old", b"young"))
    with sweeper.database.write() as session:
        upsert_model(session, "owner", None, "a" * 64, 4, kept)
    age(sweeper, kept)
    age(sweeper, old)
    left = stage(sweeper, b"left behind by a crash")
    os.utime(left.path, (0, 0))
    assert sweeper.orphan_blobs() == 2
    assert [sweeper.blobs.exists(key) for key in (kept, old, young)] == [True, False, True]
    assert not left.path.exists()


def test_checkpoints_of_an_ended_job_are_deleted_when_no_retry_is_expected(sweeper):
    job_id = submit_job(sweeper.database)
    claimed = claim_job(sweeper.database)
    key = sweeper.blobs.keep(stage(sweeper, b"state"))
    with sweeper.database.write() as session:
        insert_checkpoint(session, job_id, claimed.epoch, position=1, blob_key=key, sha256="0" * 64, bytes=5)
    assert sweeper.finished_checkpoints() == 0
    with sweeper.database.write() as session:
        finish_canceled(session, job_id, claimed.epoch)
    assert sweeper.finished_checkpoints() == 0
    with sweeper.database.write() as session:
        session.execute(update(Job).values(finished_at=database_time(-8 * 24 * 3600)))
    assert sweeper.finished_checkpoints() == 1
    assert not sweeper.blobs.exists(key)


def test_one_failing_rule_hinders_no_other(sweeper, monkeypatch):
    submit_job(sweeper.database, queue="cpu")

    def fail():
        raise OSError("the disk is away")

    fail.__name__ = "expired_leases"
    monkeypatch.setattr(sweeper, "expired_leases", fail)
    found = sweeper.run_once()
    assert (found["expired_leases"], found["waiting_jobs"]) == (0, 1)


def test_it_runs_in_a_thread_until_it_is_stopped(sweeper):
    submit_job(sweeper.database, queue="cpu")
    sweeper.start()
    deadline = time.monotonic() + 5
    while sweeper.bell.queue_depth("cpu") != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    sweeper.stop()
    assert sweeper.bell.queue_depth("cpu") == 1
    assert not sweeper._thread.is_alive()


def test_jobs_of_any_device_are_where_a_worker_is(sweeper):
    def queues():
        with sweeper.database.read() as session:
            return [get_job(session, job_id, None).queue for job_id in (any_device, for_the_gpu, begun)]

    def register(name, queue):
        with sweeper.database.write() as session:
            register_worker(session, name, host="h", pid=1, queues=[queue], slots=1)

    any_device = submit_job(sweeper.database, queue="gpu")
    for_the_gpu = submit_job(sweeper.database, queue="gpu", device="cuda")
    begun = submit_job(sweeper.database, queue="cpu", device="auto", priority=-1)
    claim_job(sweeper.database)
    with sweeper.database.write() as session:
        requeue(session, begun, 1, outcome=AttemptOutcome.DRAINED, delay_seconds=0, counted=False)
    assert sweeper.stranded_jobs() == 0  # nobody is there: one queue is as good as the other
    register("wrk_gpu", "gpu")
    with sweeper.database.write() as session:
        retire_worker(session, "wrk_gpu")
    register("wrk_cpu", "cpu")
    assert sweeper.stranded_jobs() == 0  # the GPU's worker may be starting again
    old = update(Worker).where(Worker.id == "wrk_gpu").values(last_seen_at=database_time(-3600))
    with sweeper.database.write() as session:
        session.execute(old)
    assert (sweeper.stranded_jobs(), queues()) == (1, ["cpu", "gpu", "cpu"])
    register("wrk_gpu_2", "gpu")
    assert (sweeper.stranded_jobs(), queues()) == (1, ["gpu", "gpu", "cpu"])  # what has begun stays
    assert sweeper.stranded_jobs() == 0
