"""The handlers that tests send during native calls."""

from __future__ import annotations

import itertools
import time

import pytest

from tests import interrupts
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


def test_a_call_grows_until_handlers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, SOME - 1, SOME])
    monkeypatch.setattr(interrupts, "call_with_handlers", lambda call, _handle: (call(), next(counts)))
    assert interrupts.call_until_handled(lambda size: lambda: 2 * size) == (8, 4)


def test_a_long_call_without_handlers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "call_with_handlers", lambda call, _handle: (call(), SOME - 1))
    monkeypatch.setattr("time.process_time", itertools.count(step=2).__next__)
    with pytest.raises(AssertionError, match="no handlers run"):
        interrupts.call_until_handled(lambda size: lambda: size)
