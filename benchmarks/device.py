"""Where cases are measured, the processor or a GPU: its description, its clock, its memory."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import bigramx
from benchmarks.timing import Function

Inputs = TypeVar("Inputs", bound="tuple[Tensor, ...]")


class Device:
    """The processor; a subclass overrides what differs elsewhere."""

    name = "cpu"  # as PyTorch takes it
    is_gpu = False

    def unavailable(self) -> str | None:
        """Why nothing can be measured here, or None."""
        return None

    def describe(self) -> dict[str, str]:
        """The processor, the threads, and the versions of all that is measured."""
        return {
            **_host("jax", "numpy"),
            "cores": str(torch.get_num_threads()),
            "capability": bigramx.build_info()["cpu_capability"],
        }

    def elapsed(self, function: Function, repeats: int) -> float:
        """The seconds that so many successive calls take."""
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return time.perf_counter() - start

    def capture(self, function: Function) -> Function:
        """The function as a single launch, where there are graphs."""
        return function

    def free_bytes(self) -> float:
        """Of memory; infinite where the system does not tell."""
        available = _proc("meminfo", "MemAvailable")
        return int(available.split()[0]) * 1024 if available else float("inf")

    def lacks_memory(self, num_bytes: float) -> str | None:
        """Why a case that needs so much memory cannot run here, or None."""
        needed, free = num_bytes / 2**30, self.free_bytes() / 2**30
        return None if free >= needed else f"needs {needed:.3g} GiB of memory, {free:.1f} are free"

    def rotated_bytes(self) -> int:
        """How many bytes of inputs to rotate: none here, where a loop finds its table in the cache if it fits."""
        return 0

    def input_sets(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Inputs to call a function with in turn, so many that none is still cached when its turn comes again."""
        first = make()
        set_bytes = max(1, sum(tensor.nbytes for tensor in first))
        wanted, fitting = -(-self.rotated_bytes() // set_bytes), self.free_bytes() / 4 // set_bytes
        return [first, *(make() for _ in range(1, int(min(wanted, fitting))))]

    def peak_bytes(self, function: Function) -> int:
        """The most memory that a call takes at once from PyTorch's allocator; of a function called before."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            function()
        held = peak = 0
        for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def peak_resident_bytes(self, function: Function) -> int:
        """The most memory that the process takes during a call, whichever allocator; of a function called before.

        Of three calls: another allocator that gives memory back meanwhile, or keeps it for the next call, lowers it. On
        Linux; elsewhere an OSError.
        """
        return max(_peak_resident_bytes(function) for _ in range(3))


class CudaDevice(Device):
    """A GPU, measured by its own clock."""

    name = "cuda"
    is_gpu = True

    def unavailable(self) -> str | None:
        """It takes a GPU, and kernels for it."""
        if not torch.cuda.is_available():
            return f"PyTorch finds no CUDA device here (torch {torch.__version__})"
        if not bigramx.build_info()["cuda_architectures"]:
            return "this build of bigramx has no CUDA kernels"
        return None

    def describe(self) -> dict[str, str]:
        """The card, its driver, and the versions of all that is measured."""
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "card": card.name,
            "memory": f"{card.total_memory / 2**30:.0f} GiB",
            "L2": f"{card.L2_cache_size / 2**20:.0f} MiB",
            "driver": _proc("driver/nvidia/version", "NVRM version") or "unknown",
            "cuda": str(torch.version.cuda),
            "kernels for": bigramx.build_info()["cuda_architectures"],
            **_host("triton", "liger-kernel"),
        }

    def elapsed(self, function: Function, repeats: int) -> float:
        """By the GPU's clock, between two events on its stream.

        The call before them, which does not count, keeps the GPU busy while the host launches the first that does. From
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

    def capture(self, function: Function) -> Function:
        """The graph of a call; a replay returns what that call returned, filled anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made only once, such as an optimizer's state, is made here
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = function()

        def replay() -> object:
            graph.replay()
            return returned

        return replay

    def free_bytes(self) -> float:
        """What PyTorch keeps for later counts as free."""
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept

    def rotated_bytes(self) -> int:
        """Four times the L2."""
        return 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def peak_bytes(self, function: Function) -> int:
        """On the GPU alone."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    peak_resident_bytes = peak_bytes


def _host(*peers: str) -> dict[str, str]:
    return {
        "processor": _proc("cpuinfo", "model name") or platform.processor(),
        "compiler": bigramx.build_info()["compiler"],
        "torch": torch.__version__,
        **{peer: next((found.version for found in distributions(name=peer)), "not installed") for peer in peers},
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _proc(file: str, field: str) -> str:
    """What Linux says of itself; an empty string elsewhere."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _peak_resident_bytes(function: Function) -> int:
    _give_back_freed_memory()  # else what the call takes of it would not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    before = _resident_bytes("VmRSS")
    function()
    return max(0, _resident_bytes("VmHWM") - before)


def _give_back_freed_memory() -> None:
    """What the gradient pool and, if it is glibc, the C library keep goes back to the system."""
    bigramx.memory.empty_gradient_pool()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes(field: str) -> int:
    return int(_proc("self/status", field).split()[0]) * 1024


CPU, CUDA = Device(), CudaDevice()
