"""The counts of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    COPY,
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    Target,
    faster_than,
    ns_per_token,
    percent_of,
)
from benchmarks.timing import rotating
from bigramx import functional, reference


def count(
    config: RunConfig,
    num_tokens: int,
    vocab_size: int,
    targets: Sequence[Target],
    dtype: torch.dtype = torch.int64,
    draw: Callable[[int, int], Tensor] = peers.text_tokens,
) -> Result:
    """Tokens of a text; for a large V, which the text does not have, drawn as words are distributed."""
    device = config.device
    drawn = draw(num_tokens, vocab_size).to(dtype)
    sets = device.input_sets(lambda: (drawn.to(device.name, copy=True),))
    tokens = sets[0][0]
    name = str(dtype).removeprefix("torch.")
    comparison = Comparison(
        f"count_bigrams, {peers.in_powers_of_ten(num_tokens)} tokens of {name}, V={vocab_size}",
        targets,
        bytes_moved=tokens.nbytes + 8 * vocab_size**2,
    )
    comparison.add(OURS, rotating(lambda tokens: functional.count_bigrams(tokens, vocab_size), sets))
    comparison.add("torch.bincount", rotating(lambda tokens: reference.count_bigrams(tokens, vocab_size), sets))
    if device.is_gpu:
        comparison.add_copy(device, tokens.nbytes + 8 * vocab_size**2)
    else:
        comparison.add_peer("NumPy", lambda: peers.numpy_count_bigrams(tokens, vocab_size))
        comparison.add_peer("JAX", lambda: peers.jax_count_bigrams(tokens, vocab_size))
        comparison.add_lower_bound("reading the tokens", partial(lower_bounds.native().read_words, tokens))
    return comparison.run(config)


CASES = [
    Case(
        count,
        headline="`count_bigrams`: the pairs of 20 million tokens, V=65",
        num_tokens=2 * 10**7,
        vocab_size=65,
        targets=[faster_than("torch.bincount", 20)],
    ),
    Case(
        count,
        num_tokens=2 * 10**7,
        vocab_size=65,
        dtype=torch.uint16,
        targets=[faster_than("torch.bincount", 20), ns_per_token(2 * 10**7, 0.6)],
    ),
]

CUDA_CASES = [
    Case(
        count,
        headline="`count_bigrams`: the pairs of 100 million tokens, V=65",
        num_tokens=10**8,
        vocab_size=65,
        targets=[percent_of(COPY, 50)],
    ),
    Case(
        count,
        num_tokens=2 * 10**7,
        vocab_size=8192,
        draw=peers.zipf_tokens,
        targets=[faster_than("torch.bincount", 3)],
    ),
]
