"""The floors of floors.cpp, compiled for this machine when first called."""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load

from bigramx import ops, reference

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
def _floors() -> Any:
    widest = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return compile_module("floors", "-march=native", "-fno-math-errno", "-fno-trapping-math", *widest)


class NoopModel(reference.BigramLanguageModel):
    """The model around a C++ autograd function that computes nothing."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        native = _floors().noop
        self.noop = ops.direct(torch.ops.bigramx_benchmarks_floors.noop.default, native)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns memory of the right shapes."""
        loss, logits = self.noop(idx, self.token_embedding_table.weight, targets)
        return logits, loss


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory, huge pages advised, as the gradient of a large table gets it."""
    tensor = torch.empty(shape, dtype=dtype)
    _floors().advise_huge_pages(tensor)
    return tensor


def read(*tensors: Tensor) -> None:
    """Reads each tensor once."""
    for tensor in tensors:
        _floors().read_words(tensor)


def twister(num_words: int) -> None:
    """Draws words of the Mersenne Twister, in vectors."""
    _floors().twister(num_words)


def exp_and_adamw(num_elements: int) -> None:
    """An exponential and an AdamW update for each of so many elements, in L1, in vectors, on one thread."""
    _floors().exp_and_adamw(num_elements)


def dependent_loads(num_loads: int) -> None:
    """Loads from L1, each from the place that the one before names."""
    _floors().dependent_loads(num_loads)
