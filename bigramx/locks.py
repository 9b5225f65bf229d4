"""What several threads take turns at."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def new_lock() -> Any:
    """A threading.RLock, which a signal handler may take again, and which a forked child finds free.

    Only C takes and frees it, so no exception of a handler leaves it taken. No code of the user's runs while it is
    held, which might wait for a thread that waits for the lock; but handlers do.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_those_of_other_threads() -> None:
    """They are not there in a forked child."""
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()


os.register_at_fork(after_in_child=_free_those_of_other_threads)
_warnings = new_lock()


@contextlib.contextmanager
def without_warnings(message: str = "") -> Iterator[None]:
    """Ignores warnings that match at their beginning. Two threads at once would restore each other's filters."""
    with _warnings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield
