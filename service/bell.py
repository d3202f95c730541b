"""The bell: one Celery message that says "there is work", and carries no promise."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import ChannelError

from service.settings import EMBEDDED_BROKER, QUEUES, Settings

RINGS_AT_ONCE = 100  # more would wake nobody else
RUN_NEXT = "worker.tasks.run_next"
CONNECT_SECONDS = 2
RING_SECONDS = 2  # whoever rings waits no longer than this for each answer of a broker that hangs

log = structlog.get_logger(__name__)


def broker_queue(queue: str) -> str:
    """The broker's name of a queue of jobs."""
    return f"rankpress.{queue}"


def celery_configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings, the same for the side that rings and the side that works.

    The row in SQL keeps every promise (state, attempts, deadlines, results), so Celery is told to keep none.
    """
    transport = (
        {"polling_interval": 0.05}
        if settings.embedded
        else {
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": 30,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "retry_on_timeout": True,
        }
    )
    return {
        "broker_url": _with_host(settings.broker_url),
        "broker_transport_options": transport,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "imports": ("worker.tasks",),
        "task_default_queue": broker_queue(QUEUES[-1]),
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,
        "task_publish_retry": False,
        "worker_disable_prefetch": not settings.embedded,
        "worker_prefetch_multiplier": 1,
        "worker_pool": "threads" if settings.embedded else "prefork",
        "worker_concurrency": settings.slots or 1,
        "worker_soft_shutdown_timeout": settings.drain_grace_seconds,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "enable_utc": True,
    }


def _with_host(broker_url: str) -> str:
    """Name a host where the broker in memory has none: kombu warns of its absence at every start."""
    return f"{EMBEDDED_BROKER}localhost//" if broker_url == EMBEDDED_BROKER else broker_url


def make_celery(settings: Settings) -> Celery:
    """A Celery app with the service's configuration; an embedded service shares one between its two sides."""
    app = Celery("rankpress", set_as_current=False)
    app.conf.update(celery_configuration(settings))
    return app


class Bell:
    """Rings the broker, best effort: what fails is logged, for the reconciler rings again."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self._networked = not str(app.conf.broker_url).startswith(EMBEDDED_BROKER)
        self.failures = 0  # rings of this process that the broker did not take
        self._counting = threading.Lock()
        self._asked: Counter[str] = Counter()
        self._ringing = False

    def ring_soon(self, queue: str) -> None:
        """Ring from a thread of its own, so that the answer to a submission never waits for the broker."""
        with self._counting:
            self._asked[queue] += 1
            if self._ringing:
                return
            self._ringing = True
        try:
            threading.Thread(target=self._ring_asked, name="bell", daemon=True).start()
        except (
            RuntimeError
        ) as error:  # no more threads, or the process is about to end: the job is accepted all the same
            with self._counting:
                self._ringing = False
                self.failures += 1
            log.warning("bell_failed", queue=queue, error=repr(error))

    def _ring_asked(self) -> None:
        """Ring what was asked for; what comes meanwhile is rung together. What fails is left to the reconciler."""
        while True:
            with self._counting:
                asked, self._asked = self._asked, Counter()
                self._ringing = bool(asked)
            if not asked:
                return
            for queue, count in asked.items():
                self.ring(queue, min(count, RINGS_AT_ONCE))

    def ring(self, queue: str, count: int = 1) -> bool:
        """Wake up to `count` workers of the queue; never raises, and says whether the broker took it."""
        try:
            with self._connection() as connection:
                for _ in range(count):
                    self.app.send_task(
                        RUN_NEXT, queue=broker_queue(queue), ignore_result=True, retry=False, connection=connection
                    )
        except Exception as error:  # noqa: BLE001 - transports raise what they like, and a job is accepted without one
            with self._counting:
                self.failures += 1
            log.warning("bell_failed", queue=queue, error=repr(error))
            return False
        return True

    def queue_depth(self, queue: str) -> int | None:
        """How many bells wait in the queue; None when the broker is away."""
        try:
            with self._connection() as connection:
                return int(connection.default_channel.queue_declare(broker_queue(queue), passive=True).message_count)
        except ChannelError:
            return 0  # a queue that was never declared is empty
        except Exception as error:  # noqa: BLE001 - transports raise what they like
            log.warning("broker_away", queue=queue, error=repr(error))
            return None

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        # kombu goes on trying for ever unless the transport's own options say otherwise.
        once: dict[str, Any] = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
        if self._networked:
            once |= {"socket_timeout": RING_SECONDS, "retry_on_timeout": False}
        with self.app.connection_for_write(transport_options=once) as connection:
            yield connection
