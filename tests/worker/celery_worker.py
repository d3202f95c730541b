"""`celery --app celery_worker worker` with the fake runner; the settings come from the environment."""

from house import FAKE_RUNNER, QUICK

from service.settings import Settings
from worker.app import create_worker

app = create_worker(Settings(**QUICK), child_command=tuple(FAKE_RUNNER))
