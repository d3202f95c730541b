import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.ids import JOB, new_id
from service.store.attempts import finish_failed
from service.store.events import append_events, list_events
from service.store.jobs import (
    PLACES_MAX,
    CancelOutcome,
    count_jobs,
    get_job,
    job_resource,
    list_jobs,
    queue_position,
    queue_positions,
    read_job,
    request_cancel,
)
from service.store.tables import Job


def read(database, job_id, owner="owner"):
    with database.read() as session:
        return get_job(session, job_id, owner)


def test_a_submitted_job_is_read_back_with_its_first_event(database, submit):
    job_id = submit(name="first")
    row = read(database, job_id)
    with database.read() as session:
        resource = job_resource(row, queue_position(session, row))
        events = list_events(session, job_id, 0, 10)
    assert (resource.state, resource.queue_position, resource.attempt) == ("queued", 1, 0)
    assert resource.requested_spec == {"budget": {"max_macs_fraction": 0.3}}
    assert resource.created_at.utcoffset().total_seconds() == 0
    assert [(event.id, event.kind, event.data) for event in events] == [(1, "state", {"state": "queued"})]


def test_another_owners_job_is_not_there(database, submit):
    job_id = submit()
    assert read(database, job_id, "someone else") is None
    with database.write() as session:
        assert request_cancel(session, job_id, "someone else") is CancelOutcome.NOT_FOUND


def test_a_rolled_back_submission_leaves_nothing(database, submit):
    first = submit()

    def fail_halfway():
        with database.write() as session:
            append_events(session, first, None, [(EventKind.LOG, {})])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    with database.read() as session:
        assert len(list_events(session, first, 0, 10)) == 1


def test_pages_are_newest_first_and_complete(database, submit):
    ids = [submit(name=f"job {index % 2}") for index in range(7)]
    seen, cursor = [], None
    while True:
        with database.read() as session:
            rows, cursor = list_jobs(session, "owner", cursor=cursor, limit=3)
        seen += [row.id for row in rows]
        if cursor is None:
            break
    assert seen == sorted(ids, reverse=True)
    with database.read() as session:
        assert len(list_jobs(session, "owner", name="job 1")[0]) == 3
        assert list_jobs(session, "owner", states=["running"])[0] == []
        assert len(list_jobs(session, "owner", states=["queued"], limit=7)[0]) == 7
        assert list_jobs(session, "owner", model_id="mdl_none")[0] == []
        assert list_jobs(session, "nobody")[0] == []


def test_queue_positions_follow_priority_then_age(database, submit):
    first, second, urgent = submit(), submit(), submit(priority=-1)
    with database.read() as session:
        rows, _ = list_jobs(session, "owner")
        assert queue_positions(session, rows) == {urgent: 1, first: 2, second: 3}


def test_places_are_counted_up_to_a_limit(database, submit):
    first = submit()
    copied = [column.name for column in Job.__table__.columns if column.name not in {"id", "created_at", "priority"}]
    with database.write() as session:
        row = session.get_one(Job, first)
        values = {name: getattr(row, name) for name in copied}
        more = [{**values, "id": new_id(JOB), "priority": number} for number in range(1, PLACES_MAX + 1)]
        session.execute(insert(Job), more)
    elsewhere = submit(queue="gpu", priority=100)
    within, beyond = more[PLACES_MAX - 2]["id"], more[PLACES_MAX - 1]["id"]
    expected = {first: 1, more[0]["id"]: 2, within: PLACES_MAX, beyond: None, elsewhere: 1}
    with database.read() as session:
        rows = [session.get_one(Job, job_id) for job_id in expected]
        assert {row.id: queue_position(session, row) for row in rows} == expected
        assert {job_id: read_job(session, job_id, "owner").queue_position for job_id in expected} == expected
        assert queue_positions(session, rows) == {job_id: place for job_id, place in expected.items() if place}


def test_cancel_of_a_waiting_job_ends_it(database, submit):
    job_id = submit()
    for _ in range(2):
        with database.write() as session:
            assert request_cancel(session, job_id, "owner") is CancelOutcome.CANCELED
    row = read(database, job_id)
    assert row.state == "canceled"
    assert row.finished_at is not None
    with database.read() as session:
        assert [event.data["state"] for event in list_events(session, job_id, 0, 10)] == ["queued", "canceled"]
        assert count_jobs(session)["canceled"] == 1


def test_cancel_of_a_running_job_sets_the_flag_once(database, submit, take):
    job_id = submit()
    take()
    for _ in range(2):
        with database.write() as session:
            assert request_cancel(session, job_id, "owner") is CancelOutcome.REQUESTED
    row = read(database, job_id)
    assert row.state == "running"
    assert job_resource(row, None).cancel_requested
    with database.read() as session:
        assert len(list_events(session, job_id, 2, 10)) == 1


def test_cancel_of_a_failed_job_changes_nothing(database, submit, take):
    job_id = submit()
    claimed = take()
    problem = ProblemError(ErrorCode.TIMEOUT, "too long").problem()
    with database.write() as session:
        assert finish_failed(session, job_id, claimed.epoch, problem)
    with database.write() as session:
        assert request_cancel(session, job_id, "owner") is CancelOutcome.FINISHED
    resource = job_resource(read(database, job_id), None)
    assert (resource.state, resource.problem.code) == ("failed", ErrorCode.TIMEOUT)


def test_events_are_numbered_within_each_job(database, submit):
    first, second = submit(), submit()
    with database.write() as session:
        assert append_events(session, first, None, [(EventKind.LOG, {"n": n}) for n in range(3)])
        assert append_events(session, second, None, [(EventKind.LOG, {})])
        assert not append_events(session, "job_none", None, [(EventKind.LOG, {})])
    with database.read() as session:
        assert [event.id for event in list_events(session, first, 0, 100)] == [1, 2, 3, 4]
        assert [event.id for event in list_events(session, first, 2, 1)] == [3]
        assert [event.id for event in list_events(session, second, 0, 100)] == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"state": "running"},  # without a lease
        {"state": "paused"},
        {"state": "succeeded"},  # without an end
        {"attempt": 4},
        {"attempt": -1},
    ],
)
def test_the_database_itself_refuses_impossible_rows(database, submit, change):
    job_id = submit()
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(change))


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_sqlite_is_set_up_to_keep_its_promises(database):
    with database.read() as session:
        found = [
            session.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 10_000]
