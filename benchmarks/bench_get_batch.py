"""The batches that a training loop draws."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.race import OURS, Effort, Race, Result, faster_than
from bigramx import data


def get_batch(effort: Effort) -> Result:
    """B = 32, T = 8 of 10^6 tokens, the same draws."""
    race = Race("get_batch, B=32 T=8 of 10^6 tokens", [faster_than("the lecture's", 40)])
    tokens = peers.text_tokens(10**6)
    race.add(OURS, lambda: data.get_batch(tokens, 32, 8))
    race.add("the lecture's", lambda: peers.lecture_get_batch(tokens, 32, 8))
    race.add_peer("NumPy", lambda: peers.numpy_get_batch(tokens))
    race.add_floor("torch.randint alone", lambda: torch.randint(len(tokens) - 8, (32,)))
    return race.run(effort)


JOBS = [get_batch]
