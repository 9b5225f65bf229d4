"""The floors of floors.cpp, compiled for this machine when first called."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load

from bigramx import reference

ROOT = Path(__file__).parents[1]


def compile_ops(name: str, *flags: str) -> Any:
    """Compiles ``<name>.cpp`` of this folder into build/benchmarks; its ops."""
    folder = ROOT / "build" / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    load(
        name=f"bigramx_benchmarks_{name}",
        sources=[str(Path(__file__).with_name(f"{name}.cpp"))],
        extra_cflags=["-O3", "-g0", *flags],
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
    return getattr(torch.ops, f"bigramx_benchmarks_{name}")


@functools.cache
def _ops() -> Any:
    widest = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return compile_ops("floors", "-march=native", "-fno-math-errno", "-fno-trapping-math", *widest)


class NoopModel(reference.BigramLanguageModel):
    """The model around a C++ autograd function that computes nothing."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.noop = _ops().noop.default

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns memory of the right shapes."""
        loss, logits = self.noop(idx, self.token_embedding_table.weight, targets)
        return logits, loss


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory, huge pages advised, as the gradient of a large table gets it."""
    tensor = torch.empty(shape, dtype=dtype)
    _ops().advise_huge_pages(tensor)
    return tensor


def read(*tensors: Tensor) -> None:
    """Reads each tensor once."""
    for tensor in tensors:
        _ops().read(tensor)


def twister(num_words: int) -> None:
    """Draws words of the Mersenne Twister, in vectors."""
    _ops().twister(num_words)


def exp_and_adamw(num_elements: int) -> None:
    """An exponential and an AdamW update for each of so many elements, in L1, in vectors, on one thread."""
    _ops().exp_and_adamw(num_elements)


def dependent_loads(num_loads: int) -> None:
    """Loads from L1, each from the place that the one before names."""
    _ops().dependent_loads(num_loads)
