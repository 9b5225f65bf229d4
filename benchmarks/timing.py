"""Times functions side by side, and measures the memory that they take at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Function = Callable[[], object]

_TURN = 0.01  # seconds that a function runs at a stretch: long enough for another's threads to fall asleep


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median and the quartiles of the rounds."""

    median: float
    lower: float
    upper: float


def side_by_side(functions: Mapping[str, Function], *, seconds: float, min_rounds: int) -> dict[str, Times]:
    """The time that a call of each function takes.

    The functions take turns, so that a drift of the machine's speed meets all alike: a turn each in a round, and
    rounds until ``seconds`` are over, but ``min_rounds`` at least. A turn begins with a call that does not count, since
    the others have left their data in the caches, and their memory is perhaps the system's again: what counts is a
    call after a call, as in a loop.
    """
    repeats = {name: _repeats(function) for name, function in functions.items()}
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    num_rounds, end = 0, time.perf_counter() + seconds
    while num_rounds < min_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            function()
            rounds[name].append(_turn(function, repeats[name]) / repeats[name])
        num_rounds += 1
    return {name: _times(values) for name, values in rounds.items()}


def _repeats(function: Function) -> int:
    """How many calls fill a turn; finding out warms the function up."""
    repeats = 1
    while _turn(function, repeats) < _TURN:
        repeats *= 2
    return repeats


def _turn(function: Function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


def _times(values: list[float]) -> Times:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Times(median, lower, upper)


def peak_bytes(function: Function) -> int:
    """The most memory that PyTorch's allocator held at once during a call, beyond what it held before.

    Of a function that has been called before, as that of ``peak_resident_bytes``.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_resident_bytes(function: Function) -> int:
    """The most memory that the process held at once during a call, beyond what it held before, whoever allocated it.

    Large blocks alone: small ones come from memory that the process keeps. Linux; elsewhere a RuntimeError.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is held now
    except OSError as error:
        raise RuntimeError(f"the peak of resident memory cannot be measured here ({error})") from None
    before = _resident_bytes("VmRSS")
    function()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
