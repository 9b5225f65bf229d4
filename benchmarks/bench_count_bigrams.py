"""The counts of pairs."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import floors, peers
from benchmarks.race import OURS, Effort, Race, Result, faster_than, ns_a_token
from bigramx import functional, reference


def count(effort: Effort, dtype: torch.dtype) -> Result:
    """2 * 10^7 tokens of a text, V = 65."""
    num_tokens, vocab_size = 2 * 10**7, 65
    tokens = peers.text_tokens(num_tokens, vocab_size).to(dtype)
    reaches = [faster_than("torch.bincount", 20)]
    if dtype == torch.uint16:
        reaches.append(ns_a_token(num_tokens, 0.6))
    name = str(dtype).removeprefix("torch.")
    race = Race(f"count_bigrams, 2*10^7 tokens of {name}, V={vocab_size}", reaches, bytes_moved=tokens.nbytes)
    race.add(OURS, lambda: functional.count_bigrams(tokens, vocab_size))
    race.add("torch.bincount", lambda: reference.count_bigrams(tokens, vocab_size))
    race.add_peer("NumPy", lambda: peers.numpy_count_bigrams(tokens, vocab_size))
    race.add_peer("JAX", lambda: peers.jax_count_bigrams(tokens, vocab_size))
    race.add_floor("reading the tokens", lambda: floors.read(tokens))
    return race.run(effort)


JOBS = [partial(count, dtype=torch.int64), partial(count, dtype=torch.uint16)]
