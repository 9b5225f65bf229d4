"""What a step costs over the number of tokens and over the size of the table."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks import peers
from benchmarks.bench_embedding_cross_entropy import backward
from benchmarks.race import OURS, Effort, Result
from benchmarks.timing import side_by_side
from bigramx import functional


def over_tokens(effort: Effort) -> Result:
    """V = 1024: eager's time grows with N * V."""
    sizes = [2**k for k in range(6, 15 if effort.quick else 19)]
    return curve("forward + backward, no logits, V=1024, over N", "N", sizes, ((n, 1024) for n in sizes), effort)


def over_vocabulary(effort: Effort) -> Result:
    """N = 4096: ours grows with the table."""
    sizes = [2**k for k in range(6, 13 if effort.quick else 15)]
    return curve("forward + backward, no logits, N=4096, over V", "V", sizes, ((4096, v) for v in sizes), effort)


def curve(job: str, over: str, sizes: list[int], cases: Iterable[tuple[int, int]], effort: Effort) -> Result:
    """The times of (N, V) after (N, V)."""
    series: dict[str, list[float]] = {over: [float(size) for size in sizes]}
    for num_tokens, vocab_size in cases:
        weight = torch.randn(vocab_size, vocab_size, requires_grad=True)
        idx, targets = (torch.randint(vocab_size, (num_tokens,)) for _ in range(2))
        contestants = {
            OURS: backward(functional.embedding_cross_entropy, idx, weight, targets),
            "eager": backward(peers.eager_loss, idx, weight, targets),
        }
        times = side_by_side(contestants, seconds=effort.seconds / len(sizes), min_rounds=effort.min_rounds)
        for name, time in times.items():
            series.setdefault(name, []).append(time.median)
    return Result(job, series=series)


JOBS = [over_tokens, over_vocabulary]
