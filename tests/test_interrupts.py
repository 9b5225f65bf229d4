"""The handlers that tests send during native calls."""

from __future__ import annotations

import time

import pytest

from tests.interrupts import SOME, call_with_handlers

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
