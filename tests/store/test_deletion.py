"""What is deleted is gone, what is needed is refused, and no submission at the same time is left without its model."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select
from submissions import OWNER, claim_job, received, submit_job

from service.blobs.errors import BlobStoreAwayError
from service.blobs.store import checkpoint_key
from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.ids import JOB, new_id
from service.contract.plan import Form, LayerFacts, RankRow
from service.contract.resources import ResultSummary
from service.jobs import delete, files
from service.jobs.submit import Submission, submit
from service.orphans import delete_orphans
from service.reconcile import Reconciler
from service.store import deletion
from service.store.artifacts import insert_artifact, list_artifacts
from service.store.attempts import finish_succeeded
from service.store.checkpoints import insert_checkpoint
from service.store.events import append_events
from service.store.idempotency import begin, complete
from service.store.jobs import NewJob, get_job, insert_job, request_cancel
from service.store.layers import insert_layers
from service.store.models import get_model
from service.store.ranks import insert_rank_rows
from service.store.tables import Base

SPEC = {"budget": {"max_macs_fraction": 0.5}, "example_inputs": [{"shape": [1, 4]}]}
RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
ROUNDS = 12


def submission(model_id):
    return Submission(owner=OWNER, name=None, requested_spec=SPEC, model=model_id, dataset=None)


def refused(call, *arguments):
    with pytest.raises(ProblemError) as error:
        call(*arguments)
    return error.value


def end(database, job_id):
    with database.write() as session:
        request_cancel(session, job_id, None)


def put(services, content):
    with services.blobs.writer(limit_bytes=10**6) as writer:
        writer.write(content)
        return services.blobs.keep(writer.finish())


def full_job(services, job_id):
    """Give a job a row in every table, and end it; returns its blob keys."""
    database = services.database
    claimed = claim_job(database)
    assert claimed.job_id == job_id
    artifact, state = put(services, b"artifact"), checkpoint_key(job_id, claimed.epoch, 1)
    path = services.settings.data_dir / "state"
    path.write_bytes(b"state")
    services.blobs.put_file(path, state)
    fenced = {"job_id": job_id, "epoch": claimed.epoch}
    layer = LayerFacts(position=0, name="fc", kind="linear", weight_shape=[4, 4], params=16, macs=16)
    row = RankRow(step=0, layer="fc", term=0, form=Form.MATRIX, rank=2, params=16, macs=16)
    stored = {"sha256": "0" * 64, "bytes": 1}
    with database.write() as session:
        insert_checkpoint(session, **fenced, position=1, blob_key=state, **stored)
        insert_artifact(session, **fenced, name="a", format="torchscript", blob_key=artifact, **stored)
        insert_layers(session, job_id, claimed.epoch, [layer])
        insert_rank_rows(session, job_id, claimed.epoch, [row])
        append_events(session, job_id, claimed.epoch, [(EventKind.STEP, {"step": 1})])
        complete(session, begin(session, OWNER, job_id, in_flight_seconds=60).reservation, "f" * 64, job_id)
        finish_succeeded(session, job_id, claimed.epoch, RESULT)
    return artifact, state


def rows(database):
    with database.read() as session:
        counted = {
            table.name: session.execute(select(func.count()).select_from(table)).scalar_one()
            for table in Base.metadata.sorted_tables
        }
    return {name: number for name, number in counted.items() if number and name != "counters"}


def test_a_deleted_job_leaves_nothing_but_its_model(services):
    job_id = submit_job(services.database)
    full_job(services, job_id)
    delete.delete_job(services, OWNER, job_id)
    assert rows(services.database) == {"models": 1}
    assert refused(delete.delete_job, services, OWNER, job_id).code is ErrorCode.NOT_FOUND


def test_a_job_that_has_not_ended_is_kept(services):
    job_id = submit_job(services.database)
    for state in ("queued", "running"):
        error = refused(delete.delete_job, services, OWNER, job_id)
        assert error.code is ErrorCode.STATE_CONFLICT
        assert f"is {state}: cancel it first" in error.detail
        claim_job(services.database)
    assert refused(delete.delete_job, services, "other", job_id).code is ErrorCode.NOT_FOUND


def age(services, key):
    os.utime(services.blobs.local_path(key), (0, 0))


def test_files_of_deleted_rows_go_at_once_unless_they_are_shared(services):
    first, second = submit_job(services.database), submit_job(services.database)
    artifact, first_state = full_job(services, first)
    same, second_state = full_job(services, second)
    assert same == artifact
    age(services, artifact)
    delete.delete_job(services, OWNER, first)
    assert [services.blobs.exists(key) for key in (artifact, first_state, second_state)] == [True, False, True]
    delete.delete_job(services, OWNER, second)
    assert [services.blobs.exists(key) for key in (artifact, second_state)] == [False, False]


def test_a_file_stored_just_now_is_left_to_the_sweep(services):
    """Another attempt may have stored the same bytes, and be about to write their row."""
    job_id = submit_job(services.database)
    artifact, _ = full_job(services, job_id)
    delete.delete_job(services, OWNER, job_id)
    assert services.blobs.exists(artifact)
    age(services, artifact)
    assert Reconciler(services.database, services.bell, services.settings, services.blobs).orphan_blobs() == 1
    assert not services.blobs.exists(artifact)


def test_a_blob_store_that_is_away_does_not_hinder_a_deletion(services, monkeypatch):
    def away(*_):
        raise BlobStoreAwayError("away")

    job_id = submit_job(services.database)
    full_job(services, job_id)
    monkeypatch.setattr(services.blobs, "delete", away)
    delete.delete_job(services, OWNER, job_id)
    assert rows(services.database) == {"models": 1}


def test_an_artifact_goes_alone(services):
    job_id = submit_job(services.database)
    artifact, _ = full_job(services, job_id)
    age(services, artifact)
    with services.database.read() as session:
        (row,) = list_artifacts(session, job_id)
    assert refused(delete.delete_artifact, services, "other", row.id).code is ErrorCode.NOT_FOUND
    delete.delete_artifact(services, OWNER, row.id)
    assert not services.blobs.exists(artifact)
    assert refused(delete.delete_artifact, services, OWNER, row.id).code is ErrorCode.NOT_FOUND
    with services.database.read() as session:
        assert get_job(session, job_id, OWNER).state == "succeeded"


def test_a_model_goes_when_no_job_needs_it_and_comes_back_under_its_id(services, upload):
    model = upload(b"weights", name="first.pt")
    job = submit(services, submission(model.id), None).job
    error = refused(delete.delete_model, services, OWNER, model.id)
    assert error.code is ErrorCode.STATE_CONFLICT
    assert f"job {job.id} is queued: cancel it first" in error.detail
    end(services.database, job.id)
    age(services, model.blob_key)
    delete.delete_model(services, OWNER, model.id)
    assert not services.blobs.exists(model.blob_key)
    assert refused(files.read_model, services, OWNER, model.id).code is ErrorCode.NOT_FOUND
    assert files.list_models(services, OWNER, name=None, cursor=None, limit=9).items == []
    assert refused(submit, services, submission(model.id), None).code is ErrorCode.NOT_FOUND
    assert refused(delete.delete_model, services, OWNER, model.id).code is ErrorCode.NOT_FOUND

    again = upload(b"weights", name="second.pt")
    assert (again.id, again.name, again.deleted_at) == (model.id, "second.pt", None)
    assert again.created_at >= model.created_at
    assert services.blobs.exists(again.blob_key)
    assert submit(services, submission(model.id), None).job.state == "queued"


def test_the_row_of_a_deleted_model_goes_with_its_last_job(services, upload):
    model = upload()
    job = submit(services, submission(model.id), None).job
    end(services.database, job.id)
    delete.delete_model(services, OWNER, model.id)
    for left in (1, 0):
        with services.database.write() as session:
            assert deletion.drop_unnamed(session) == 1 - left
        assert rows(services.database).get("models", 0) == left
        if left:
            delete.delete_job(services, OWNER, job.id)
    assert upload().id != model.id


def test_a_model_that_is_a_jobs_loss_is_used_too(services, upload):
    loss = upload(b"a loss")
    job_id = submit_job(services.database, objective_model_id=loss.id)
    assert refused(delete.delete_model, services, OWNER, loss.id).code is ErrorCode.STATE_CONFLICT
    end(services.database, job_id)
    delete.delete_model(services, OWNER, loss.id)
    with services.database.write() as session:
        assert deletion.drop_unnamed(session) == 0  # the ended job keeps its id
    delete.delete_job(services, OWNER, job_id)
    with services.database.write() as session:
        assert deletion.drop_unnamed(session) == 1


def test_datasets_too(services):
    write = files.store_dataset(services.blobs, received(services, b"numbers"))
    with services.database.write() as session:
        dataset = write(session, OWNER)
    job_id = submit_job(services.database, dataset_id=dataset.id)
    assert refused(delete.delete_dataset, services, OWNER, dataset.id).code is ErrorCode.STATE_CONFLICT
    end(services.database, job_id)
    delete.delete_dataset(services, OWNER, dataset.id)
    assert refused(files.read_dataset, services, OWNER, dataset.id).code is ErrorCode.NOT_FOUND


def test_a_deletion_that_meets_a_submission_waits_for_it_and_is_refused(services, upload):
    model = upload()
    outcomes = []

    def delete_now():
        with services.database.write() as session:
            outcomes.append(deletion.delete_model(session, model.id, OWNER))

    thread = threading.Thread(target=delete_now)
    with services.database.write() as session:
        assert files.existing_model(session, OWNER, model.id, lock=True)
        thread.start()
        time.sleep(0.2)  # it has begun, and sees what was committed before
        assert outcomes == []
        insert_job(session, job_of(model.id))
    thread.join()
    assert [type(outcome) for outcome in outcomes] == [deletion.InUse]


def test_submissions_and_deletions_at_once(services, upload):
    for number in range(ROUNDS):
        model = upload(f"model {number}".encode())
        begin_together = threading.Barrier(2)

        def attempt(call, *arguments, together=begin_together):
            together.wait()
            try:
                return call(*arguments)
            except ProblemError as error:
                return error.code

        with ThreadPoolExecutor(2) as pool:
            submitted = pool.submit(attempt, submit, services, submission(model.id), None)
            deleted = pool.submit(attempt, delete.delete_model, services, OWNER, model.id)
        outcome = (submitted.result(), deleted.result())
        assert outcome[0] is ErrorCode.NOT_FOUND or outcome[1] is ErrorCode.STATE_CONFLICT, outcome
        with services.database.read() as session:
            stays = get_model(session, model.id, OWNER) is not None
        assert stays == (outcome[0] is not ErrorCode.NOT_FOUND)


@pytest.mark.parametrize("row_first", [True, False])
def test_an_upload_never_loses_its_file_to_a_sweep(services, row_first):
    """The sweep has read the age of an orphan when the same content is stored anew, and is about to delete it."""
    key = put(services, b"the same")
    age(services, key)
    really_delete = services.blobs.delete
    outcome = []

    def write_row():
        try:
            with services.database.write() as session:
                outcome.append(write(session, OWNER))
        except ProblemError as error:
            outcome.append(error.code)

    thread = threading.Thread(target=write_row)

    def delete_late(deleted):
        nonlocal write
        write = files.store_model(services.blobs, received(services, b"the same"))
        thread.start()
        time.sleep(0.2)
        assert outcome == []  # it waits for the sweep
        really_delete(deleted)

    write = None
    services.blobs.delete = delete_late
    if row_first:
        write = files.store_model(services.blobs, received(services, b"the same"))
        write_row()
        age(services, key)
    swept = delete_orphans(services.database, services.blobs, [key], 3600)
    if row_first:
        assert swept == 0
        assert services.blobs.exists(key)
    else:
        thread.join()
        assert (swept, outcome) == (1, [ErrorCode.UNAVAILABLE])
        assert "models" not in rows(services.database)


def job_of(model_id):
    return NewJob(
        id=new_id(JOB),
        owner=OWNER,
        model_id=model_id,
        dataset_id=None,
        requested_spec=SPEC,
        spec=SPEC,
        spec_sha256="0" * 64,
        queue="cpu",
        max_attempts=3,
        run_seconds_limit=60,
    )


def test_the_same_content_of_two_owners_is_deleted_with_the_second(services, upload):
    mine, theirs = upload(b"shared"), upload(b"shared", owner="other")
    assert mine.blob_key == theirs.blob_key
    for owner, model, stays in ((OWNER, mine, True), ("other", theirs, False)):
        age(services, model.blob_key)
        delete.delete_model(services, owner, model.id)
        assert services.blobs.exists(model.blob_key) == stays
