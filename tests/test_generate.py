"""functional.generate against the loop over torch.multinomial, and against Philox in plain PyTorch."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from bigramx import functional, reference
from tests import processes
from tests.devices import (
    IN_SIMT,
    capturing,
    default_sampler,
    draws_frozen_by_a_graph,
    fewer,
    on_device,
    raises_in_kernel,
    runs_on_gpu,
    skip_if_long,
)
from tests.interrupts import call_beside, call_that_draws, call_until_handled, draws_are_replayed
from tests.names import name_of

pytestmark = pytest.mark.usefixtures("device")

SAMPLERS: list[Any] = ["philox"] if IN_SIMT else [None, "philox"]  # in the emulator None is philox, too
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"min_p": 0.2},
    {"min_p": 0.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


@contextlib.contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """On a busy machine several threads take far longer for the small tensors of the reference."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(
    seed=st.integers(0, 2**62),
    vocab_size=st.sampled_from([1, 2, 65, 67, 127, 1000]),
    num_chains=st.sampled_from([0, 1, 2, 5]),
    length=st.sampled_from([1, 3]),
    num_tokens=st.sampled_from([0, 1, 30]),
    dtype=st.sampled_from(DTYPES),
    filters=st.sampled_from(FILTERS),
    sampler=st.sampled_from([None, "philox"]),
    stop=st.sampled_from([None, 0, [], [0], [-1], [0, -1], range(30)]),  # of many; -1: the last
)
def test_equals_reference(
    seed: int,
    vocab_size: int,
    num_chains: int,
    length: int,
    num_tokens: int,
    dtype: torch.dtype,
    filters: dict[str, Any],
    sampler: Any,
    stop: int | Sequence[int] | None,
) -> None:
    if isinstance(stop, Sequence):
        stop = [token % vocab_size for token in stop]
    torch.manual_seed(seed)
    weight = (torch.randn(vocab_size, vocab_size) * 2).to(dtype)
    idx = torch.randint(vocab_size, (num_chains, length))
    ours, loops = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    options = {**filters, "stop": stop}
    actual = functional.generate(idx, weight, num_tokens, sampler=sampler, generator=ours, **options)
    sampler = sampler or default_sampler()
    expected = reference.generate(idx, weight, num_tokens, sampler=sampler, generator=loops, **options)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    assert torch.equal(ours.get_state(), loops.get_state())


@pytest.mark.cpu_only
def test_equals_the_lectures_loop() -> None:
    """With the default generator, in batches, and in the generator's state afterwards."""
    model = reference.BigramLanguageModel(65)
    for batch in (1, 32):
        idx = torch.zeros((batch, 1), dtype=torch.long)
        torch.manual_seed(5)
        expected, state = model.generate(idx, 500), torch.get_rng_state()
        torch.manual_seed(5)
        actual = functional.generate(idx, model.token_embedding_table.weight.detach(), 500)
        assert torch.equal(actual, expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_loop_in_16_bits(temperature: float, dtype: torch.dtype) -> None:
    weight, idx = torch.randn(65, 65, dtype=dtype), torch.zeros((4, 1), dtype=torch.long)
    ours, loops = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    actual = functional.generate(idx, weight, 500, temperature=temperature, generator=ours)
    for _ in range(500):
        logits = weight[idx[:, -1]] if temperature == 1 else weight[idx[:, -1]] / temperature
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1, generator=loops)), dim=1)
    assert torch.equal(actual, idx)
    assert torch.equal(ours.get_state(), loops.get_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.99}], ids=str)
def test_filters_of_16_bit_tables(filters: dict[str, Any], dtype: torch.dtype, sampler: Any) -> None:
    """Kept in float32, in which the probabilities are drawn from."""
    for vocab_size, num_tokens in ((65, 60), (1000, 3)):
        weight = (torch.randn(vocab_size, vocab_size) * 2).to(dtype)
        idx = torch.zeros((3, 1), dtype=torch.long)
        ours, references = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        chosen: Any = sampler or default_sampler()
        with limited_to(1):
            actual = functional.generate(idx, weight, num_tokens, sampler=sampler, generator=ours, **filters)
            expected = reference.generate(idx, weight, num_tokens, sampler=chosen, generator=references, **filters)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_filters_that_keep_all_tokens(sampler: Any, dtype: torch.dtype) -> None:
    """The tail of a row is tiny: sums in 16 bits, and even in float32, reach 1 before they come to it."""
    weight = (torch.randn(1000, 1000) * 5).to(dtype)
    idx = torch.zeros((3, 1), dtype=torch.long)
    every: list[dict[str, Any]] = [{}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 1000}, {"top_k": 10**6, "top_p": 1}]
    plain, *filtered = (
        functional.generate(idx, weight, 50, sampler=sampler, generator=torch.Generator().manual_seed(1), **filters)
        for filters in every
    )
    for tokens in filtered:
        assert torch.equal(tokens, plain)
    assert torch.equal(reference.filter_logits(weight, top_p=1.0), weight)


def rows_of_many_kinds(vocab_size: int) -> torch.Tensor:
    """Peaked, flat, equal, with ties, and with tokens that never occur."""
    rows = torch.randn(6, vocab_size, dtype=torch.float64) * torch.tensor([[0.1], [1], [3], [10], [0], [2]])
    rows[5] = rows[5].round()
    rows[2, 1::2] = float("-inf")
    return rows


@pytest.mark.parametrize("vocab_size", [1, 2, 65, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_p", [1e-50, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6])
def test_the_mass_that_top_p_keeps(top_p: float, dtype: torch.dtype, vocab_size: int) -> None:
    """Not less than top_p, and less without the least likely token that is kept."""
    logits = rows_of_many_kinds(vocab_size).to(dtype)
    kept = ~reference.filter_logits(logits, top_p=top_p).isneginf()
    probs = logits.double().softmax(-1)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    mass = probs.where(kept, torch.zeros_like(probs)).sum(-1)
    least = probs.where(kept, torch.full_like(probs, float("inf"))).amin(-1)
    assert (mass >= top_p - rounding).all()
    assert (mass - least < top_p + rounding).all()
    assert kept.any(-1).all()
    assert not (kept & logits.isneginf()).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 65, 127, 1000])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 7},
        {"top_p": 0.9},
        {"top_p": 1e-50, "temperature": 0.6},
        {"top_k": 20, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 20, "top_p": 0.75, "min_p": 0.125},
        {"top_k": 20, "top_p": 0.75, "temperature": 1.7},
    ],
    ids=str,
)
def test_philox_filters_rows_of_many_kinds(filters: dict[str, Any], vocab_size: int, dtype: torch.dtype) -> None:
    """By exact sums of integers, so that every machine keeps the same tokens. Many chains meet the same row at once."""
    rows = rows_of_many_kinds(vocab_size).to(dtype)
    weight = rows.repeat(vocab_size // len(rows) + 1, 1)[:vocab_size]
    idx = torch.arange(60).remainder(min(len(rows), vocab_size))[:, None]
    ours, references = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    with limited_to(1):
        actual = functional.generate(idx, weight, 2, sampler="philox", generator=ours, **filters)
        expected = reference.generate(idx, weight, 2, sampler="philox", generator=references, **filters)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("vocab_size", [1, 2, 65, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_p", [1e-50, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6])
def test_the_mass_that_philox_keeps(top_p: float, dtype: torch.dtype, vocab_size: int) -> None:
    """Exactly not less than top_p of the weights, and less without the least likely token that is kept."""
    for logits in rows_of_many_kinds(vocab_size).to(dtype):
        weights = reference.weights_of_logits(logits).tolist()
        kept = [weight for weight in reference.filtered_weights(logits, top_p=top_p).tolist() if weight > 0]
        assert sum(kept) >= Fraction(top_p) * sum(weights)
        assert sum(kept) - min(kept) < Fraction(top_p) * sum(weights)
        assert min(kept) >= max(sorted(weights, reverse=True)[len(kept) :], default=0)


def test_philox_follows_the_distribution() -> None:
    weight = torch.log(torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(4, 4))
    idx = torch.zeros((1000, 1), dtype=torch.long)
    tokens = functional.generate(idx, weight, 100, sampler="philox")[:, 1:]
    frequencies = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    torch.testing.assert_close(frequencies, weight[0].exp(), atol=0.01, rtol=0)
    assert frequencies[1] == 0


def test_philox_does_not_depend_on_the_other_chains() -> None:
    weight, idx = torch.randn(65, 65), torch.randint(65, (8, 1))
    whole = functional.generate(idx, weight, 50, sampler="philox", generator=torch.Generator().manual_seed(1))
    part = functional.generate(idx[:3], weight, 50, sampler="philox", generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[:3], part)


def philox_chains(
    weight: torch.Tensor, num_tokens: int, num_chains: int = 1, *, seed: int = 1, threads: int = 1, **options: Any
) -> torch.Tensor:
    """Chains that start with token 0, without that token."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.zeros((num_chains, 1), dtype=torch.long)
    with limited_to(threads):
        return functional.generate(idx, weight, num_tokens, sampler="philox", generator=generator, **options)[:, 1:]


@given(
    seed=st.integers(0, 2**62),
    vocab_size=st.sampled_from([65, 127, 300]),
    dtype=st.sampled_from(DTYPES),
    filters=st.sampled_from(FILTERS),
)
def test_philox_many_draws_equal_few(seed: int, vocab_size: int, dtype: torch.dtype, filters: dict[str, Any]) -> None:
    """From 32 draws per row on, whole rows are prepared, in one of two ways; for fewer, only sums of blocks."""
    torch.manual_seed(seed)
    weight = (torch.randn(vocab_size, vocab_size) * 3).to(dtype)
    many = philox_chains(weight, 40 * vocab_size, seed=seed, **filters)
    few = philox_chains(weight, 20 * vocab_size, seed=seed, **filters)
    assert torch.equal(many[:, : few.size(1)], few)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("vocab_size", "num_chains", "num_steps"), [(4000, 20_000, 50), (200, 10_000, 20)])
def test_philox_draws_of_whole_rows_equal_the_reference(vocab_size: int, num_chains: int, num_steps: int) -> None:
    """Also where the high bits of a draw do not decide between two tokens: in rows of 4000, several of 10^6."""
    row, seed = torch.randn(vocab_size), reference._draw_seed(torch.Generator().manual_seed(1))
    tokens = philox_chains(row.expand(vocab_size, -1), num_steps, num_chains)
    cdf = reference.fixed_point_cdf(reference.weights_of_logits(row))
    bounds = (cdf.double() * (2**31 / int(cdf[-1]))).long()
    num_undecided = 0
    for step in range(num_steps):
        r = reference.draws(seed, torch.arange(num_chains), step)
        assert torch.equal(tokens[:, step], reference.tokens_of_draws(reference.weights_of_logits(row), r))
        num_undecided += int(torch.isin(r >> 32, bounds).sum())
    assert num_undecided > 0 or vocab_size < 4000


def test_philox_draws_logits_far_below_the_largest() -> None:
    """14 tokens of 10^6 are among the 50,256 unlikely ones."""
    skip_if_long(50_257 * 10**6)
    weight = torch.full((50_257,), -22.0).index_fill(0, torch.tensor([7]), 0).expand(50_257, -1)
    unlikely = philox_chains(weight, 1_000_000) != 7
    assert 7 <= unlikely.sum() <= 28


def cycle_of(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The table in which each of the tokens is followed by the next."""
    weight = torch.full((vocab_size, vocab_size), float("-inf"))
    weight[tokens, tokens.roll(-1)] = 0
    return weight


def tables() -> dict[str, torch.Tensor]:
    """Tables whose chains coalesce soon, late, and never."""
    torch.manual_seed(1)
    vocab_size = fewer(1000)
    late = torch.full((vocab_size, vocab_size), float("-inf"))
    late[torch.arange(vocab_size), (torch.arange(vocab_size) + 1) % vocab_size] = 5
    late[torch.arange(vocab_size), (torch.arange(vocab_size) + 2) % vocab_size] = 0
    return {
        "soon": torch.randn(vocab_size, vocab_size),
        "late": late,
        "never": cycle_of(torch.randperm(vocab_size), vocab_size),
    }


def thread_counts(*counts: int) -> tuple[int, ...]:
    """The counts on a CPU; a single one on a GPU, where they make no difference."""
    return (1,) if runs_on_gpu() else counts


@pytest.mark.parametrize("name", ["soon", "late", "never"])
def test_philox_parallel_over_time(name: str) -> None:
    """One thread draws few tokens per row sequentially; all other calls run segments in parallel."""
    weight = tables()[name]
    num_tokens, num_more, num_fewer = (3100, 40_001, 2001) if IN_SIMT else (31_000, 200_001, 20_001)
    expected = philox_chains(weight, num_tokens)
    for threads in thread_counts(2, 3):
        assert torch.equal(philox_chains(weight, num_tokens, threads=threads), expected)
    for threads in thread_counts(1, 2, 5):
        many = philox_chains(weight, num_more, threads=threads)
        assert torch.equal(many[:, :num_tokens], expected)
        batch = philox_chains(weight, num_fewer, num_chains=3, threads=threads)
        assert torch.equal(batch[:1], expected[:, :num_fewer])
        assert torch.equal(batch, philox_chains(weight, num_fewer, num_chains=fewer(40), threads=threads)[:3])


@pytest.mark.parametrize("stop", [[64], [63, 64], [64, 3, 63, 64]], ids=str)
def test_philox_stops_where_the_whole_chain_does(stop: list[int]) -> None:
    weight = torch.randn(65, 65)
    weight[:, stop] = -6
    whole = philox_chains(weight, 100_000, num_chains=4)
    ends = [int(torch.isin(chain, torch.tensor(stop)).nonzero()[0]) + 1 for chain in whole]
    assert len(set(ends)) == 4
    assert len({int(chain[end - 1]) for chain, end in zip(whole, ends, strict=True)}) > 1 or len(stop) == 1
    expected = whole[:, : max(ends)].clone()
    for chain, end in zip(expected, ends, strict=True):
        chain[end:] = chain[end - 1].clone()
    for threads in thread_counts(1, 2):
        assert torch.equal(philox_chains(weight, 100_000, num_chains=4, threads=threads, stop=stop), expected)


@pytest.mark.device_assertion
def test_philox_raises_only_for_the_rows_of_the_chain() -> None:
    """0 -> 1 -> 2 -> 0, occasionally -> 3, whose row is not a distribution. Segments that start out of step reach it at
    other times than the chain does."""
    weight = cycle_of(torch.arange(3), 1000)
    weight[0, 3], weight[3, 0] = -8.5, float("nan")
    num_tokens, num_raised, num_seeds = 31_000, 0, 8
    message = "generate: " if IN_SIMT else "row 3 of weight"
    for seed in range(num_seeds):
        if IN_SIMT and 0 < num_raised < seed:
            break  # one of each: a chain takes seconds there
        try:
            expected: Any = philox_chains(weight, num_tokens, seed=seed)
        except RuntimeError as error:
            expected = str(error)
            assert message in expected
            num_raised += 1
        for threads, more in [(1, 2000)] if IN_SIMT else [(2, 0), (1, 2000), (2, 2000)]:
            if isinstance(expected, str):
                with pytest.raises(RuntimeError, match=message):
                    philox_chains(weight, num_tokens + more, seed=seed, threads=threads)
            elif more == 0:
                assert torch.equal(philox_chains(weight, num_tokens, seed=seed, threads=threads), expected)
    assert 0 < num_raised < num_seeds


# Calls that would take minutes.
INTERRUPTED = """
import torch
from bigramx import functional

weight, start = torch.randn(1, 50257).expand(50257, 50257), torch.zeros((1, 1), dtype=torch.long)
calls = {
    "torch": lambda: functional.generate(start, weight[:5000, :5000], 10**8),
    "torch, filtered": lambda: functional.generate(start, weight[:10000, :10000], 10**6, top_p=0.9, sampler="torch"),
    "philox, filtered": lambda: functional.generate(start, weight, 10**6, top_p=0.9, sampler="philox"),
}
for name, call in calls.items():
    state = torch.get_rng_state()
    print("begins", flush=True)
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        assert not torch.equal(torch.get_rng_state(), state), name
"""


@pytest.mark.once
@pytest.mark.cpu_only
def test_ctrl_c() -> None:
    with processes.start([sys.executable, "-c", INTERRUPTED]) as process:
        for _ in range(3):
            processes.read_until(process, "begins")
            time.sleep(0.3)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            processes.read_until(process, "interrupted")
            assert time.monotonic() - begin < 3
        assert process.wait() == 0


LEAVES = """
import threading
import torch
from bigramx import functional

weight, start = torch.randn(65, 65), torch.zeros((1, 1), dtype=torch.long)
for sampler in ("torch", "philox"):
    call = lambda: functional.generate(start, weight, 10**9, sampler=sampler)
    threading.Thread(target=call, daemon=True).start()
    threading.Event().wait(0.1)
"""


@pytest.mark.once
@pytest.mark.cpu_only
def test_the_interpreter_ends_during_a_call() -> None:
    """A thread that would acquire the GIL then would end the process by an error."""
    result = processes.run([sys.executable, "-c", LEAVES])
    assert (result.returncode, result.stderr) == (0, "")


def long_chain() -> int:
    """Tokens of a vocabulary of 65 that take some tenths of a second."""
    return 5_000_000 if draws_are_replayed() else 400_000


@pytest.mark.once
@pytest.mark.cpu_only
@pytest.mark.parametrize("num_chains", [1, 32])
def test_handlers_run_during_a_call(num_chains: int) -> None:
    """They may draw from the generator, and compute gradients."""
    weight, generator = torch.randn(65, 65, requires_grad=True), torch.Generator().manual_seed(1)
    idx = torch.zeros((num_chains, 1), dtype=torch.long)
    losses = []

    def handle() -> None:
        loss = weight.square().sum() + torch.rand((), generator=generator)
        losses.append(torch.autograd.grad(loss, weight)[0])

    def prepare(size: int) -> Callable[[], torch.Tensor]:
        num_tokens = size * long_chain() // num_chains
        return partial(functional.generate, idx, weight, num_tokens, generator=generator)

    call_until_handled(prepare, handle)
    assert all(torch.equal(grad, 2 * weight) for grad in losses)


@pytest.mark.once
@pytest.mark.cpu_only
def test_other_threads_draw_during_a_call() -> None:
    """By torch.rand, which waits for the generator without the GIL, and by get_state, which keeps the GIL."""
    weight, idx, generator = torch.randn(65, 65), torch.zeros((1, 1), dtype=torch.long), torch.Generator()
    for work in (lambda: torch.rand((), generator=generator), generator.get_state):
        count = call_beside(lambda: functional.generate(idx, weight, long_chain(), generator=generator), work)
        assert count > 0


@pytest.mark.once
@pytest.mark.cpu_only
def test_a_call_in_chunks_equals_the_loop() -> None:
    """Handlers see the generator on its way: it is released while rows are filtered."""
    weight, idx = torch.randn(1, 5000).expand(5000, 5000), torch.zeros((3, 1), dtype=torch.long)
    ours, loops = torch.Generator(), torch.Generator().manual_seed(1)

    def prepare(size: int) -> Callable[[], torch.Tensor]:
        return partial(functional.generate, idx, weight, 100 * size, top_p=0.9, generator=ours)

    with limited_to(1):
        actual, size = call_that_draws(prepare, ours)
        assert torch.equal(actual, reference.generate(idx, weight, 100 * size, top_p=0.9, generator=loops))
    assert torch.equal(ours.get_state(), loops.get_state())


@pytest.mark.once
@pytest.mark.cpu_only
def test_a_call_in_chunks_equals_short_calls() -> None:
    """Short calls equal the loop, which would take minutes for all; it ends them here."""
    weight, start = torch.randn(65, 65), torch.zeros((1, 1), dtype=torch.long)
    short, num_looped = long_chain() // 50, 500
    ours, others = torch.Generator(), torch.Generator().manual_seed(1)

    def prepare(size: int) -> Callable[[], torch.Tensor]:
        return partial(functional.generate, start, weight, 50 * size * short + num_looped, generator=ours)

    actual, size = call_that_draws(prepare, ours)
    for begin in range(0, 50 * size * short, short):
        expected = functional.generate(actual[:, begin : begin + 1], weight, short, generator=others)
        assert torch.equal(actual[:, begin : begin + short + 1], expected)
    expected = reference.generate(expected[:, -1:], weight, num_looped, generator=others)
    assert torch.equal(actual[:, -num_looped - 1 :], expected)
    assert torch.equal(ours.get_state(), others.get_state())


@pytest.mark.cpu_only
@pytest.mark.once
@pytest.mark.parametrize("threads", [1, 2])
def test_philox_rows_prepared_in_many_slices_of_time(threads: int) -> None:
    weight = torch.randn(1, 20_000).expand(20_000, 20_000)
    actual, size = call_until_handled(
        lambda size: partial(philox_chains, weight, 50, 16 * size, threads=threads, top_p=0.9)
    )
    idx, generator = torch.zeros((16 * size, 1), dtype=torch.long), torch.Generator().manual_seed(1)
    with limited_to(1):
        expected = reference.generate(idx, weight, 50, sampler="philox", top_p=0.9, generator=generator)
    assert torch.equal(actual, expected[:, 1:])


@pytest.mark.cpu_only
@pytest.mark.once
@pytest.mark.parametrize("threads", [1, 2])
def test_philox_repairs_in_many_slices_of_time(threads: int) -> None:
    """The chain of a cycle never coalesces: where the segments have guessed wrong, it is followed to its end."""
    order = torch.randperm(1000)
    weight, num_tokens = cycle_of(order, 1000), 20_000_000
    actual, size = call_until_handled(lambda size: partial(philox_chains, weight, size * num_tokens, threads=threads))
    first = int((order == 0).nonzero()) + 1
    assert torch.equal(actual[0], order.roll(-first).repeat(size * num_tokens // 1000))


@pytest.mark.cpu_only
def test_consecutive_calls_equal_one() -> None:
    weight, idx = torch.randn(65, 65), torch.zeros((1, 1), dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    parts = functional.generate(
        functional.generate(idx, weight, 20, generator=generator), weight, 30, generator=generator
    )
    assert torch.equal(parts, functional.generate(idx, weight, 50, generator=torch.Generator().manual_seed(2)))


def test_stop_ends_early_and_fills_up() -> None:
    cycle = torch.full((4, 4), float("-inf"))
    cycle[torch.arange(4), (torch.arange(4) + 1) % 4] = 0  # 0 -> 1 -> 2 -> 3 -> 0
    idx = torch.tensor([[0], [2]])
    several: list[tuple[Any, list[list[int]]]] = [
        (3, [[0, 1, 2, 3], [2, 3, 3, 3]]),
        ([3, 3], [[0, 1, 2, 3], [2, 3, 3, 3]]),
        ((0, 2), [[0, 1, 2], [2, 3, 0]]),
        ([0, 1], [[0, 1, 1], [2, 3, 0]]),  # each is filled with the token at which it ends
    ]
    for stop, expected in several:
        for sampler in SAMPLERS:
            assert functional.generate(idx, cycle, 9, stop=stop, sampler=sampler).tolist() == expected
    assert functional.generate(idx, cycle, 2, stop=0).tolist() == [[0, 1, 2], [2, 3, 0]]


@pytest.mark.parametrize(
    "stops",
    [
        [1, 3],
        (3, 1),
        {1, 3},
        torch.tensor([1, 3]),
        torch.tensor([3, 1], dtype=torch.uint8),
        np.array([1, 3]),
        range(1, 5),
    ],
    ids=repr,
)
def test_stops_are_a_sequence_of_any_kind(stops: Any) -> None:
    expected = functional.generate(IDX, WEIGHT, 50, temperature=0.5, stop=None, generator=torch.Generator())
    end = int(torch.isin(expected[0], torch.tensor([*stops])).nonzero()[0]) + 1
    actual = functional.generate(IDX, WEIGHT, 50, temperature=0.5, stop=stops, generator=torch.Generator())
    assert torch.equal(actual, expected[:, :end])


@pytest.mark.parametrize("none", [None, [], (), torch.empty(0, dtype=torch.long)], ids=repr)
def test_no_stop(none: Any) -> None:
    assert functional.generate(IDX, WEIGHT, 50, stop=none).shape == (1, 51)
    assert functional.generate(IDX[:0], WEIGHT, 50, stop=none).shape == (0, 51)
    assert functional.generate(IDX[:0], WEIGHT, 50, stop=[1, 2]).shape == (0, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_token_of_a_large_vocabulary_stops(sampler: Any) -> None:
    weight, idx = torch.randn(1, 50257).expand(50257, 50257), torch.zeros((3, 1), dtype=torch.long)
    assert functional.generate(idx, weight, 10, stop=range(50257), sampler=sampler).shape == (3, 2)


def test_layouts_and_int32() -> None:
    weight, idx = torch.randn(65, 65), torch.randint(65, (3, 4))
    expected = functional.generate(idx, weight, 20, generator=torch.Generator().manual_seed(1))
    for other_idx, other_weight in [(idx.int(), weight), (idx.t().contiguous().t(), weight.t().contiguous().t())]:
        actual = functional.generate(other_idx, other_weight, 20, generator=torch.Generator().manual_seed(1))
        assert torch.equal(actual, expected)


def test_the_likeliest_token_of_infinite_logits() -> None:
    weight = torch.zeros(3, 3)
    weight[0, 2], weight[2, 1] = float("inf"), float("nan")
    idx = torch.zeros((1, 1), dtype=torch.long)
    assert functional.generate(idx, weight, 3, temperature=0).tolist() == [[0, 2, 1, 0]]


def test_autograd_hooks_do_not_run_in_the_kernel() -> None:
    """They might draw while the kernel holds the generator."""
    weight, idx = torch.nn.Parameter(torch.randn(65, 65)), torch.zeros((1, 1), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t + torch.rand(()), lambda t: t):
        assert not functional.generate(idx, weight, 10, temperature=0.5).requires_grad


@pytest.mark.device_assertion
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}, {"temperature": 2.0}], ids=str)
def test_a_row_that_is_not_a_distribution_raises_when_reached(
    filters: dict[str, Any], sampler: Any, value: float
) -> None:
    weight = torch.zeros(3, 3)
    weight[2, 1] = value
    weight[:2, 2] = float("-inf")  # row 2 is never reached from 0 or 1
    idx = torch.zeros((1, 1), dtype=torch.long)
    assert functional.generate(idx, weight, 20, sampler=sampler, **filters).max() < 2
    with raises_in_kernel("generate", RuntimeError, r"`inf`, `nan` or element < 0: row 2 of weight"):
        functional.generate(idx + 2, weight, 1, sampler=sampler, **filters)
    with raises_in_kernel("generate", RuntimeError, "row 0 of weight"):
        functional.generate(idx, torch.full((3, 3), float("-inf")), 1, sampler=sampler, **filters)


@pytest.mark.gpu_only
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_does_not_capture_the_cpus_draws() -> None:
    with draws_frozen_by_a_graph("generate"), capturing():
        functional.generate(on_device(IDX), on_device(WEIGHT), 3, generator=torch.Generator())


@pytest.mark.gpu_only
def test_a_gpu_cannot_replay_the_cpus_generator() -> None:
    with pytest.raises(ValueError, match=r"'philox'.* got 'torch'"):
        functional.generate(on_device(IDX), on_device(WEIGHT), 3, sampler="torch")


IDX, WEIGHT = torch.zeros((1, 1), dtype=torch.long), torch.zeros(5, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"idx": IDX.float()}, RuntimeError, r"idx .*got Float"),
        ({"idx": IDX[0]}, RuntimeError, r"2-D, \(B, T\), got shape \[1\]"),
        ({"idx": IDX[:, :0]}, IndexError, r"at least one token a sequence, got shape \[1, 0\]"),
        ({"weight": torch.zeros(5, 4)}, RuntimeError, r"must be square.*got shape \[5, 4\]"),
        ({"weight": None}, TypeError, r"expected weight to be a Tensor, got None"),
        ({"weight": torch.zeros(5)}, RuntimeError, r"must be 2-D"),
        ({"weight": torch.zeros(0, 0)}, IndexError, r"index out of range"),
        ({"weight": torch.zeros(5, 5).long()}, NotImplementedError, r"weight of dtype Long"),
        ({"max_new_tokens": -1}, ValueError, r"max_new_tokens >= 0, got -1"),
        ({"max_new_tokens": 1.5}, TypeError, r"max_new_tokens"),
        ({"temperature": -1.0}, ValueError, r"temperature to be finite and >= 0, got -1"),
        ({"temperature": float("nan")}, ValueError, r"temperature"),
        ({"top_k": 0}, ValueError, r"top_k >= 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"0 < top_p <= 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"0 < top_p <= 1, got 1.5"),
        ({"min_p": -0.5}, ValueError, r"0 <= min_p <= 1, got -0.5"),
        ({"stop": 5}, ValueError, r"0 <= stop < 5, got 5"),
        ({"stop": [0, 5]}, ValueError, r"0 <= stop < 5, got 5"),
        ({"stop": [5, 0]}, ValueError, r"0 <= stop < 5, got 5"),
        ({"stop": [0, -1]}, ValueError, r"0 <= stop < 5, got -1"),
        ({"stop": [0, 1.5]}, TypeError, r"stop to be an int or a sequence of ints, got list"),
        ({"stop": "a"}, TypeError, r"stop to be an int or a sequence of ints, got str"),
        ({"stop": b"a"}, TypeError, r"stop to be an int or a sequence of ints, got bytes"),
        ({"stop": [[0]]}, TypeError, r"stop to be an int or a sequence of ints, got list"),
        ({"stop": torch.zeros(2)}, TypeError, r"stop to be an int or a sequence of ints, got Tensor"),
        ({"stop": iter([0])}, TypeError, r"stop to be an int or a sequence of ints, got list_iterator"),
        ({"sampler": "foo"}, ValueError, r"'philox'.* got 'foo'"),
    ],
    ids=name_of,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"idx": IDX, "weight": WEIGHT, "max_new_tokens": 3, **arguments}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        functional.generate(**{name: on_device(value) for name, value in call.items()})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.device_assertion
@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (IDX + 5, r"idx holds 5 at position 0, expected 0 <= idx < 5"),
        (torch.tensor([[-1, 0]]), r"idx holds -1 at position 0"),
    ],
)
def test_tokens_out_of_range(idx: torch.Tensor, message: str) -> None:
    with raises_in_kernel("generate", IndexError, message):
        functional.generate(idx, WEIGHT, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 2**63 - 1}, RuntimeError, r"T \+ max_new_tokens to be less than 2\^63, got 1 \+ 92233"),
        ({"max_new_tokens": 2**63 - 2}, RuntimeError, r"Storage size calculation overflowed"),
        ({"max_new_tokens": 2**62, "idx": torch.zeros(4, 1).long()}, RuntimeError, r"B \* \(T \+ max_new_tokens\)"),
        ({"max_new_tokens": 2**50}, RuntimeError, r"memory"),
        ({"max_new_tokens": -(2**63)}, ValueError, r"max_new_tokens >= 0, got -9223372036854775808"),
        ({"max_new_tokens": 2**63}, TypeError, r"max_new_tokens"),
        ({"top_k": -(2**63)}, ValueError, r"top_k >= 1, got -9223372036854775808"),
        ({"stop": -(2**63)}, ValueError, r"0 <= stop < 5, got -9223372036854775808"),
        ({"stop": 2**63 - 1}, ValueError, r"0 <= stop < 5, got 9223372036854775807"),
        ({"stop": [0, 2**63 - 1]}, ValueError, r"0 <= stop < 5, got 9223372036854775807"),
        ({"stop": [0, 2**63]}, TypeError, r"stop"),
        ({"temperature": float("inf")}, ValueError, r"temperature to be finite"),
        ({"top_p": float("nan")}, ValueError, r"0 < top_p <= 1, got nan"),
        ({"min_p": float("nan")}, ValueError, r"0 <= min_p <= 1, got nan"),
        ({"min_p": float("inf")}, ValueError, r"0 <= min_p <= 1, got inf"),
    ],
    ids=str,
)
def test_numbers_out_of_range(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"idx": IDX, "weight": WEIGHT, "max_new_tokens": 3, **arguments}
    with pytest.raises(error, match=message):
        functional.generate(**{name: on_device(value) for name, value in call.items()})


def test_the_largest_top_k_keeps_all() -> None:
    torch.manual_seed(1)
    every = functional.generate(IDX, WEIGHT, 5)
    torch.manual_seed(1)
    assert torch.equal(functional.generate(IDX, WEIGHT, 5, top_k=2**63 - 1), every)
