"""The live line of a job that runs."""

import sys
from types import TracebackType
from typing import Any, Self

import click

from service.contract.resources import JobResource
from service.contract.states import JobState

_LENGTH = 1000  # the bar counts in thousandths
_LABEL_WIDTH = 11


class JobBar:
    """A progress bar on standard error; where that is no terminal, one line per phase."""

    def __init__(self) -> None:
        self._bar: Any = click.progressbar(
            length=_LENGTH,
            label="submitting".ljust(_LABEL_WIDTH),
            show_eta=False,
            item_show_func=lambda text: text,
            file=sys.stderr,
            bar_template="%(label)s [%(bar)s] %(info)s",
            width=16,
        )

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, traceback)

    def show(self, job: JobResource) -> None:
        """Draw the job as it stands."""
        done = _LENGTH if job.state is JobState.SUCCEEDED else round(_LENGTH * job.progress.fraction)
        self._bar.label = phase_text(job).ljust(_LABEL_WIDTH)
        self._bar.pos = done
        self._bar.current_item = numbers_text(job)
        self._bar.render_progress()


def phase_text(job: JobResource) -> str:
    """What the job is doing, in a word or two."""
    if job.state is JobState.QUEUED:
        return f"queued ({job.queue_position})" if job.queue_position else "queued"
    if job.state is JobState.RUNNING:
        return "canceling" if job.cancel_requested else (job.phase or "running").replace("_", " ")
    return job.state.value


def numbers_text(job: JobResource) -> str:
    """Step, loss, cost and remaining time, as far as they are known."""
    progress = job.progress
    parts = []
    if progress.total_steps:
        parts.append(f"step {progress.step}/{progress.total_steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.cost is not None:
        parts.append(f"cost {100 * progress.cost:.1f} %")
    if progress.eta_seconds is not None and not job.state.terminal:
        minutes, seconds = divmod(round(progress.eta_seconds), 60)
        parts.append(f"ETA {minutes}:{seconds:02d}")
    return "  ".join(parts)
