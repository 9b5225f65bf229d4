"""What forward and backward cost over the number of tokens and over the size of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import peers
from benchmarks.bench_embedding_cross_entropy import LIGER, TOLERANCES, backward, random_pairs
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, assert_within
from bigramx import functional


def over_tokens(config: RunConfig, sizes: Sequence[int]) -> Result:
    """V = 1024: the time of eager PyTorch grows with N * V."""
    return curve("forward + backward, no logits, V=1024, over N", "N", {size: (size, 1024) for size in sizes}, config)


def over_vocabulary(config: RunConfig, sizes: Sequence[int]) -> Result:
    """N = 4096: our time grows with the table."""
    return curve("forward + backward, no logits, N=4096, over V", "V", {size: (4096, size) for size in sizes}, config)


def curve(case: str, over: str, points: dict[int, tuple[int, int]], config: RunConfig) -> Result:
    """A comparison for each size and its (N, V); a quick run leaves out the four largest, which take the longest."""
    sizes = list(points)[:-4] if config.quick else list(points)
    result = Result(case, series={over: [float(size) for size in sizes]})
    for size in sizes:
        point = compare(f"{case}, {over}={size}", *points[size], replace(config, seconds=config.seconds / len(sizes)))
        result.skipped |= point.skipped
        for name, times in point.implementations.items():
            result.series.setdefault(name, []).append(times.median)
    return result


def compare(case: str, num_tokens: int, vocab_size: int, config: RunConfig) -> Result:
    """A single size."""
    device = config.device
    comparison = Comparison(case, check=assert_within(TOLERANCES[torch.float32]))
    if reason := device.lacks_memory(16 * vocab_size * (vocab_size + num_tokens)):  # table and logits, four times
        return comparison.skip(reason)
    sets = device.input_sets(lambda: random_pairs(device, vocab_size, num_tokens, every_row=False))
    comparison.add(OURS, backward(functional.embedding_cross_entropy, sets))
    comparison.add("eager", backward(peers.eager_loss, sets))
    if device.is_gpu:
        comparison.add_peer(LIGER, lambda: backward(peers.liger_loss(), sets))
    return comparison.run(config)


CASES = [
    Case(over_tokens, sizes=[2**k for k in range(6, 19)]),
    Case(over_vocabulary, sizes=[2**k for k in range(6, 15)]),
]

CUDA_CASES = [
    Case(over_tokens, sizes=[2**k for k in range(6, 21)]),
    Case(over_vocabulary, sizes=[2**k for k in range(6, 16)]),
]
