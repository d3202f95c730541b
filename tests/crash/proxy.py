"""A way to the database that can be cut: by closing every connection, or by silence."""

import contextlib
import socket
import threading
from typing import Literal

from sqlalchemy.engine import make_url


class Proxy:
    """Listens on TCP and speaks for a PostgreSQL server on its socket."""

    def __init__(self, database_url: str) -> None:
        self._url = make_url(database_url)
        self._server = f"{self._url.query['host']}/.s.PGSQL.{self._url.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._flows = threading.Event()
        self._flows.set()
        self._refuses = False
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        port = self._listener.getsockname()[1]
        via = self._url.difference_update_query(["host"]).set(host="127.0.0.1", port=port)
        return via.render_as_string(hide_password=False)

    def cut(self, how: Literal["closed", "silent"]) -> None:
        """Let nothing through any more, with a word to both sides or without."""
        if how == "silent":
            self._flows.clear()  # what is sent meanwhile arrives when it is mended, as from a network that resends
            return
        self._refuses = True
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._refuses = False
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        self.cut("closed")
        self._flows.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refuses:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                with self._lock:
                    self._ends |= {client, server}
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                self._flows.wait()
                target.sendall(block)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._ends.discard(end)
