"""Generation: the lecture's tokens from the same seed, and long chains by a counter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import bigramx
from benchmarks import floors, peers
from benchmarks.machine import threads
from benchmarks.race import (
    OURS,
    Effort,
    Race,
    Reach,
    Result,
    assert_equal,
    assert_means_within,
    faster_than,
    in_powers_of_ten,
    ns_a_token,
    within,
)
from bigramx import functional, reference

LOOP = "the lecture's loop"


def same_tokens(effort: Effort, batch_size: int, target: float) -> Result:
    """Sampler "torch": the tokens of the lecture's loop."""
    vocab_size, num_tokens = 65, 500
    race = Race(
        f'generate {num_tokens} tokens, sampler "torch", V={vocab_size} B={batch_size}',
        [faster_than(LOOP, target)],
    )
    eager, ours = reference.BigramLanguageModel(vocab_size), bigramx.BigramLanguageModel(vocab_size)
    ours.load_state_dict(eager.state_dict())
    idx = torch.zeros((batch_size, 1), dtype=torch.long)
    race.add(OURS, lambda: ours.generate(idx, num_tokens, sampler="torch"))
    race.add(LOOP, torch.no_grad()(lambda: eager.generate(idx, num_tokens)))
    num_words = 2 * vocab_size * num_tokens * batch_size
    race.add_floor("2 V words of the Mersenne Twister a token", lambda: floors.twister(num_words))
    return race.run(effort)


def own_tokens(effort: Effort, batch_size: int, num_tokens: int, reaches: Sequence[Reach] = ()) -> Result:
    """The same job for those who draw otherwise than torch.multinomial on the CPU; V = 65."""
    device, vocab_size = effort.device, 65
    race = Race(
        f'generate {num_tokens} tokens, sampler "philox", V={vocab_size} B={batch_size}',
        reaches,
        same=assert_means_within(0.1 * vocab_size),
    )
    eager = reference.BigramLanguageModel(vocab_size).to(device.name)
    model = bigramx.BigramLanguageModel(vocab_size).to(device.name)
    model.load_state_dict(eager.state_dict())
    weight = model.token_embedding_table.weight
    idx = torch.zeros((batch_size, 1), dtype=torch.long, device=device.name)
    race.add(OURS, lambda: model.generate(idx, num_tokens, sampler="philox"))
    if device.is_gpu:
        race.add(LOOP, torch.no_grad()(lambda: eager.generate(idx, num_tokens)))
        return race.run(effort)
    race.add_peer("JAX lax.scan", lambda: peers.jax_generate(weight, batch_size, num_tokens))
    if batch_size == 1:
        race.add_peer("NumPy", lambda: peers.numpy_generate(weight, num_tokens))
    return race.run(effort)


def long_chain(effort: Effort, vocab_size: int, num_threads: int, target: float) -> Result:
    """One chain of 10^7 tokens, sampler "philox"."""
    num_tokens = 10**7
    race = Race(
        f'generate 10^7 tokens in one chain, sampler "philox", V={vocab_size}, {num_threads} thread'
        + "s" * (num_threads > 1),
        [ns_a_token(num_tokens, target)],
    )
    weight = torch.randn(vocab_size, vocab_size)

    def ours() -> Tensor:
        with threads(num_threads):
            return chain(weight, num_tokens)

    race.add(OURS, ours)
    race.add_floor("a dependent load from L1 a token", lambda: floors.dependent_loads(num_tokens))
    return race.run(effort, memory=effort.device.peak_bytes, memory_of=(OURS,))


def chain_over_time(effort: Effort, vocab_size: int, num_tokens: int, short: int, target: float) -> Result:
    """One long chain on a GPU, parallel over time, against what a token costs after a token.

    That is what ``short`` more tokens cost a chain of as many, which is not cut (csrc/cuda/generate.cu, kLeastSegment);
    and captured, so that neither of the two waits for its launches.
    """
    device, shorter, longer = effort.device, f"bigramx, {short} tokens", f"bigramx, {2 * short} tokens"

    def over_one_after_the_other(seconds: Mapping[str, float]) -> float:
        return num_tokens * (seconds[longer] - seconds[shorter]) / short / seconds[OURS]

    def same_beginning(actual: Tensor, expected: Tensor) -> None:
        assert_equal(actual, expected[:, : actual.size(1)])

    race = Race(
        f'generate {in_powers_of_ten(num_tokens)} tokens in one chain, sampler "philox", V={vocab_size}',
        [Reach("x one token after the other", ">=", target, over_one_after_the_other)],
        same=same_beginning,
    )
    weight = torch.randn(vocab_size, vocab_size, device=device.name)
    race.add(OURS, lambda: chain(weight, num_tokens))
    race.add(shorter, device.captured(lambda: chain(weight, short)))
    race.add(longer, device.captured(lambda: chain(weight, 2 * short)))
    return race.run(effort, memory=device.peak_bytes, memory_of=(OURS,))


def large_vocabulary(effort: Effort) -> Result:
    """V = 50257: a row costs its exponentials when a chain first meets it."""
    vocab_size, num_tokens = 50_257, 20_000
    passes = "torch.exp of each row met"
    race = Race(f'generate {num_tokens} tokens in one chain, sampler "philox", V={vocab_size}', [within(passes, 1.0)])
    if effort.quick:
        return race.skip("takes a table of 10 GB: in the full run alone")
    if reason := effort.device.lacks_memory(12):
        return race.skip(reason)
    weight, some_rows = torch.empty(vocab_size, vocab_size), torch.randn(1000, vocab_size)
    for rows in weight.split(1000):
        rows.copy_(some_rows[: len(rows)])
    rows_met, buffer = chain(weight, num_tokens)[0, :-1].unique().tolist(), torch.empty(vocab_size)

    def exponentials(num_threads: int) -> None:
        with threads(num_threads):
            for row in rows_met:
                torch.exp(weight[row], out=buffer)

    race.add(OURS, lambda: chain(weight, num_tokens))
    race.add_floor(passes, lambda: exponentials(torch.get_num_threads()))
    race.add_floor(f"{passes}, one thread", lambda: exponentials(1))
    return race.run(effort, memory=effort.device.peak_bytes, memory_of=(OURS,))


def chain(weight: Tensor, num_tokens: int) -> Tensor:
    """The same tokens at each call."""
    idx, generator = torch.zeros((1, 1), dtype=torch.long, device=weight.device), torch.Generator().manual_seed(1)
    return functional.generate(idx, weight, num_tokens, sampler="philox", generator=generator)


def billions_a_second(num_tokens: int, target: float) -> Reach:
    """Tokens over our time."""
    return Reach("*10^9 tokens a second", ">=", target, lambda seconds: num_tokens / seconds[OURS] / 1e9)


JOBS = [
    partial(same_tokens, batch_size=1, target=100),
    partial(same_tokens, batch_size=32, target=10),
    partial(own_tokens, batch_size=1, num_tokens=500),
    partial(own_tokens, batch_size=32, num_tokens=500),
    partial(long_chain, vocab_size=65, num_threads=1, target=10),
    partial(long_chain, vocab_size=65, num_threads=2, target=3),
    partial(long_chain, vocab_size=1000, num_threads=2, target=60),
    large_vocabulary,
]

CUDA_JOBS = [
    partial(own_tokens, batch_size=1, num_tokens=500, reaches=[faster_than(LOOP, 100)]),
    partial(own_tokens, batch_size=32, num_tokens=500, reaches=[faster_than(LOOP, 100)]),
    partial(
        own_tokens,
        batch_size=4096,
        num_tokens=1000,
        reaches=[billions_a_second(4096 * 1000, 1), faster_than(LOOP, 10)],
    ),
    partial(chain_over_time, vocab_size=65, num_tokens=10**7, short=500, target=50),
]
