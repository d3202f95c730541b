"""The two servers that `benchmarks.api` compares, each one uvicorn process: `ours` and `bare`.

`python -m benchmarks.api_servers ours|bare DATABASE_URL DATA_DIR BROKER_URL` prints its port and serves.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException

OWNER = "default"


def ours(url: str, data_dir: Path, broker_url: str) -> FastAPI:
    """The service's API as `rankpress serve` runs it on several machines, with its log lines."""
    from service.app import create_app
    from service.cli.logs import set_up_logs
    from service.services import build_services
    from service.settings import Settings

    settings = Settings(data_dir=data_dir, database_url=url, broker_url=broker_url)
    set_up_logs(settings.log_level, settings.log_format)
    return create_app(build_services(settings))


def bare(url: str, _data_dir: Path, _broker_url: str) -> FastAPI:
    """A route that does the same SELECT through SQLAlchemy and nothing else."""
    from sqlalchemy import create_engine, select
    from sqlalchemy.orm import Session

    from service.store.tables import Job

    engine = create_engine(url)
    app = FastAPI()

    @app.get("/v1/jobs/{id}")
    def read_job(id: str) -> Any:  # noqa: A002
        with Session(engine) as session:
            row = session.execute(select(Job.__table__).where(Job.id == id, Job.owner == OWNER)).one_or_none()
            if row is None:
                raise HTTPException(404)
            return dict(row._mapping)

    return app


def main(which: str, url: str, data_dir: str, broker_url: str) -> None:
    """Serve on a free port."""
    app = {"ours": ours, "bare": bare}[which](url, Path(data_dir), broker_url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as `rankpress serve` does
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
