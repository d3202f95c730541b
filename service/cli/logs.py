"""Where a service's log goes: standard error, one line an event; standard output is for what the command says."""

import logging
import sys


def set_up_logs(level_name: str) -> None:
    """Send structured and library logs to standard error, from this level on; libraries speak from WARNING on."""
    import structlog

    level = logging.getLevelNamesMapping().get(level_name.upper(), logging.INFO)
    logging.basicConfig(
        stream=sys.stderr, level=max(level, logging.WARNING), format="%(asctime)s [%(levelname)s] %(name)s: %(message)s"
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
