"""Draws from rows of probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.race import OURS, Effort, Race, Result, assert_equal, assert_means_within, faster_than
from benchmarks.timing import Function, rotating
from bigramx import functional
from bigramx.functional import Sampler


def one_draw(
    effort: Effort, num_rows: int, vocab_size: int, sampler: Sampler, target: float, captured: bool = False
) -> Result:
    """A token for each row; captured, what is left of the time is the draw, on probabilities that are in the cache."""
    device = effort.device
    sets = device.input_sets(lambda: (torch.rand(num_rows, vocab_size, device=device.name),))
    probs = sets[0][0]
    race = Race(
        f'multinomial, one draw from each row of ({num_rows}, {vocab_size}), sampler "{sampler}"'
        + captured * ", captured",
        [faster_than("torch.multinomial", target)],
        bytes_moved=probs.nbytes,
        same=assert_equal if sampler == "torch" else assert_means_within(0.1 * vocab_size),
    )

    def contestant(function: Callable[[Tensor], object]) -> Function:
        return device.captured(lambda: function(probs)) if captured else rotating(function, sets)

    race.add(OURS, contestant(lambda probs: functional.multinomial(probs, 1, sampler=sampler)))
    race.add("torch.multinomial", contestant(lambda probs: torch.multinomial(probs, 1)))
    if sampler == "philox" and not device.is_gpu:  # whose draws may be anyone's
        race.add_peer("JAX", lambda: peers.jax_multinomial(probs))
        race.add_peer("NumPy", lambda: peers.numpy_multinomial(probs, 1))
    race.add_floor("a pass over the probabilities", contestant(lambda probs: probs.sum()))
    return race.run(effort)


def many_draws(effort: Effort) -> Result:
    """10^6 draws with replacement from one row."""
    vocab_size, num_samples = 50_257, 10**6
    probs = torch.rand(1, vocab_size)
    race = Race(
        f"multinomial, 10^6 draws with replacement from a row of {vocab_size}",
        [faster_than("torch.multinomial", 10)],
        same=assert_means_within(0.01 * vocab_size),
    )
    race.add(OURS, lambda: functional.multinomial(probs, num_samples, True, sampler="philox"))
    race.add('bigramx, sampler "torch"', lambda: functional.multinomial(probs, num_samples, True, sampler="torch"))
    race.add("torch.multinomial", lambda: torch.multinomial(probs, num_samples, True))
    race.add_peer("JAX", lambda: peers.jax_choice(probs[0], num_samples))
    race.add_peer("NumPy", lambda: peers.numpy_multinomial(probs, num_samples))
    return race.run(effort)


JOBS = [
    partial(one_draw, num_rows=1024, vocab_size=65, sampler="philox", target=10),
    partial(one_draw, num_rows=1024, vocab_size=65, sampler="torch", target=3),
    partial(one_draw, num_rows=64, vocab_size=50_257, sampler="philox", target=10),
    partial(one_draw, num_rows=64, vocab_size=50_257, sampler="torch", target=3),
    many_draws,
]

CUDA_JOBS = [
    partial(one_draw, num_rows=num_rows, vocab_size=vocab_size, sampler="philox", target=2, captured=captured)
    for num_rows, vocab_size in ((1024, 65), (64, 50_257))
    for captured in (False, True)
]
