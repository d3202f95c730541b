"""Whatever happens to jobs in whatever order, the promises of the store hold."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select, update
from submissions import claim_job, empty, submit_job

from service.contract.errors import ErrorCode, ProblemError
from service.contract.resources import ResultSummary
from service.contract.states import TERMINAL_STATES, AttemptOutcome, JobState
from service.store.attempts import finish_canceled, finish_failed, finish_succeeded, heartbeat, requeue
from service.store.checkpoints import insert_checkpoint
from service.store.events import list_events
from service.store.jobs import CancelOutcome, request_cancel
from service.store.leases import close_lost_attempts, expire_leases
from service.store.tables import Attempt, Job
from service.store.time import database_time

RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
PROBLEM = ProblemError(ErrorCode.DIVERGED, "diverged").problem()
FINISHES = {
    JobState.SUCCEEDED: lambda s, c: finish_succeeded(s, c.job_id, c.epoch, RESULT),
    JobState.FAILED: lambda s, c: finish_failed(s, c.job_id, c.epoch, PROBLEM),
    JobState.CANCELED: lambda s, c: finish_canceled(s, c.job_id, c.epoch),
}


class StoreMachine(RuleBasedStateMachine):
    database = None  # set by the test

    claims = Bundle("claims")
    jobs = Bundle("jobs")

    def __init__(self):
        super().__init__()
        empty(self.database)
        self.ended = {}  # job -> the row as it ended
        self.epochs = {}  # job -> the newest epoch seen

    def live(self, claimed):
        with self.database.read() as session:
            row = session.get_one(Job, claimed.job_id)
        return row.state == JobState.RUNNING and row.lease_epoch == claimed.epoch

    @initialize(target=jobs)
    def first(self):
        return submit_job(self.database, max_attempts=2)

    @rule(target=jobs)
    def submit(self):
        return submit_job(self.database, max_attempts=2)

    @rule(target=claims)
    def claim(self):
        claimed = claim_job(self.database)
        if claimed is None:
            claimed = claim_job(self.database)
            assert claimed is None
            return None
        assert claimed.epoch == self.epochs.get(claimed.job_id, 0) + 1
        self.epochs[claimed.job_id] = claimed.epoch
        return claimed

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
                session, claimed.job_id, claimed.epoch, position=step, blob_key="k", sha256="0" * 64, bytes=1
            )
        assert (dropped is not None) == live

    @rule(claimed=claims, end=st.sampled_from(sorted(FINISHES)))
    def finish(self, claimed, end):
        if claimed is None:
            return
        live = self.live(claimed)
        with self.database.write() as session:
            assert FINISHES[end](session, claimed) == live

    @rule(claimed=claims, counted=st.booleans())
    def give_back(self, claimed, counted):
        if claimed is None:
            return
        live = self.live(claimed)
        outcome = AttemptOutcome.CRASHED if counted else AttemptOutcome.DRAINED
        with self.database.write() as session:
            state = requeue(session, claimed.job_id, claimed.epoch, outcome=outcome, delay_seconds=0, counted=counted)
        assert (state is not None) == live

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
            expire_leases(session, grace_seconds=10, retry_base_seconds=0, retry_cap_seconds=0)
        with self.database.write() as session:
            assert close_lost_attempts(session) == 0  # every move closes its own attempt

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


def test_the_promises_hold_in_every_order(database):
    run_state_machine_as_test(
        type("StoreMachine", (StoreMachine,), {"database": database}),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
