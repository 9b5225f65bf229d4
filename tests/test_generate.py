"""functional.generate against the loop over torch.multinomial, and against Philox in plain PyTorch."""

from __future__ import annotations

import signal
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import functional, reference
from tests.devices import IN_SIMT, default_sampler, fewer, on_device, raises_in_kernel, runs_on_gpu

pytestmark = pytest.mark.usefixtures("device")

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


@given(
    seed=st.integers(0, 2**62),
    vocab_size=st.sampled_from([1, 2, 65, 67, 127, 1000]),
    num_chains=st.sampled_from([0, 1, 2, 5]),
    length=st.sampled_from([1, 3]),
    num_tokens=st.sampled_from([0, 1, 30]),
    dtype=st.sampled_from(DTYPES),
    filters=st.sampled_from(FILTERS),
    sampler=st.sampled_from([None, "philox"]),
    stop=st.sampled_from([None, 0]),
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
    stop: int | None,
) -> None:
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
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return functional.generate(idx, weight, num_tokens, sampler="philox", generator=generator, **options)[:, 1:]
    finally:
        torch.set_num_threads(threads_before)


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


def cycle_of(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The table in which each of the tokens is followed by the next."""
    weight = torch.full((vocab_size, vocab_size), float("-inf"))
    weight[tokens, tokens.roll(-1)] = 0
    return weight


def tables() -> dict[str, torch.Tensor]:
    """Tables whose chains coalesce soon, late, and never."""
    torch.manual_seed(1)
    vocab_size = 1000
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
    weight, num_tokens = tables()[name], 31_000
    expected = philox_chains(weight, num_tokens)
    for threads in thread_counts(2, 3):
        assert torch.equal(philox_chains(weight, num_tokens, threads=threads), expected)
    for threads in thread_counts(1, 2, 5):
        many = philox_chains(weight, 200_001, threads=threads)
        assert torch.equal(many[:, :num_tokens], expected)
        batch = philox_chains(weight, 20_001, num_chains=3, threads=threads)
        assert torch.equal(batch[:1], expected[:, :20_001])
        assert torch.equal(batch, philox_chains(weight, 20_001, num_chains=fewer(40), threads=threads)[:3])


def test_philox_stops_where_the_whole_chain_does() -> None:
    weight = torch.randn(65, 65)
    weight[:, 64] = -5
    whole = philox_chains(weight, 100_000, num_chains=4)
    ends = [(chain == 64).nonzero()[0].item() + 1 for chain in whole]
    assert len(set(ends)) == 4
    expected = whole[:, : max(ends)].clone()
    for chain, end in zip(expected, ends, strict=True):
        chain[int(end) :] = 64
    for threads in thread_counts(1, 2):
        assert torch.equal(philox_chains(weight, 100_000, num_chains=4, threads=threads, stop=64), expected)


@pytest.mark.device_assertion
def test_philox_raises_only_for_the_rows_of_the_chain() -> None:
    """0 -> 1 -> 2 -> 0, occasionally -> 3, whose row is not a distribution. Segments that start out of step reach it at
    other times than the chain does."""
    weight = cycle_of(torch.arange(3), 1000)
    weight[0, 3], weight[3, 0] = -8.5, float("nan")
    num_tokens, num_raised, num_seeds = 31_000, 0, 8 if IN_SIMT else 20
    message = "generate: " if IN_SIMT else "row 3 of weight"
    for seed in range(num_seeds):
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


@pytest.mark.cpu_only
def test_philox_can_be_interrupted() -> None:
    class AlarmError(Exception):
        pass

    def handle(*_: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(AlarmError):
            philox_chains(cycle_of(torch.arange(65), 65), 10**9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    expected = torch.tensor([[0, 1, 2, 3], [2, 3, 3, 3]])
    for sampler in (None, "philox"):
        assert torch.equal(functional.generate(idx, cycle, 9, stop=3, sampler=sampler), expected)
    assert functional.generate(idx, cycle, 2, stop=0).tolist() == [[0, 1, 2], [2, 3, 0]]


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
@pytest.mark.parametrize("sampler", [None, "philox"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_a_distribution_raises_when_reached(sampler: Any, value: float) -> None:
    weight = torch.zeros(3, 3)
    weight[2, 1] = value
    weight[:2, 2] = float("-inf")  # row 2 is never reached from 0 or 1
    idx = torch.zeros((1, 1), dtype=torch.long)
    assert functional.generate(idx, weight, 20, sampler=sampler).max() < 2
    with raises_in_kernel("generate", RuntimeError, r"`inf`, `nan` or element < 0: row 2 of weight"):
        functional.generate(idx + 2, weight, 1, sampler=sampler)
    with raises_in_kernel("generate", RuntimeError, "row 0 of weight"):
        functional.generate(idx, torch.full((3, 3), float("-inf")), 1, sampler=sampler)


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
        ({"sampler": "foo"}, ValueError, r"'philox'.* got 'foo'"),
    ],
    ids=str,
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
