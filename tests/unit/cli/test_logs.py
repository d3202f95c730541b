import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, threading, warnings
import structlog
from service.cli.logs import set_up_logs

set_up_logs("INFO", {format!r})
log = structlog.get_logger("worker.supervisor")
log.debug("too_fine")
with structlog.contextvars.bound_contextvars(request_id="req_1"):
    log.bind(job_id="job_1", epoch=2).info("attempt_started", path=sys.path.__class__)
logging.getLogger("sqlalchemy.engine").info("too chatty")
logging.getLogger("celery.worker").warning("lost %s", "the broker")
warnings.warn("a library's own")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("attempt_failed")
thread = threading.Thread(target=lambda: [][0], name="lease-fence")
thread.start()
thread.join()
"""


def said(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(format=log_format)], capture_output=True, text=True, check=True
    )
    assert not done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_each_event_is_one_json_object(log_format: str) -> None:
    lines = [json.loads(line) for line in said(log_format)]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("worker.supervisor", "info"),
        ("celery.worker", "warning"),
        ("py.warnings", "warning"),
        ("worker.supervisor", "error"),
        ("service", "error"),
    ]
    first = lines[0]
    assert (first["event"], first["job_id"], first["epoch"], first["request_id"]) == (
        "attempt_started",
        "job_1",
        2,
        "req_1",
    )
    assert first["timestamp"].endswith("Z")
    assert lines[1]["event"] == "lost the broker"
    assert "ZeroDivisionError" in lines[3]["exception"]
    assert "lease-fence" in lines[4]["event"]
    assert "IndexError" in lines[4]["exception"]


def test_people_get_lines_to_read() -> None:
    text = "\n".join(said("console"))
    assert "attempt_started" in text
    assert "job_id" in text
    assert "ZeroDivisionError" in text
    assert not text.startswith("{")
