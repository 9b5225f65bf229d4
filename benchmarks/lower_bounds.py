"""The lower bounds of lower_bounds.cpp, compiled for this machine when first called."""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load

ROOT = Path(__file__).parents[1]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []


def compile_module(name: str, *flags: str) -> Any:
    """Compiles ``<name>.cpp`` of this folder into build/benchmarks, and imports it."""
    folder = ROOT / "build" / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return load(
        name=f"bigramx_benchmarks_{name}",
        sources=[str(Path(__file__).with_name(f"{name}.cpp"))],
        extra_cflags=["-O3", "-g0", *OPENMP, *flags],
        extra_ldflags=[*OPENMP],
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(folder),
    )


@functools.cache
def native() -> Any:
    """The functions of lower_bounds.cpp; results that only keep the compiler from dropping the work."""
    widest = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return compile_module("lower_bounds", "-march=native", "-fno-math-errno", "-fno-trapping-math", *widest)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory with huge pages advised, as the gradient of a large table gets it."""
    tensor = torch.empty(shape, dtype=dtype)
    native().advise_huge_pages(tensor)
    return tensor
