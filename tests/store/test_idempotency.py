import time
from concurrent.futures import ThreadPoolExecutor

from submissions import submit_job

from service.store.idempotency import Fresh, InFlight, Replay, abandon, abandon_all, begin, complete, forget_old_keys


def start(database, key="key", owner="owner", in_flight_seconds=60.0):
    with database.write() as session:
        return begin(session, owner, key, in_flight_seconds=in_flight_seconds)


def test_a_key_goes_from_fresh_over_in_flight_to_replay(database):
    first = start(database)
    assert isinstance(first, Fresh)
    assert start(database) == InFlight()
    job_id = submit_job(database)
    with database.write() as session:
        assert complete(session, first.reservation, "f" * 64, job_id)
    assert start(database) == Replay(fingerprint="f" * 64, job_id=job_id)
    assert isinstance(start(database, owner="another"), Fresh)


def test_a_refused_request_frees_its_key_and_an_accepted_one_does_not(database):
    first = start(database)
    with database.write() as session:
        abandon(session, first.reservation)
    second = start(database)
    assert isinstance(second, Fresh)
    with database.write() as session:
        complete(session, second.reservation, "f" * 64, submit_job_in(session, database))
    with database.write() as session:
        abandon(session, second.reservation)
    assert isinstance(start(database), Replay)


def submit_job_in(session, database):
    session.commit()  # SQLite has one writer at a time
    return submit_job(database)


def test_an_old_reservation_is_taken_over_and_its_holder_is_too_late(database):
    first = start(database)
    time.sleep(0.03)
    second = start(database, in_flight_seconds=0.01)
    assert isinstance(second, Fresh)
    job_id = submit_job(database)
    with database.write() as session:
        assert not complete(session, first.reservation, "a" * 64, job_id)
        abandon(session, first.reservation)
        assert complete(session, second.reservation, "b" * 64, job_id)
    assert start(database) == Replay(fingerprint="b" * 64, job_id=job_id)


def test_one_of_many_at_once_is_fresh(database):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: start(database), range(8)))
    assert sum(isinstance(result, Fresh) for result in found) == 1
    assert sum(isinstance(result, InFlight) for result in found) == 7


def test_old_keys_are_forgotten(database):
    start(database)
    with database.write() as session:
        assert forget_old_keys(session, 60) == 0
    time.sleep(0.02)
    with database.write() as session:
        assert forget_old_keys(session, 0.005) == 1


def test_a_start_frees_the_keys_that_were_never_answered(database):
    start(database, key="unanswered")
    answered = start(database, key="answered")
    job_id = submit_job(database)
    with database.write() as session:
        complete(session, answered.reservation, "f" * 64, job_id)
    with database.write() as session:
        assert abandon_all(session) == 1
    assert isinstance(start(database, key="unanswered"), Fresh)
    assert isinstance(start(database, key="answered"), Replay)
