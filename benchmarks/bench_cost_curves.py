"""What a step costs over the number of tokens and over the size of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import peers
from benchmarks.bench_embedding_cross_entropy import LIGER, TOLERANCES, Pairs, backward
from benchmarks.race import OURS, Effort, Race, Result, assert_within
from bigramx import functional


def over_tokens(effort: Effort, sizes: Sequence[int]) -> Result:
    """V = 1024: eager's time grows with N * V."""
    job = "forward + backward, no logits, V=1024, over N"
    return curve(job, "N", {num_tokens: (num_tokens, 1024) for num_tokens in sizes}, effort)


def over_vocabulary(effort: Effort, sizes: Sequence[int]) -> Result:
    """N = 4096: ours grows with the table."""
    job = "forward + backward, no logits, N=4096, over V"
    return curve(job, "V", {vocab_size: (4096, vocab_size) for vocab_size in sizes}, effort)


def curve(job: str, over: str, cases: dict[int, tuple[int, int]], effort: Effort) -> Result:
    """A race for each size and its (N, V); in a quick run without the four largest, which take the longest."""
    sizes = list(cases)[:-4] if effort.quick else list(cases)
    result = Result(job, series={over: [float(size) for size in sizes]})
    for size in sizes:
        point = race(f"{job}, {over}={size}", *cases[size], replace(effort, seconds=effort.seconds / len(sizes)))
        result.skipped |= point.skipped
        for name, seconds in point.seconds.items():
            result.series.setdefault(name, []).append(seconds)
    return result


def race(job: str, num_tokens: int, vocab_size: int, effort: Effort) -> Result:
    """One size."""
    device = effort.device
    race = Race(job, same=assert_within(TOLERANCES[torch.float32]))
    if reason := device.lacks_memory(16 * vocab_size * (vocab_size + num_tokens) / 2**30):  # four times both
        return race.skip(reason)

    def pairs() -> Pairs:
        weight = torch.randn(vocab_size, vocab_size, device=device.name, requires_grad=True)
        idx, targets = (torch.randint(vocab_size, (num_tokens,), device=device.name) for _ in range(2))
        return idx, weight, targets

    sets = device.input_sets(pairs)
    race.add(OURS, backward(functional.embedding_cross_entropy, sets))
    race.add("eager", backward(peers.eager_loss, sets))
    if device.is_gpu:
        race.add_peer(LIGER, lambda: backward(peers.liger_loss(), sets))
    return race.run(effort)


JOBS = [
    partial(over_tokens, sizes=[2**k for k in range(6, 19)]),
    partial(over_vocabulary, sizes=[2**k for k in range(6, 15)]),
]

CUDA_JOBS = [
    partial(over_tokens, sizes=[2**k for k in range(6, 21)]),
    partial(over_vocabulary, sizes=[2**k for k in range(6, 16)]),
]
