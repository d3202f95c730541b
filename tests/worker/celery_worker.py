"""A many-machine worker with the fake runner; the settings come from the environment."""

import os
import sys

from house import FAKE_RUNNER, QUICK

from service.settings import Settings
from worker.app import create_worker, run_worker

if __name__ == "__main__":
    from_environment = {name for name in QUICK if f"RANKPRESS_{name.upper()}" in os.environ}
    settings = Settings(**{name: value for name, value in QUICK.items() if name not in from_environment})
    sys.exit(run_worker(create_worker(settings, child_command=tuple(FAKE_RUNNER)), settings))
