"""Where a job is measured, the processor or a GPU, and how: the clock, the cache and the memory are the device's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

import bigramx
from benchmarks import floors, machine, timing
from benchmarks.timing import Function, Times, Turn, rotating

COPY = "a copy that moves as many bytes"

Inputs = TypeVar("Inputs", bound="tuple[Tensor, ...]")


@dataclass(frozen=True)
class Device:
    """Where a job is measured.

    Attributes:
        name: As PyTorch takes it; the results' file has it, too.
        is_gpu: Which peers and floors there are.
        captures: Whether calls become graphs there, and optimizers take ``capturable=True``.
        turn: The clock.
        lacks: Why nothing can be measured there, or None.
        machine: What a figure needs to be understood elsewhere.
        busy: Why little can be measured now, or None.
        free_bytes: Of memory.
        cache_bytes: What a call finds in the cache after calls with the same inputs, and would not after others.
        fresh: Memory of a shape, as a large gradient gets it.
        peak_bytes: The most memory that PyTorch's allocator held at once during a call, beyond what it held before.
        peak_resident_bytes: The same of large blocks, whoever allocated them.
        captured: A function as one launch: the graph of what a call launches, or the function as it is.
    """

    name: str
    is_gpu: bool
    captures: bool
    turn: Turn
    lacks: Callable[[], str | None]
    machine: Callable[[], dict[str, str]]
    busy: Callable[[], str | None]
    free_bytes: Callable[[], float]
    cache_bytes: Callable[[], int]
    fresh: Callable[..., Tensor]
    peak_bytes: Callable[[Function], int]
    peak_resident_bytes: Callable[[Function], int]
    captured: Callable[[Function], Function]

    def lacks_memory(self, gib: float) -> str | None:
        """Why a job that needs so much memory cannot run here, or None."""
        free = self.free_bytes() / 2**30
        return None if free >= gib else f"needs {gib:.3g} GiB of memory, {free:.1f} are free"

    def num_sets(self, set_bytes: int) -> int:
        """How many sets of inputs make four times the cache; no more than fit into a quarter of the memory."""
        wanted = -(-4 * self.cache_bytes() // max(set_bytes, 1))
        fitting = self.free_bytes() / 4 / max(set_bytes, 1)
        return max(1, int(min(wanted, fitting)))

    def input_sets(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Inputs for a contestant to be called with in turn, so many that none is in the cache when it comes again."""
        first = make()
        num_sets = self.num_sets(sum(tensor.nbytes for tensor in first))
        return [first, *(make() for _ in range(1, num_sets))]

    def copy(self, moved_bytes: int) -> Function:
        """A copy that moves so many bytes: half of them are read, half written."""

        def buffers() -> tuple[Tensor, Tensor]:
            source = torch.randint(256, (moved_bytes // 2,), dtype=torch.uint8, device=self.name)
            return source, torch.empty_like(source)

        return rotating(lambda source, target: target.copy_(source), self.input_sets(buffers))

    def side_by_side(self, functions: Mapping[str, Function], *, seconds: float, min_rounds: int) -> dict[str, Times]:
        """The time that a call of each function takes here."""
        return timing.side_by_side(functions, seconds=seconds, min_rounds=min_rounds, turn=self.turn)


def _lacks_gpu() -> str | None:
    if not torch.cuda.is_available():
        return f"PyTorch finds no CUDA device here (torch {torch.__version__})"
    if not bigramx.build_info()["cuda_architectures"]:
        return "this build of bigramx has no CUDA kernels"
    return None


def _free_cuda_bytes() -> float:
    """What PyTorch keeps for later counts as free."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + kept


def _fresh_on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _captured(function: Function) -> Function:
    """Replays what a call launches; returns what that call returned, filled anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once, a library's workspace, an optimizer's state, is made here
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


CPU = Device(
    name="cpu",
    is_gpu=False,
    captures=False,
    turn=timing.host_turn,
    lacks=lambda: None,
    machine=machine.machine,
    busy=machine.busy,
    free_bytes=machine.free_bytes,
    cache_bytes=lambda: 0,  # one set: a loop on the processor finds its table in the cache, where it fits
    fresh=floors.empty,
    peak_bytes=timing.peak_bytes,
    peak_resident_bytes=timing.peak_resident_bytes,
    captured=lambda function: function,
)

CUDA = Device(
    name="cuda",
    is_gpu=True,
    captures=True,
    turn=timing.cuda_turn,
    lacks=_lacks_gpu,
    machine=machine.gpu,
    busy=lambda: None,
    free_bytes=_free_cuda_bytes,
    cache_bytes=lambda: torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
    fresh=_fresh_on_cuda,
    peak_bytes=timing.peak_cuda_bytes,
    peak_resident_bytes=timing.peak_cuda_bytes,
    captured=_captured,
)

DEVICES = {device.name: device for device in (CPU, CUDA)}
