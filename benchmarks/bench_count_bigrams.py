"""The counts of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import floors, peers
from benchmarks.device import COPY
from benchmarks.race import (
    OURS,
    Effort,
    Race,
    Reach,
    Result,
    faster_than,
    in_powers_of_ten,
    ns_a_token,
    percent_of,
)
from benchmarks.timing import rotating
from bigramx import functional, reference


def count(
    effort: Effort,
    num_tokens: int,
    vocab_size: int,
    reaches: Sequence[Reach],
    dtype: torch.dtype = torch.int64,
    draw: Callable[[int, int], Tensor] = peers.text_tokens,
) -> Result:
    """Tokens of a text; for a large V, which no text that is at hand has, drawn as words are distributed."""
    device = effort.device
    drawn = draw(num_tokens, vocab_size).to(dtype)
    sets = device.input_sets(lambda: (drawn.to(device.name, copy=True),))
    tokens = sets[0][0]
    name = str(dtype).removeprefix("torch.")
    race = Race(
        f"count_bigrams, {in_powers_of_ten(num_tokens)} tokens of {name}, V={vocab_size}",
        reaches,
        bytes_moved=tokens.nbytes + 8 * vocab_size**2,
    )
    race.add(OURS, rotating(lambda tokens: functional.count_bigrams(tokens, vocab_size), sets))
    race.add("torch.bincount", rotating(lambda tokens: reference.count_bigrams(tokens, vocab_size), sets))
    if device.is_gpu:
        race.add_copy(device, tokens.nbytes + 8 * vocab_size**2)
    else:
        race.add_peer("NumPy", lambda: peers.numpy_count_bigrams(tokens, vocab_size))
        race.add_peer("JAX", lambda: peers.jax_count_bigrams(tokens, vocab_size))
        race.add_floor("reading the tokens", lambda: floors.read(tokens))
    return race.run(effort)


JOBS = [
    partial(count, num_tokens=2 * 10**7, vocab_size=65, reaches=[faster_than("torch.bincount", 20)]),
    partial(
        count,
        num_tokens=2 * 10**7,
        vocab_size=65,
        dtype=torch.uint16,
        reaches=[faster_than("torch.bincount", 20), ns_a_token(2 * 10**7, 0.6)],
    ),
]

CUDA_JOBS = [
    partial(count, num_tokens=10**8, vocab_size=65, reaches=[percent_of(COPY, 50)]),
    partial(
        count,
        num_tokens=2 * 10**7,
        vocab_size=8192,
        draw=peers.zipf_tokens,
        reaches=[faster_than("torch.bincount", 3)],
    ),
]
