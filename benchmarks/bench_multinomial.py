"""Draws from rows of probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparison import (
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    assert_equal,
    assert_means_within,
    faster_than,
)
from benchmarks.timing import Function, rotating
from bigramx import functional
from bigramx.functional import Sampler


def one_draw(
    config: RunConfig, num_rows: int, vocab_size: int, sampler: Sampler, target: float, captured: bool = False
) -> Result:
    """A token for each row; captured, only the draw itself is timed, from probabilities that are in the cache."""
    device = config.device
    sets = device.input_sets(lambda: (torch.rand(num_rows, vocab_size, device=device.name),))
    probs = sets[0][0]
    comparison = Comparison(
        f'multinomial, one draw from each row of ({num_rows}, {vocab_size}), sampler "{sampler}"'
        + captured * ", captured",
        [faster_than("torch.multinomial", target)],
        bytes_moved=probs.nbytes,
        check=assert_equal if sampler == "torch" else assert_means_within(0.1 * vocab_size),
    )

    def prepared(function: Callable[[Tensor], object]) -> Function:
        return device.capture(lambda: function(probs)) if captured else rotating(function, sets)

    comparison.add(OURS, prepared(lambda probs: functional.multinomial(probs, 1, sampler=sampler)))
    comparison.add("torch.multinomial", prepared(lambda probs: torch.multinomial(probs, 1)))
    if sampler == "philox" and not device.is_gpu:  # which need not draw as torch.multinomial does
        comparison.add_peer("JAX", lambda: peers.jax_multinomial(probs))
        comparison.add_peer("NumPy", lambda: peers.numpy_multinomial(probs, 1))
    comparison.add_lower_bound("a pass over the probabilities", prepared(lambda probs: probs.sum()))
    return comparison.run(config)


def many_draws(config: RunConfig) -> Result:
    """10^6 draws with replacement from one row."""
    vocab_size, num_samples = 50_257, 10**6
    probs = torch.rand(1, vocab_size)
    comparison = Comparison(
        f"multinomial, 10^6 draws with replacement from a row of {vocab_size}",
        [faster_than("torch.multinomial", 10)],
        check=assert_means_within(0.01 * vocab_size),
    )
    comparison.add(OURS, lambda: functional.multinomial(probs, num_samples, True, sampler="philox"))
    comparison.add(
        'bigramx, sampler "torch"', lambda: functional.multinomial(probs, num_samples, True, sampler="torch")
    )
    comparison.add("torch.multinomial", lambda: torch.multinomial(probs, num_samples, True))
    comparison.add_peer("JAX", lambda: peers.jax_choice(probs[0], num_samples))
    comparison.add_peer("NumPy", lambda: peers.numpy_multinomial(probs, num_samples))
    return comparison.run(config)


HEADLINE = "`multinomial`: a draw from each of 64 rows, V=50257"

CASES = [
    Case(one_draw, num_rows=1024, vocab_size=65, sampler="philox", target=10),
    Case(one_draw, num_rows=1024, vocab_size=65, sampler="torch", target=3),
    Case(one_draw, num_rows=64, vocab_size=50_257, sampler="philox", target=10),
    Case(one_draw, headline=HEADLINE, num_rows=64, vocab_size=50_257, sampler="torch", target=3),
    Case(many_draws),
]

CUDA_CASES = [
    Case(one_draw, num_rows=1024, vocab_size=65, sampler="philox", target=2),
    Case(one_draw, num_rows=1024, vocab_size=65, sampler="philox", target=2, captured=True),
    Case(one_draw, headline=HEADLINE, num_rows=64, vocab_size=50_257, sampler="philox", target=2),
    Case(one_draw, num_rows=64, vocab_size=50_257, sampler="philox", target=2, captured=True),
]
