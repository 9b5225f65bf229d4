"""What several threads take turns at."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator


class Lock:
    """A lock that its thread may take again, as a signal handler does that calls what holds it.

    A forked child finds it free, as the thread that held it may not be there; so does who gets a copy.
    """

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(RuntimeError):  # it was taken before a fork
            self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


_warnings = Lock()


@contextlib.contextmanager
def without_warnings(message: str = "") -> Iterator[None]:
    """Ignores warnings that match at their beginning. Two threads at once would restore each other's filters."""
    with _warnings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield
