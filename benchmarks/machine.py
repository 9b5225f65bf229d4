"""The machine: what a figure needs to be understood elsewhere, and what limits the sizes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
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


def gpu() -> dict[str, str]:
    """The card, what drives it, and the versions of all that was measured there."""
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": card.name,
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "L2": f"{card.L2_cache_size / 2**20:.0f} MiB",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "kernels for": bigramx.build_info()["cuda_architectures"],
        "compiler": bigramx.build_info()["compiler"],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger-kernel": _version("liger-kernel"),
        "python": platform.python_version(),
        "processor": _processor(),
        "system": platform.system(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


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


def free_bytes() -> float:
    """Of memory; infinitely many where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


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
