"""Forward and backward of the loss: the model's step at the lecture's size, and a large table without logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.cpp_extension import load

import bigramx
from benchmarks.timing import peak_bytes, side_by_side
from bigramx import functional, reference


class NoopModel(reference.BigramLanguageModel):
    """The model around a C++ autograd function that computes nothing."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        source = Path(__file__).with_name("noop.cpp")
        load(name="bigramx_noop", sources=[str(source)], extra_cflags=["-O2"], is_python_module=False)
        self.noop = torch.ops.bigramx_benchmarks.noop.default

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns memory of the right shapes."""
        loss, logits = self.noop(idx, self.token_embedding_table.weight, targets)
        return logits, loss


def lecture_step(rounds: int) -> dict[str, Any]:
    """Forward and backward through the model, logits returned: V = 65, B = 32, T = 8."""
    idx, targets = torch.randint(65, (32, 8)), torch.randint(65, (32, 8))

    def step(model: torch.nn.Module) -> Callable[[], None]:
        weight = model.get_parameter("token_embedding_table.weight")

        def run() -> None:
            _logits, loss = model(idx, targets)
            loss.backward()
            weight.grad = None

        return run

    models = {
        "bigramx": bigramx.BigramLanguageModel(65),
        "eager": reference.BigramLanguageModel(65),
        "no-op": NoopModel(65),
    }
    seconds = side_by_side({name: step(model) for name, model in models.items()}, rounds=rounds, repeats=100)
    return {
        "job": "forward + backward, logits returned, V=65 B=32 T=8",
        "seconds": seconds,
        "ratio": seconds["eager"] / seconds["bigramx"],
        "reach": 3.0,
    }


def large_table(rounds: int) -> dict[str, Any]:
    """Forward and backward without logits: V = 4096, N = 8192, and the memory beyond table and gradient."""
    vocab_size, num_pairs = 4096, 8192
    weight = torch.randn(vocab_size, vocab_size, requires_grad=True)
    idx, targets = torch.randint(vocab_size, (num_pairs,)), torch.randint(vocab_size, (num_pairs,))

    # Each frees its own gradient, and leaves none for the other to free.
    def ours() -> None:
        functional.embedding_cross_entropy(idx, weight, targets).backward()
        weight.grad = None

    def eager() -> None:
        F.cross_entropy(F.embedding(idx, weight), targets).backward()
        weight.grad = None

    seconds = side_by_side({"bigramx": ours, "eager": eager}, rounds=rounds)
    gradient_bytes = weight.nbytes
    return {
        "job": "forward + backward, no logits, V=4096 N=8192",
        "seconds": seconds,
        "ratio": seconds["eager"] / seconds["bigramx"],
        "reach": 10.0,
        "peak_bytes_beyond_gradient": peak_bytes(ours) - gradient_bytes,
        "peak_bytes_reach": 16 * (num_pairs + vocab_size),
        "eager_peak_bytes_beyond_gradient": peak_bytes(eager) - gradient_bytes,
    }
