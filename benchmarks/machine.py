"""The machine: what a figure needs to be understood elsewhere, and what limits the sizes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import bigramx


def machine() -> dict[str, str]:
    """The processor, the threads, and the versions of all that was measured."""
    return {
        "processor": _processor(),
        "cores": str(torch.get_num_threads()),
        "capability": bigramx.build_info()["cpu_capability"],
        "compiler": bigramx.build_info()["compiler"],
        "torch": torch.__version__,
        "jax": _version("jax"),
        "numpy": _version("numpy"),
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def lacks_memory(gib: float) -> str | None:
    """Why a job that needs so much memory cannot run here, or None."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))
    return None if available >= gib else f"needs {gib:g} GiB of memory, {available:.1f} are free"


def busy() -> str | None:
    """Why little can be measured here now, or None: threads that must wait for a core make others wait for them."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"this machine is busy (load {load:.1f} on {cores} cores)" if load > cores / 2 else None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, and so bigramx, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
