"""Times functions side by side, and describes the machine they ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bigramx


def side_by_side(functions: dict[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, float]:
    """The median seconds of each function.

    The functions take turns, `repeats` calls each in a round, so that a drift of the machine's speed meets all alike.
    """
    for function in functions.values():
        for _ in range(max(2, repeats // 10)):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that PyTorch's allocator held at once during the call, beyond what it held before."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine() -> dict[str, str]:
    """What a figure needs to be understood elsewhere."""
    return {
        "processor": _processor(),
        "cores": str(torch.get_num_threads()),
        "capability": bigramx.build_info()["cpu_capability"],
        "compiler": bigramx.build_info()["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
