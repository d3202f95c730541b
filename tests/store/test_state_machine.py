"""Whatever happens to jobs in whatever order, the store keeps its promises, and the sweeper brings each to its end."""

import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select, update
from submissions import claim_job, empty, submit_job

from service.bell import Bell, broker_queue, make_celery
from service.blobs.store import BlobStore, checkpoint_key
from service.contract.errors import ErrorCode, ProblemError
from service.contract.resources import ResultSummary
from service.contract.states import TERMINAL_STATES, AttemptOutcome, JobState
from service.jobs.retry import retry_job
from service.reconcile import Reconciler
from service.services import Services
from service.settings import Settings
from service.store.attempts import finish_canceled, finish_failed, finish_succeeded, heartbeat, requeue
from service.store.checkpoints import insert_checkpoint
from service.store.events import list_events
from service.store.jobs import CancelOutcome, request_cancel
from service.store.leases import close_lost_attempts
from service.store.tables import Attempt, Job
from service.store.time import database_time
from service.store.workers import register_worker

RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
PROBLEM = ProblemError(ErrorCode.DIVERGED, "diverged").problem()
FINISHES = {
    JobState.SUCCEEDED: lambda s, c: finish_succeeded(s, c.job_id, c.epoch, RESULT),
    JobState.FAILED: lambda s, c: finish_failed(s, c.job_id, c.epoch, PROBLEM),
    JobState.CANCELED: lambda s, c: finish_canceled(s, c.job_id, c.epoch),
}


class QuietBell(Bell):
    """Rings before it returns: the machine's next step finds the bell rung."""

    def ring_soon(self, queue, count=1):
        self.ring(queue, count)


class StoreMachine(RuleBasedStateMachine):
    services = None  # set by the test
    database = None

    claims = Bundle("claims")
    jobs = Bundle("jobs")

    def __init__(self):
        super().__init__()
        empty(self.database)
        self.reconcilers = [reconciler_of(self.services) for _ in range(2)]
        self.forget_bells()
        with self.database.write() as session:
            register_worker(session, "wrk_one", host="host", pid=1, queues=["cpu"], slots=2)
        self.ended = {}  # job -> the row as it ended
        self.epochs = {}  # job -> the newest epoch seen

    def live(self, claimed):
        with self.database.read() as session:
            row = session.get_one(Job, claimed.job_id)
        return row.state == JobState.RUNNING and row.lease_epoch == claimed.epoch

    def forget_bells(self):
        with self.services.bell.app.connection_for_write() as connection:
            for queue in ("cpu", "gpu"):
                connection.default_channel.queue_declare(broker_queue(queue))
                connection.default_channel.queue_purge(broker_queue(queue))

    def heard(self):
        with self.services.bell.app.connection_for_write() as connection:
            return connection.default_channel.basic_get(broker_queue("cpu"), no_ack=True) is not None

    def take(self):
        claimed = claim_job(self.database)
        if claimed is None:
            assert claim_job(self.database) is None
            return None
        assert claimed.epoch == self.epochs.get(claimed.job_id, 0) + 1
        self.epochs[claimed.job_id] = claimed.epoch
        return claimed

    @initialize(target=jobs)
    def first(self):
        return submit_job(self.database, max_attempts=2)

    @rule(target=jobs, queue=st.sampled_from(["cpu", "cpu", "gpu"]), queue_seconds=st.sampled_from([None, None, 0.0]))
    def submit(self, queue, queue_seconds):
        """One may wait where no worker serves, or have no time to wait at all."""
        return submit_job(self.database, max_attempts=2, queue=queue, queue_seconds=queue_seconds)

    @rule(target=jobs, job_id=jobs, from_start=st.booleans())
    def retry(self, job_id, from_start):
        """Whatever has failed or was canceled may be tried again, as a job of its own."""
        with self.database.read() as session:
            state = JobState(session.get_one(Job, job_id).state)
        if state in {JobState.FAILED, JobState.CANCELED}:
            return retry_job(self.services, "owner", job_id, from_start=from_start, key=None).job.id
        with pytest.raises(ProblemError):
            retry_job(self.services, "owner", job_id, from_start=from_start, key=None)
        return job_id

    @rule(count=st.integers(1, 3))
    def ring(self, count):
        """A bell more than there are jobs does nothing."""
        assert self.services.bell.ring("cpu", count)

    @rule()
    def flush(self):
        """The broker forgets."""
        self.forget_bells()

    @rule(target=claims)
    def hear(self):
        return self.take() if self.heard() else None

    @rule(target=claims)
    def claim(self):
        """A worker looks without a bell: one that came late, or has just ended another job."""
        return self.take()

    @rule(claimed=claims)
    def beat(self, claimed):
        if claimed is None:
            return
        live = self.live(claimed)
        with self.database.write() as session:
            assert (heartbeat(session, claimed.job_id, claimed.epoch, lease_seconds=30) is not None) == live

    @rule(claimed=claims, step=st.integers(0, 3))
    def checkpoint(self, claimed, step):
        if claimed is None:
            return
        live = self.live(claimed)
        with self.database.write() as session:
            dropped = insert_checkpoint(
                session,
                claimed.job_id,
                claimed.epoch,
                position=step,
                blob_key=checkpoint_key(claimed.job_id, claimed.epoch, step),
                sha256="0" * 64,
                bytes=1,
            )
        assert (dropped is not None) == live

    @rule(claimed=claims, end=st.sampled_from(sorted(FINISHES)))
    def finish(self, claimed, end):
        if claimed is None:
            return
        live = self.live(claimed)
        with self.database.write() as session:
            assert FINISHES[end](session, claimed) == live

    @rule(claimed=claims)
    def crash(self, claimed):
        self.give_back(claimed, AttemptOutcome.CRASHED, counted=True)

    @rule(claimed=claims)
    def drain(self, claimed):
        """A drained attempt does not count, and never uses a job up."""
        assert self.give_back(claimed, AttemptOutcome.DRAINED, counted=False) is not JobState.FAILED

    def give_back(self, claimed, outcome, *, counted):
        if claimed is None:
            return None
        live = self.live(claimed)
        with self.database.write() as session:
            state = requeue(session, claimed.job_id, claimed.epoch, outcome=outcome, delay_seconds=0, counted=counted)
        assert (state is not None) == live
        return state

    @rule(job_id=jobs)
    def cancel(self, job_id):
        with self.database.write() as session:
            outcome = request_cancel(session, job_id, "owner")
        assert outcome is not CancelOutcome.NOT_FOUND

    @rule(job_id=jobs)
    def worker_dies(self, job_id):
        dead = update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING)
        with self.database.write() as session:
            session.execute(dead.values(lease_expires_at=database_time(-60)))

    @rule()
    def sweep(self):
        with self.database.write() as session:
            assert close_lost_attempts(session) == 0  # every move closes its own attempt
        self.reconcilers[0].run_once()

    @rule()
    def sweep_twice_at_once(self):
        sweeps = [threading.Thread(target=reconciler.run_once) for reconciler in self.reconcilers]
        for sweep in sweeps:
            sweep.start()
        for sweep in sweeps:
            sweep.join()

    def teardown(self):
        """All workers die, the broker forgets; then the sweeper, and workers that hear its bells, end every job."""
        with self.database.write() as session:
            dead = update(Job).where(Job.state == JobState.RUNNING)
            session.execute(dead.values(lease_expires_at=database_time(-60)))
        self.forget_bells()
        with self.database.read() as session:
            jobs_at_most = session.query(Job).count()
        for _ in range(3 * jobs_at_most + 3):
            self.reconcilers[1].run_once()
            while self.heard():
                while claimed := self.take():
                    with self.database.write() as session:
                        assert finish_succeeded(session, claimed.job_id, claimed.epoch, RESULT)
            if not self.open_jobs():
                break
        assert not self.open_jobs(), "the sweeper leaves these where they are"
        self.promises()

    def open_jobs(self):
        with self.database.read() as session:
            return list(session.scalars(select(Job.id).where(Job.state.not_in(TERMINAL_STATES))))

    @invariant()
    def promises(self):
        with self.database.read() as session:
            rows = list(session.scalars(select(Job)))
            open_attempts = {
                (attempt.job_id, attempt.epoch)
                for attempt in session.scalars(select(Attempt).where(Attempt.ended_at.is_(None)))
            }
            events = {row.id: list_events(session, row.id, 0, 10_000) for row in rows}
        # One live attempt for each running job, and none else.
        assert open_attempts == {(row.id, row.lease_epoch) for row in rows if row.state == JobState.RUNNING}
        for row in rows:
            assert row.attempt <= row.max_attempts
            # Whatever waits can be claimed: nothing is stuck.
            if row.state == JobState.QUEUED:
                assert row.attempt < row.max_attempts
                assert row.cancel_requested_at is None
            if row.state in TERMINAL_STATES:
                end = (row.state, row.finished_at, row.lease_epoch)
                assert self.ended.setdefault(row.id, end) == end
            numbers = [event.id for event in events[row.id]]
            assert numbers == list(range(1, row.last_event + 1))
            assert [e.data["state"] for e in events[row.id] if e.kind == "state"][-1] == row.state


def reconciler_of(services):
    return Reconciler(services.database, services.bell, services.settings, services.blobs)


@pytest.mark.parametrize(
    "examples", [25, pytest.param(400, marks=[pytest.mark.full, pytest.mark.timeout(1500)])], ids=["25", "400"]
)
def test_the_promises_hold_in_every_order(database, tmp_path, examples):
    knobs = Settings(data_dir=tmp_path, retry_base_seconds=0, checkpoint_keep_seconds=3600)
    blobs = BlobStore(knobs.resolved_blob_url)
    services = Services(knobs, database, blobs, QuietBell(make_celery(knobs)), "a-key-of-sixteen-characters")
    run_state_machine_as_test(
        type("StoreMachine", (StoreMachine,), {"database": database, "services": services}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
