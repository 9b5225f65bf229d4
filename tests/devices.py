"""Where a test runs, and what behaves differently on a GPU by design.

A test that asks for the fixture `device`, or whose file does, runs on the CPU and on CUDA, where tensors created
without a device are on the GPU. Marks restrict that:

    cpu_only            tests what only the CPU kernels do
    gpu_only            tests what only the CUDA kernels do
    device_assertion    an error on the CPU, which ends the process on a GPU; test_cuda.py runs such in subprocesses
    cuda                needs a GPU, not the emulator, and places its tensors itself

With BIGRAMX_EXTENSION=build/simt/_C.so in the environment, the emulator (tests/simt) runs the CUDA kernels on the CPU's
tensors.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from bigramx import ops

IN_SIMT = Path(os.environ.get("BIGRAMX_EXTENSION", "")).parent.name == "simt"
MARKS = ("cpu_only", "gpu_only", "device_assertion", "cuda")

_Value = TypeVar("_Value")


def devices_of(marks: set[str]) -> list[str]:
    """Where a test with these marks runs."""
    if IN_SIMT or marks & {"cpu_only", "device_assertion"}:
        return ["cpu"]
    return ["cuda"] if "gpu_only" in marks else ["cpu", "cuda"]


def devices_and_threads_of(marks: set[str]) -> list[tuple[str, int]]:
    """Where, and with how many CPU threads, which do not matter to CUDA kernels."""
    return [
        (device, num_threads)
        for device in devices_of(marks)
        for num_threads in ((1, 2, 3) if device == "cpu" and not IN_SIMT else (1,))
    ]


def skip_without_gpu() -> None:
    """Skips where CUDA tensors have no kernels."""
    missing = "the GPU emulator is in use"
    if not IN_SIMT:
        missing = "" if ops.HAS_CUDA_KERNELS else "this build has no CUDA kernels"
        missing = missing if torch.cuda.is_available() else "there is no GPU"
    if missing:
        pytest.skip(missing)


def skip_without_cpu_kernels() -> None:
    """Skips where the emulator runs the CUDA kernels on the CPU's tensors."""
    if IN_SIMT:
        pytest.skip("tests the CPU kernels")


def runs_on_gpu() -> bool:
    """Whether CUDA kernels run on tensors created without a device."""
    return IN_SIMT or torch.get_default_device().type == "cuda"


def default_sampler() -> str:
    """The sampler that None selects."""
    return "philox" if runs_on_gpu() else "torch"


def on_device(value: _Value) -> _Value:
    """Moves a CPU tensor that was made before the test to the test's device; returns anything else as it is."""
    if isinstance(value, Tensor) and value.is_cpu:
        return value.to(torch.get_default_device())  # type: ignore[return-value]
    return value


def raises_in_kernel(op: str, error: type[Exception], message: str) -> AbstractContextManager[object]:
    """Expects an error found by a kernel: the CPU's says what and where, a CUDA kernel asserts, naming the op."""
    return pytest.raises(RuntimeError, match=f"{op}: ") if IN_SIMT else pytest.raises(error, match=message)


@contextmanager
def capturing() -> Iterator[None]:
    """Has a CUDA graph capture what runs; the emulator only lets the kernels' host code believe that one does."""
    if not IN_SIMT:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield
        return
    set_capturing = ctypes.CDLL(os.environ["BIGRAMX_EXTENSION"]).simt_set_capturing
    set_capturing(True)
    try:
        yield
    finally:
        set_capturing(False)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raises where the host waits for a GPU, which the emulator cannot show."""
    if IN_SIMT:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def graph_nodes(run: Callable[[], object]) -> tuple[int, list[str]]:
    """In the emulator: the nodes that a CUDA graph of `run` has, and the ops of ATen, which may add others."""
    emulator = ctypes.CDLL(os.environ["BIGRAMX_EXTENSION"])
    emulator.simt_num_nodes.restype = ctypes.c_uint64
    emulator.simt_aten_ops.restype = ctypes.c_char_p
    before = emulator.simt_num_nodes()
    emulator.simt_aten_ops(True)
    try:
        run()
    finally:
        names = bytes(emulator.simt_aten_ops(False)).decode().split()
    return emulator.simt_num_nodes() - before, [name for name in names if name.startswith("aten::")]


def draws_frozen_by_a_graph(op: str) -> AbstractContextManager[object]:
    """Expects the error of an op that a graph captures, which would repeat what the CPU's generator gives it."""
    return pytest.raises(RuntimeError, match=f"^{op}: expected a generator on the GPU while a CUDA graph captures")


def skip_if_long(num_elements: int) -> None:
    """Skips what would take the emulator long."""
    if IN_SIMT and num_elements > 10**6:
        pytest.skip("takes long in the GPU emulator")


def fewer(count: int) -> int:
    """A tenth of the count in the emulator."""
    return count // 10 if IN_SIMT else count
