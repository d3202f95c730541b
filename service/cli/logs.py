"""Where a service's log goes: standard error, one line an event; standard output is for what the command says."""

import logging
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import Processor

_OURS = ("service", "worker")


def set_up_logs(level_name: str, log_format: str = "auto") -> None:
    """Send all log lines to standard error from this level on; libraries speak from WARNING on.

    "json" makes each line one JSON object, "console" a line for people; "auto" takes the latter on a terminal.
    """
    import structlog

    level = logging.getLevelNamesMapping().get(level_name.upper(), logging.INFO)
    for_people = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S" if for_people else "iso", utc=not for_people),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(for_people=for_people)],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    threading.excepthook = _log_end_of_thread


def _renderer(*, for_people: bool) -> "Processor":
    import structlog

    if for_people:
        return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    """Log an error that ended a thread; what says SystemExit meant to end."""
    if ended.exc_value is None or issubclass(ended.exc_type, SystemExit):
        return
    name = None if ended.thread is None else ended.thread.name
    logging.getLogger("service").error("thread_ended_by_error: %s", name, exc_info=ended.exc_value)
