"""Times functions side by side, and measures the memory that they take at once, on the processor or a GPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], object]
Turn = Callable[[Function, int], float]  # the seconds that so many calls take, one after the other

_TURN = 0.01  # seconds that a function runs at a stretch: long enough for another's threads to fall asleep


def rotating(function: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> Function:
    """Calls a function with one set of arguments after the other, over and over."""
    turns = itertools.cycle(sets)
    return lambda: function(*next(turns))


def host_turn(function: Function, repeats: int) -> float:
    """By the host's clock: a call is over when it returns."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


def cuda_turn(function: Function, repeats: int) -> float:
    """By the GPU's clock, between two events on its stream.

    The call before the turn, which does not count, keeps the GPU busy while the host launches the first that does. From
    then on the GPU waits for the host only where launching a call takes longer than the call: as in a loop.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median and the quartiles of the rounds."""

    median: float
    lower: float
    upper: float


def side_by_side(
    functions: Mapping[str, Function], *, seconds: float, min_rounds: int, turn: Turn = host_turn
) -> dict[str, Times]:
    """The time that a call of each function takes.

    The functions take turns, so that a drift of the machine's speed meets all alike: a turn each in a round, and
    rounds until ``seconds`` are over, but ``min_rounds`` at least. A turn begins with a call that does not count, since
    the others have left their data in the caches, and their memory is perhaps the system's again: what counts is a
    call after a call, as in a loop.
    """
    repeats = {name: _repeats(function, turn) for name, function in functions.items()}
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    num_rounds, end = 0, time.perf_counter() + seconds
    while num_rounds < min_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            function()
            rounds[name].append(turn(function, repeats[name]) / repeats[name])
        num_rounds += 1
    return {name: _times(values) for name, values in rounds.items()}


def _repeats(function: Function, turn: Turn) -> int:
    """How many calls fill a turn; finding out warms the function up."""
    repeats = 1
    while turn(function, repeats) < _TURN:
        repeats *= 2
    return repeats


def _times(values: list[float]) -> Times:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Times(median, lower, upper)


def peak_bytes(function: Function) -> int:
    """The most memory that PyTorch's allocator held at once during a call, beyond what it held before.

    Of a function that has been called before, as that of ``peak_resident_bytes``.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
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


def peak_cuda_bytes(function: Function) -> int:
    """The most memory of the GPU that PyTorch's allocator held at once during a call, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def launched(function: Function) -> list[str]:
    """The names of the kernels, copies and memsets that a call runs on the GPU; of a function called before."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True) as profile:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return [event.name for event in on_gpu if not event.is_user_annotation]


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
