"""The handlers that tests send during native calls."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.interrupts import SOME, call_until_handled, call_with_handlers

pytestmark = [pytest.mark.cpu_only, pytest.mark.once]


def test_a_handler_that_takes_long_is_not_interrupted_by_the_next() -> None:
    """As on a busy machine, where they would nest until Python's stack is full."""
    depths, depth = [], 0

    def handle() -> None:
        nonlocal depth
        depth += 1
        depths.append(depth)
        time.sleep(0.01)
        depth -= 1

    def call() -> None:
        for _ in range(10):
            time.sleep(0.02)

    _result, count = call_with_handlers(call, handle)
    assert count >= SOME
    assert set(depths) == {1}


def work_without_handlers(seconds: float) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_call_grows_until_handlers_run() -> None:
    """Or until it is clear that they do not."""

    def prepare(size: int) -> Callable[[], int]:
        def call() -> int:
            for _ in range(size):
                work_without_handlers(0.02)
            return size

        return call

    assert call_until_handled(prepare) == (4, 4)
    with pytest.raises(AssertionError, match="no handlers run"):
        call_until_handled(lambda _size: lambda: work_without_handlers(2))
