"""Times functions side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Function = Callable[[], object]
Elapsed = Callable[[Function, int], float]  # the seconds that so many successive calls take

_TURN_SECONDS = 0.01  # long enough for the threads of the previous function to fall asleep


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median and the quartiles of the rounds."""

    median: float
    lower: float
    upper: float


def side_by_side(
    functions: Mapping[str, Function], elapsed: Elapsed, *, seconds: float, min_rounds: int
) -> dict[str, Times]:
    """Times a call of each function.

    The functions alternate, so that a drift of the machine's speed affects all alike: a turn each in a round, and
    rounds until ``seconds`` have passed, but at least ``min_rounds``. A turn begins with a call that does not count, as
    the others have left their data in the caches, and the function's memory may have gone back to the system. What
    counts is a call after a call, as in a loop.
    """
    repeats = {name: _repeats(function, elapsed) for name, function in functions.items()}
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    num_rounds, end = 0, time.perf_counter() + seconds
    while num_rounds < min_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            function()
            rounds[name].append(elapsed(function, repeats[name]) / repeats[name])
        num_rounds += 1
    return {name: _times(values) for name, values in rounds.items()}


def rotating(function: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> Function:
    """Calls the function with one set of arguments after the other, over and over."""
    turns = itertools.cycle(sets)
    return lambda: function(*next(turns))


def _repeats(function: Function, elapsed: Elapsed) -> int:
    """How many calls fill a turn; finding out warms the function up."""
    repeats = 1
    while elapsed(function, repeats) < _TURN_SECONDS:
        repeats *= 2
    return repeats


def _times(values: list[float]) -> Times:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Times(median, lower, upper)
