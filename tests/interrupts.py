"""What happens during a native call: signal handlers that run, and other threads that do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

# A native call that runs no handlers gets one before it and one after it at most, however often the signal comes.
SOME = 3


def draws_are_replayed() -> bool:
    """Whether ATen draws exponential variates one by one, as the kernels then do; else a vendor's library does so."""
    variates = torch.empty(1000, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.allclose(variates, -torch.log1p(-uniforms), rtol=1e-12)


def call_with_handlers(call: Callable[[], _Result], handle: Callable[[], object] = bool) -> tuple[_Result, int]:
    """The result of a call during which a signal comes every few milliseconds, and how often its handler has run.

    The next one comes when a handler has ended: on a busy machine one may take longer than the time between two.
    """
    count, is_over = 0, False

    def run(*_: object) -> None:
        nonlocal count
        count += 1
        handle()
        if not is_over:
            signal.setitimer(signal.ITIMER_REAL, 0.003)

    handler = signal.signal(signal.SIGALRM, run)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, 0.003)
    try:
        return call(), count
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGALRM, handler)


def call_until_handled(
    prepare: Callable[[int], Callable[[], _Result]], handle: Callable[[], object] = bool
) -> tuple[_Result, int]:
    """The result of the first of ``prepare(1)()``, ``prepare(2)()``, ``prepare(4)()``... with handlers, and its size.

    How much a machine gets done before handlers are due is not known; in two seconds of work they are on any.
    """
    size = 1
    while True:
        call, begin = prepare(size), time.process_time()  # which stands still while others have the processors
        result, count = call_with_handlers(call, handle)
        if count >= SOME:
            return result, size
        assert time.process_time() - begin < 2, "no handlers run during the call"
        size *= 2


def call_that_draws(prepare: Callable[[int], Callable[[], _Result]], generator: torch.Generator) -> tuple[_Result, int]:
    """As ``call_until_handled``, for calls that draw from a generator of seed 1: handlers must see it on its way."""
    states: set[bytes] = set()

    def state() -> bytes:
        return bytes(generator.get_state().numpy())

    def prepare_generator(size: int) -> Callable[[], _Result]:
        generator.manual_seed(1)
        states.clear()
        return prepare(size)

    result, size = call_until_handled(prepare_generator, lambda: states.add(state()))
    end, begin = state(), bytes(torch.Generator().manual_seed(1).get_state().numpy())
    assert states - {begin, end}
    return result, size


def call_beside(call: Callable[[], object], work: Callable[[], object]) -> int:
    """How often another thread gets through some work in the middle half of a call."""
    times: list[float] = []
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            work()
            times.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        begin = time.monotonic()
        call()
        end = time.monotonic()
    finally:
        is_over.set()
        thread.join()
    return sum(abs(moment - (begin + end) / 2) < (end - begin) / 4 for moment in times)
