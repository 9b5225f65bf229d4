"""Where a test runs, and what is by design another behaviour on a GPU.

A test that asks for the fixture `device`, or whose file does, runs on the CPU and on CUDA; there the tensors that name
no device lie on the GPU. Marks name what runs elsewhere:

    cpu_only            about what the kernels of the CPU alone do
    gpu_only            about what the kernels of a GPU alone do
    device_assertion    raises what ends the process on a GPU; test_cuda.py has such in processes of their own
    cuda                for a GPU, not for its stand-in; says where its tensors lie

BIGRAMX_SIMT in the environment: the CUDA kernels run on the CPU, and serve its tensors.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from bigramx import ops

IN_SIMT = bool(os.environ.get("BIGRAMX_SIMT"))
MARKS = ("cpu_only", "gpu_only", "device_assertion", "cuda")

_Value = TypeVar("_Value")


def devices_of(marks: set[str]) -> list[str]:
    """Where a test with these marks runs."""
    if IN_SIMT or marks & {"cpu_only", "device_assertion"}:
        return ["cpu"]
    return ["cuda"] if "gpu_only" in marks else ["cpu", "cuda"]


def devices_and_threads_of(marks: set[str]) -> list[tuple[str, int]]:
    """Where, and in how many threads: the kernels of a GPU know of none."""
    return [
        (device, num_threads)
        for device in devices_of(marks)
        for num_threads in ((1, 2, 3) if device == "cpu" and not IN_SIMT else (1,))
    ]


def skip_without_gpu() -> None:
    """Skips where CUDA tensors have no kernels."""
    missing = "the stand-in for a GPU is in use"
    if not IN_SIMT:
        missing = "" if ops.HAS_CUDA_KERNELS else "this build has no CUDA kernels"
        missing = missing if torch.cuda.is_available() else "there is no GPU"
    if missing:
        pytest.skip(missing)


def skip_without_cpu_kernels() -> None:
    """Skips where the CUDA kernels serve the CPU's tensors."""
    if IN_SIMT:
        pytest.skip("about the kernels of the CPU")


def runs_on_gpu() -> bool:
    """Whether the CUDA kernels serve tensors that name no device."""
    return IN_SIMT or torch.get_default_device().type == "cuda"


def default_sampler() -> str:
    """The one that None stands for."""
    return "philox" if runs_on_gpu() else "torch"


def on_device(value: _Value) -> _Value:
    """A tensor of the CPU, made before the test, on its device; anything else as it is."""
    if isinstance(value, Tensor) and value.is_cpu:
        return value.to(torch.get_default_device())  # type: ignore[return-value]
    return value


def raises_in_kernel(op: str, error: type[Exception], message: str) -> AbstractContextManager[object]:
    """Expects what a kernel finds wrong: the CPU's says what and where, a GPU's stops with an assertion of the op."""
    return pytest.raises(RuntimeError, match=f"{op}: ") if IN_SIMT else pytest.raises(error, match=message)


def skip_if_long(num_elements: int) -> None:
    """Skips what the stand-in would take long for."""
    if IN_SIMT and num_elements > 10**6:
        pytest.skip("long in the stand-in for a GPU")


def fewer(count: int) -> int:
    """A tenth of them in the stand-in."""
    return count // 10 if IN_SIMT else count
