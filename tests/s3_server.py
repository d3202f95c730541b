"""A real S3 protocol server (moto's) in a process of its own, which any process of this machine can use."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.request import Request, urlopen

BUCKET = "rankpress-test"


@dataclass
class S3Server:
    """The server, the URL of a bucket on it, and the variables with which a process finds it."""

    process: "subprocess.Popen[str]"
    environment: dict[str, str]
    url: str = f"s3://{BUCKET}"

    @classmethod
    def start(cls) -> Self:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3_server"],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        assert endpoint, "the S3 server did not start"
        urlopen(Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=10).close()
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }
        return cls(process, environment)

    @contextmanager
    def away(self) -> Iterator[None]:
        """For a while the server takes connections and answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
