"""The batches that a training loop draws."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, faster_than
from bigramx import data


def get_batch(config: RunConfig, target: float) -> Result:
    """B = 32, T = 8 of 10^6 tokens, the same draws: a batch for the device."""
    device = config.device
    comparison = Comparison("get_batch, B=32 T=8 of 10^6 tokens", [faster_than("eager", target)])
    on_host = peers.text_tokens(10**6)
    tokens = on_host.to(device.name)

    def lecture_get_batch() -> object:
        return tuple(tensor.to(device.name) for tensor in peers.lecture_get_batch(on_host, 32, 8))

    comparison.add(OURS, lambda: data.get_batch(tokens, 32, 8))
    comparison.add("eager", lecture_get_batch)
    if device.is_gpu:
        comparison.add("eager, tokens on the GPU", lambda: peers.lecture_get_batch(tokens, 32, 8))
    else:
        comparison.add_peer("NumPy", lambda: peers.numpy_get_batch(tokens))
    comparison.add_lower_bound("torch.randint alone", lambda: torch.randint(len(tokens) - 8, (32,)))
    return comparison.run(config)


CASES = [Case(get_batch, target=40)]

CUDA_CASES = [Case(get_batch, target=20)]
