"""One machine's worker process, as `rankpress worker` makes it, but with children that keep a journal."""

import sys
from pathlib import Path

from service.settings import Settings
from worker.app import create_worker, run_worker

RUNNER = str(Path(__file__).with_name("runner.py"))


def main():
    settings = Settings()
    command = (sys.executable, RUNNER, sys.argv[1])
    return run_worker(create_worker(settings, child_command=command), settings)


if __name__ == "__main__":
    sys.exit(main())
