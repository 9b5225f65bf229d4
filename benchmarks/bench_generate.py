"""Generation: the lecture's tokens from the same seed, and long chains by a counter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import bigramx
from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    OURS,
    Case,
    Comparison,
    Medians,
    Result,
    RunConfig,
    Target,
    assert_equal,
    assert_means_within,
    at_least,
    faster_than,
    ns_per_token,
    within,
)
from bigramx import functional, reference

LOOP = "the lecture's loop"


def same_tokens(config: RunConfig, batch_size: int, target: float) -> Result:
    """Sampler "torch": the tokens of the lecture's loop."""
    vocab_size, num_tokens = 65, 500
    comparison = Comparison(
        f'generate {num_tokens} tokens, sampler "torch", V={vocab_size} B={batch_size}',
        [faster_than(LOOP, target)],
    )
    eager, ours = reference.BigramLanguageModel(vocab_size), bigramx.BigramLanguageModel(vocab_size)
    ours.load_state_dict(eager.state_dict())
    idx = torch.zeros((batch_size, 1), dtype=torch.long)
    comparison.add(OURS, lambda: ours.generate(idx, num_tokens, sampler="torch"))
    comparison.add(LOOP, torch.no_grad()(lambda: eager.generate(idx, num_tokens)))
    num_words = 2 * vocab_size * num_tokens * batch_size
    comparison.add_lower_bound(
        "2 V words of the Mersenne Twister a token", partial(lower_bounds.native().mersenne_twister, num_words)
    )
    return comparison.run(config)


def own_tokens(config: RunConfig, batch_size: int, num_tokens: int, targets: Sequence[Target] = ()) -> Result:
    """The same for those who draw differently from torch.multinomial on the CPU; V = 65."""
    device, vocab_size = config.device, 65
    comparison = Comparison(
        f'generate {num_tokens} tokens, sampler "philox", V={vocab_size} B={batch_size}',
        targets,
        check=assert_means_within(0.1 * vocab_size),
    )
    eager = reference.BigramLanguageModel(vocab_size).to(device.name)
    model = bigramx.BigramLanguageModel(vocab_size).to(device.name)
    model.load_state_dict(eager.state_dict())
    weight = model.token_embedding_table.weight
    idx = torch.zeros((batch_size, 1), dtype=torch.long, device=device.name)
    comparison.add(OURS, lambda: model.generate(idx, num_tokens, sampler="philox"))
    if device.is_gpu:
        comparison.add(LOOP, torch.no_grad()(lambda: eager.generate(idx, num_tokens)))
        return comparison.run(config)
    comparison.add_peer("JAX lax.scan", lambda: peers.jax_generate(weight, batch_size, num_tokens))
    if batch_size == 1:
        comparison.add_peer("NumPy", lambda: peers.numpy_generate(weight, num_tokens))
    return comparison.run(config)


def long_chain(config: RunConfig, vocab_size: int, num_threads: int, target: float) -> Result:
    """One chain of 10^7 tokens, sampler "philox"."""
    num_tokens = 10**7
    comparison = Comparison(
        f'generate 10^7 tokens in one chain, sampler "philox", V={vocab_size}, {num_threads} thread'
        + "s" * (num_threads > 1),
        [ns_per_token(num_tokens, target)],
    )
    weight = torch.randn(vocab_size, vocab_size)

    def ours() -> Tensor:
        with threads(num_threads):
            return chain(weight, num_tokens)

    comparison.add(OURS, ours)
    comparison.add_lower_bound(
        "a dependent load from L1 a token", partial(lower_bounds.native().dependent_loads, num_tokens)
    )
    return comparison.run(config, memory=config.device.peak_bytes, memory_of=(OURS,))


def chain_over_time(config: RunConfig, vocab_size: int, num_tokens: int, short: int, target: float) -> Result:
    """One long chain on a GPU, parallel over time, against what a token costs if it has to wait for the previous one.

    That is what ``short`` more tokens cost a chain of as many, which is not split into segments; both are captured, so
    that neither waits for its launches.
    """
    device, shorter, longer = config.device, f"bigramx, {short} tokens", f"bigramx, {2 * short} tokens"

    def speedup(medians: Medians) -> float:
        return num_tokens * (medians[longer] - medians[shorter]) / short / medians[OURS]

    def same_beginning(actual: Tensor, expected: Tensor) -> None:
        assert_equal(actual, expected[:, : actual.size(1)])

    comparison = Comparison(
        f'generate {peers.in_powers_of_ten(num_tokens)} tokens in one chain, sampler "philox", V={vocab_size}',
        [at_least(target, "x one token after the other", speedup)],
        check=same_beginning,
    )
    weight = torch.randn(vocab_size, vocab_size, device=device.name)
    comparison.add(OURS, lambda: chain(weight, num_tokens))
    comparison.add(shorter, device.capture(lambda: chain(weight, short)))
    comparison.add(longer, device.capture(lambda: chain(weight, 2 * short)))
    return comparison.run(config, memory=device.peak_bytes, memory_of=(OURS,))


def large_vocabulary(config: RunConfig) -> Result:
    """V = 50257: a row costs its exponentials when a chain first meets it."""
    vocab_size, num_tokens = 50_257, 20_000
    passes = "torch.exp of each row met"
    comparison = Comparison(
        f'generate {num_tokens} tokens in one chain, sampler "philox", V={vocab_size}', [within(passes, 1.0)]
    )
    if config.quick:
        return comparison.skip("takes a table of 10 GB: only in the full run")
    if reason := config.device.lacks_memory(12 * 2**30):
        return comparison.skip(reason)
    weight, some_rows = torch.empty(vocab_size, vocab_size), torch.randn(1000, vocab_size)
    for rows in weight.split(1000):
        rows.copy_(some_rows[: len(rows)])
    rows_met, buffer = chain(weight, num_tokens)[0, :-1].unique().tolist(), torch.empty(vocab_size)

    def exponentials(num_threads: int) -> None:
        with threads(num_threads):
            for row in rows_met:
                torch.exp(weight[row], out=buffer)

    comparison.add(OURS, lambda: chain(weight, num_tokens))
    comparison.add_lower_bound(passes, lambda: exponentials(torch.get_num_threads()))
    comparison.add_lower_bound(f"{passes}, one thread", lambda: exponentials(1))
    return comparison.run(config, memory=config.device.peak_bytes, memory_of=(OURS,))


def chain(weight: Tensor, num_tokens: int) -> Tensor:
    """The same tokens at each call, drawn by a counter."""
    idx, generator = torch.zeros((1, 1), dtype=torch.long, device=weight.device), torch.Generator().manual_seed(1)
    return functional.generate(idx, weight, num_tokens, sampler="philox", generator=generator)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, and so bigramx, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def billions_a_second(num_tokens: int, target: float) -> Target:
    """Tokens over our time."""
    return at_least(target, "*10^9 tokens a second", lambda medians: num_tokens / medians[OURS] / 1e9)


CASES = [
    Case(same_tokens, headline="`generate`: the 500 tokens of the lecture's loop", batch_size=1, target=100),
    Case(same_tokens, batch_size=32, target=10),
    Case(own_tokens, batch_size=1, num_tokens=500),
    Case(own_tokens, batch_size=32, num_tokens=500),
    Case(long_chain, vocab_size=65, num_threads=1, target=10),
    Case(long_chain, vocab_size=65, num_threads=2, target=3),
    Case(long_chain, vocab_size=1000, num_threads=2, target=60),
    Case(large_vocabulary),
]

CUDA_CASES = [
    Case(own_tokens, batch_size=1, num_tokens=500, targets=[faster_than(LOOP, 100)]),
    Case(own_tokens, batch_size=32, num_tokens=500, targets=[faster_than(LOOP, 100)]),
    Case(
        own_tokens,
        headline="`generate`: 4096 chains of 1000 tokens",
        batch_size=4096,
        num_tokens=1000,
        targets=[billions_a_second(4096 * 1000, 1), faster_than(LOOP, 10)],
    ),
    Case(chain_over_time, vocab_size=65, num_tokens=10**7, short=500, target=50),
]
