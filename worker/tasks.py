"""The one Celery task: a doorbell was rung, so look for work."""

from typing import Any, Protocol

from service.bell import RUN_NEXT


class RunsJobs(Protocol):
    """What the task needs of a supervisor."""

    def run_next(self) -> bool:
        """Run one job; False when there was none."""


def install_tasks(app: Any, supervisor: RunsJobs) -> None:
    """Give a Celery app the task; it runs jobs until none is left that can be claimed."""

    def run_next() -> None:
        while supervisor.run_next():
            pass

    # The message is acknowledged before the task runs and nothing is retried: the job's row carries the promise.
    # Not shared: another app of this process has a supervisor of its own.
    app.task(name=RUN_NEXT, shared=False, acks_late=False, ignore_result=True, max_retries=0)(run_next)
