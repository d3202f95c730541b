import re
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from submissions import submit_job

from service.contract.ids import WORKER, new_id
from service.contract.keys import new_api_key
from service.store.datasets import dataset_resource, get_dataset, upsert_dataset
from service.store.keys import digest_of, insert_key, list_keys, owner_of_digest, revoke_key
from service.store.models import get_model, model_resource, upsert_model
from service.store.tables import ApiKey, Artifact, Job
from service.store.time import database_time
from service.store.workers import (
    beat_worker,
    idle_slots,
    list_workers,
    mark_gone_workers,
    register_worker,
    retire_worker,
)

ARTIFACT_OF_NO_JOB = {
    "id": "art_x",
    "job_id": "job_none",
    "epoch": 1,
    "name": "n",
    "format": "report",
    "blob_key": "k",
    "sha256": "0" * 64,
    "bytes": 1,
}
FIRST, SECOND = "a-key-of-enough-length", "another-key-of-enough-length"


def test_a_key_speaks_for_its_owner_and_is_not_stored(database):
    with database.write() as session:
        insert_key(session, FIRST, "owner", "laptop")
    with database.read() as session:
        assert owner_of_digest(session, digest_of(FIRST)) == "owner"
        assert owner_of_digest(session, digest_of(SECOND)) is None
        assert owner_of_digest(session, digest_of("ключ\0 of any kind")) is None
        assert FIRST not in str(session.execute(select(ApiKey.digest, ApiKey.owner, ApiKey.name)).all())


def test_a_revoked_key_speaks_for_nobody_and_its_name_is_free(database):
    with database.write() as session:
        insert_key(session, FIRST, "owner", "laptop")
        assert revoke_key(session, "no such name") == 0
        assert revoke_key(session, "laptop") == 1
        assert revoke_key(session, "laptop") == 0
        insert_key(session, SECOND, "other", "laptop")
    with database.read() as session:
        assert (owner_of_digest(session, digest_of(FIRST)), owner_of_digest(session, digest_of(SECOND))) == (
            None,
            "other",
        )
        assert [(key.owner, key.name, key.revoked_at is None) for key in list_keys(session)] == [
            ("owner", "laptop", False),
            ("other", "laptop", True),
        ]


def test_two_valid_keys_have_two_names(database):
    with database.write() as session:
        insert_key(session, FIRST, "owner", "laptop")
    with pytest.raises(ValueError, match="no valid key has"), database.write() as session:
        insert_key(session, SECOND, "other", "laptop")
    with pytest.raises(ValueError, match="known before"), database.write() as session:
        insert_key(session, FIRST, "other", "desk")


def test_keys_are_long_and_differ():
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"rp_[0-9A-Za-z]{8}_[0-9A-Za-z]{32}", key) for key in keys)


def test_models_and_datasets_are_one_per_owner_and_content(database):
    with database.write() as session:
        model = upsert_model(session, "owner", "a.pt", "a" * 64, 5, "k")
        assert upsert_model(session, "owner", "b.pt", "a" * 64, 5, "k").id == model.id
        assert upsert_model(session, "other", "b.pt", "a" * 64, 5, "k").id != model.id
        data = upsert_dataset(session, "owner", "d.npz", "npz", "b" * 64, 2**33, "k")
        assert upsert_dataset(session, "owner", None, "npz", "b" * 64, 2**33, "k").id == data.id
    with database.read() as session:
        assert model_resource(get_model(session, model.id, "owner")).name == "a.pt"
        assert get_model(session, model.id, "other") is None
        assert dataset_resource(get_dataset(session, data.id, "owner")).bytes == 2**33
        assert get_dataset(session, data.id, "other") is None


def test_workers_come_beat_and_go(database):
    first, second = new_id(WORKER), new_id(WORKER)
    with database.write() as session:
        for worker_id in (first, second):
            register_worker(session, worker_id, host="h", pid=1, queues=["queue"], slots=2)
        assert beat_worker(session, first, 1)
        assert not beat_worker(session, "wrk_none", 1)
        assert idle_slots(session, "queue") == 3
        assert idle_slots(session, "another") == 0
        retire_worker(session, second)
        assert [worker.id for worker in list_workers(session)] == [first]
    time.sleep(0.05)
    with database.write() as session:
        assert mark_gone_workers(session, 60) == 0
        assert mark_gone_workers(session, 0.01) == 1
        assert len(list_workers(session, include_gone=True)) == 2
        assert beat_worker(session, first, 0)
        assert [worker.id for worker in list_workers(session)] == [first]


def test_the_databases_clock_is_now_and_moves_within_a_transaction(database):
    with database.write() as session:
        now, later = session.execute(select(database_time(), database_time(90.5))).one()
        time.sleep(0.02)
        assert session.scalar(select(database_time())) > now
    assert abs((datetime.now(UTC) - now).total_seconds()) < 5
    assert (later - now).total_seconds() == pytest.approx(90.5, abs=0.01)


def test_times_compare_as_times_whatever_their_zone(database):
    submit_job(database)
    with database.read() as session:
        created = session.scalar(select(Job.created_at))
        for zone in (UTC, timezone(timedelta(hours=9))):
            for seconds, expected in ((-1, True), (1, False)):
                limit = created.astimezone(zone) + timedelta(seconds=seconds)
                assert (session.scalar(select(Job.id).where(Job.created_at > limit)) is not None) == expected
        assert session.scalar(select(Job.id).where(Job.created_at >= created)) is not None
    with pytest.raises(Exception, match="time zone"), database.read() as session:
        session.scalar(select(Job.id).where(Job.created_at > datetime(2026, 1, 1)))  # noqa: DTZ001


def test_foreign_keys_hold(database):
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(insert(Artifact).values(ARTIFACT_OF_NO_JOB))
