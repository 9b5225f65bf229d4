"""Calls that Python threads make at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def switched_often() -> Iterator[None]:
    """Python lets another thread run after 10 us in place of 5 ms: else they rarely do within short calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def at_once(*calls: Callable[[], object]) -> None:
    """Makes each call in a thread of its own; raises the first of their errors."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    with switched_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[None]:
    """Another thread makes the call again and again, at least once; raises its error at the end."""
    is_over, has_begun = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def repeat() -> None:
        while not is_over.is_set():
            try:
                call()
            except BaseException as error:
                errors.append(error)
                is_over.set()
            has_begun.set()

    thread = threading.Thread(target=repeat)
    with switched_often():
        thread.start()
        has_begun.wait()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
    for error in errors:
        raise error


@contextmanager
def in_another_thread(context: AbstractContextManager[object]) -> Iterator[None]:
    """Another thread is within the context."""
    is_within, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with context:
            is_within.set()
            may_leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    is_within.wait()
    try:
        yield
    finally:
        may_leave.set()
        thread.join()
