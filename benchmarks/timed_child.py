"""The child with a stopwatch: worker.runner, which also tells what its saving costs."""

import sys
import time
from collections.abc import Callable
from typing import Any

from service.contract.events import EventKind
from worker import runner


class TimedObserver(runner.RelayingObserver):
    """Tells when the first update was made, and how long the run stood still for each checkpoint."""

    _updated = False

    def pulse(self, kind: str, done: int, total: int) -> bool:
        """Tell the first one."""
        if not self._updated:
            self._updated = True
            self.event(EventKind.LOG, {"what": "first_update", "at": time.monotonic()})
        return super().pulse(kind, done, total)

    def _write(self, save: Callable[[], Any], position: int) -> None:
        began = time.monotonic()
        super()._write(save, position)
        self.event(EventKind.LOG, {"what": "saved", "seconds": time.monotonic() - began})


if __name__ == "__main__":
    runner.RelayingObserver = TimedObserver  # type: ignore[misc]
    sys.exit(runner.main())
