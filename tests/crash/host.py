"""A process that hosts an embedded worker on a data directory, as `rankpress serve` does, until it is ended."""

import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from house import FAKE_RUNNER, House

from service.reconcile import Reconciler
from worker.embedded import EmbeddedWorker


def main():
    house = House(Path(sys.argv[1]))
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    reconciler = Reconciler(house.database, house.bell, house.settings, house.blobs)
    worker = EmbeddedWorker(house.services, child_command=FAKE_RUNNER)
    worker.start()
    reconciler.start()
    print("ready", flush=True)
    asked.wait()
    reconciler.stop()
    worker.stop()


if __name__ == "__main__":
    main()
