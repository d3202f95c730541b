"""Looks at things that may not answer: each in a thread of its own, and none is waited for longer than its bound."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

LOOK_SECONDS = 4.5  # so that an answer made of looks comes within 5 s

T = TypeVar("T")


class Look(Generic[T]):
    """One question; while an answer to it is on its way, whoever asks again waits for the same one.

    However often it is asked, a thing that hangs holds one thread.
    """

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._current: Future[T] | None = None

    def begin(self) -> "Future[T]":
        """Ask, unless that was done already, and return what will be the answer."""
        with self._lock:
            if self._current is None:
                self._current = Future()
                threading.Thread(target=self._run, args=(self._current,), name="look", daemon=True).start()
            return self._current

    def answer(self, seconds: float = LOOK_SECONDS) -> T:
        """Ask and wait; `TimeoutError` when there is no answer after so long."""
        return self.begin().result(seconds)

    def _run(self, future: "Future[T]") -> None:
        try:
            found = self._ask()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._forget()
            future.set_exception(error)
        else:
            self._forget()
            future.set_result(found)

    def _forget(self) -> None:
        with self._lock:
            self._current = None
