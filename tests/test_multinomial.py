"""functional.multinomial draws and rejects what torch.multinomial does; with "philox", what the reference does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import functional, reference
from tests.devices import (
    IN_SIMT,
    capturing,
    default_sampler,
    draws_frozen_by_a_graph,
    fewer,
    on_device,
    raises_in_kernel,
    skip_if_long,
)
from tests.interrupts import call_beside, call_that_draws, call_until_handled, draws_are_replayed

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TINY_AND_HUGE = [1e-38, 1e-44, 1e30]


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1,), (2,), (65,), (1, 65), (7, 33), (3, 1000), (0, 4)]),
    dtype=st.sampled_from(DTYPES),
    num_samples=st.sampled_from([1, 2, 5]),
    replacement=st.booleans(),
    zeros=st.booleans(),
    transposed=st.booleans(),
    sampler=st.sampled_from([None, "philox"]),
)
def test_equals_reference(
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_samples: int,
    replacement: bool,
    zeros: bool,
    transposed: bool,
    sampler: Any,
) -> None:
    torch.manual_seed(seed)
    probs = torch.rand(shape).to(dtype)
    if zeros:
        probs = torch.where(torch.rand(shape) < 0.3, 0, probs)
        probs[..., -1] = 1
    if transposed:
        probs = probs.t().contiguous().t()
    if not replacement:
        num_samples = min(num_samples, shape[-1])
    ours, references = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    actual = functional.multinomial(probs, num_samples, replacement, sampler=sampler, generator=ours)
    sampler = sampler or default_sampler()
    expected = reference.multinomial(probs, num_samples, replacement, sampler=sampler, generator=references)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    assert torch.equal(ours.get_state(), references.get_state())


@pytest.mark.cpu_only
def test_default_generator() -> None:
    probs = torch.rand(5, 65)
    torch.manual_seed(3)
    actual = functional.multinomial(probs, 1)
    torch.manual_seed(3)
    assert torch.equal(actual, torch.multinomial(probs, 1))


def assert_equals_torch(
    probs: torch.Tensor, num_samples: int = 1, replacement: bool = False, generator: torch.Generator | None = None
) -> None:
    """In the samples, and in the generator's state afterwards."""
    ours = generator or torch.Generator().manual_seed(1)
    torchs = torch.Generator()
    torchs.set_state(ours.get_state())
    actual = functional.multinomial(probs, num_samples, replacement, generator=ours)
    assert torch.equal(actual, torch.multinomial(probs, num_samples, replacement, generator=torchs))
    assert torch.equal(ours.get_state(), torchs.get_state())


@pytest.mark.cpu_only
@pytest.mark.parametrize("words_before", [0, 1, 2, 311, 622, 623, 624, 625, 1248])
@pytest.mark.parametrize("vocab_size", [1, 2, 311, 312, 313, 1024, 1025, 3000])
def test_the_generators_state(vocab_size: int, words_before: int) -> None:
    """The Mersenne Twister generates 624 words at a time; a draw takes two."""
    for num_rows in range(4):
        generator = torch.Generator().manual_seed(1)
        torch.rand(words_before, generator=generator)
        assert_equals_torch(torch.rand(num_rows, vocab_size), generator=generator)


@pytest.mark.cpu_only
def test_a_normal_sample_cached_in_the_generator_stays() -> None:
    generator = torch.Generator().manual_seed(1)
    torch.randn(1, generator=generator)  # draws two and caches one
    state = generator.get_state()
    assert_equals_torch(torch.rand(3, 65), generator=generator)
    assert_equals_torch(torch.rand(65), 10, replacement=True, generator=generator)
    assert torch.equal(generator.get_state()[-24:], state[-24:])


def hard_rows(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows of 1500 elements, more than are searched at once."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    zeros, powers = torch.zeros(1500, dtype=torch.float64), torch.rand(1500, dtype=torch.float64)
    low, high = (torch.tensor(bound, dtype=torch.float64).log2() for bound in (limits.smallest_normal, limits.max))
    return {
        "equal": zeros + 1,
        "one": zeros.index_fill(0, torch.tensor([1200]), 1),
        "one that is subnormal": zeros.index_fill(0, torch.tensor([1200]), smallest),
        "few": zeros.index_fill(0, torch.tensor([3, 1100, 1499]), 1),
        "one likely": (zeros + 1e-4).index_fill(0, torch.tensor([77]), 50),
        "largest": zeros + limits.max,
        "smallest": zeros + smallest,
        "smallest normal": zeros + limits.smallest_normal,
        "subnormal": powers * limits.smallest_normal,
        "all magnitudes": torch.exp2(low - 10 + powers * (high - low + 10)),
        "all small magnitudes": torch.exp2(low - 10 + powers * (10 - low)),
    }


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", hard_rows(torch.float32))
def test_hard_rows(name: str, dtype: torch.dtype) -> None:
    row = hard_rows(dtype)[name].to(dtype)
    assert_equals_torch(row.expand(300, -1))
    assert_equals_torch(row[-3:].index_fill(0, torch.tensor([2]), row.max()).expand(300, -1))
    assert_equals_torch(row, 3000, replacement=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype: torch.dtype) -> None:
    assert_equals_torch(torch.rand(20_000, 65).to(dtype))


def probs_like_the_noise(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Probabilities whose ratios to the exponential variates are all equal up to a few roundings."""
    state = generator.get_state()
    variates = torch.empty(shape, dtype=dtype).exponential_(generator=generator)
    generator.set_state(state)
    roundings = torch.randint(-4, 5, shape) * torch.finfo(dtype).eps
    return variates * (1 + roundings).to(dtype)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-13, 1.0, 2.0**10])
def test_ratios_that_are_nearly_equal(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    probs = probs_like_the_noise(generator, (300, 1500), dtype) * scale
    assert_equals_torch(probs, generator=generator)


def generator_that_draws(draws: list[int]) -> torch.Generator:
    """A generator whose next draws are these, in units of 2^-53; at most 311."""

    def raw(word: int) -> int:
        """The word of the state from which the Mersenne Twister generates this one."""
        word ^= word >> 18
        word ^= word << 15 & 0xEFC60000
        shifted = word
        for _ in range(4):
            shifted = word ^ (shifted << 7 & 0x9D2C5680)
        return shifted ^ shifted >> 11 ^ shifted >> 22

    generator = torch.Generator().manual_seed(1)
    torch.rand(1, generator=generator)  # 623 words of the state are left
    state = generator.get_state()
    words = torch.tensor([raw(word) for draw in draws for word in (draw >> 32, draw & 0xFFFFFFFF)])
    state.view(torch.int64)[4 : 4 + len(words)] = words  # after seed, words left, words taken, and the first word
    generator.set_state(state)
    drawn = torch.rand(len(draws), dtype=torch.float64, generator=generator) * 2.0**53
    assert drawn.long().tolist() == draws
    generator.set_state(state)
    return generator


# Draws that round to zero or are subnormal in float16, draws whose first word is zero, and the largest draws.
RARE_DRAWS = [0, 1, 2**27, 2**28, 2**28 + 1, 2**29, 2**32 - 1, 2**32, 2**33, 2**39 - 1, 2**39, 2**52, 2**53 - 1]


@pytest.mark.cpu_only
@given(
    row=st.lists(
        st.tuples(
            st.sampled_from(RARE_DRAWS) | st.integers(0, 2**53 - 1),
            st.sampled_from([0.0, 0.0, 2.0**-149, 2.0**-24, 2.0**-14, 1.0, 1.0, 1.0078125, 65504.0, 2.0**127]),
        ),
        min_size=1,
        max_size=70,
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_rare_draws(row: list[tuple[int, float]], dtype: torch.dtype) -> None:
    """Infinite ratios, 0 / 0, and ties."""
    draws, values = zip(*row, strict=True)
    probs = torch.tensor(values, dtype=torch.float64).clamp(max=torch.finfo(dtype).max).to(dtype)
    if not probs.any():
        probs[-1] = 1
    assert_equals_torch(probs, generator=generator_that_draws(list(draws)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [2.0**-22, 2.0**-18, 2.0**-14, 2.0**-10])
def test_ratios_of_small_noise_that_are_nearly_equal(largest: float, dtype: torch.dtype) -> None:
    """Down to exponential variates that are subnormal in float16."""
    for _ in range(50):
        draws = torch.randint(int(largest * 2**52), int(largest * 2**53), (67,))
        generator = generator_that_draws(draws.tolist())
        probs = probs_like_the_noise(generator, (67,), dtype) * 2.0**10
        assert_equals_torch(probs, generator=generator)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 4096])
@pytest.mark.parametrize("num_samples", [1, 7, 311])
def test_draws_that_equal_a_cumulative_sum(num_samples: int, vocab_size: int, dtype: torch.dtype) -> None:
    parts = [draw + k for draw in range(0, 2**53, 2**53 // 64) for k in (0, 1, -1, 2**46)]
    generator = generator_that_draws([draw % 2**53 for draw in parts[: max(num_samples, 2)]])
    assert_equals_torch(torch.ones(vocab_size, dtype=dtype), num_samples, replacement=True, generator=generator)


@pytest.mark.cpu_only
@pytest.mark.parametrize("vocab_size", [1, 67, 5000])
@pytest.mark.parametrize("num_samples", [2, 600, 1024, 1025, 5000])
def test_replacement(num_samples: int, vocab_size: int) -> None:
    """Few and many samples, of even and very uneven rows."""
    for exponent in (0, 1, 30):
        assert_equals_torch(torch.rand(3, vocab_size) ** exponent, num_samples, replacement=True)


@pytest.mark.cpu_only
def test_replacement_where_the_sum_overflows() -> None:
    assert_equals_torch(torch.full((70,), 3e38), 100, replacement=True)


@pytest.mark.once
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("shape", "num_samples", "replacement"),
    [((1, 65), 40_000_000, True), ((2_000, 10_000), 7, False)],
)
def test_a_long_call_equals_torchs(shape: tuple[int, ...], num_samples: int, replacement: bool) -> None:
    """Handlers run meanwhile, and see the generator on its way."""
    probs, generator, torchs = torch.rand(shape), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)

    def prepare(size: int) -> Callable[[], torch.Tensor]:
        repeated = probs.repeat(size, 1)
        return partial(functional.multinomial, repeated, num_samples, replacement, generator=generator)

    is_handled = replacement or draws_are_replayed()
    actual, size = call_that_draws(prepare, generator) if is_handled else (prepare(1)(), 1)
    expected = torch.multinomial(probs.repeat(size, 1), num_samples, replacement, generator=torchs)
    assert torch.equal(actual, expected)
    assert torch.equal(generator.get_state(), torchs.get_state())


@pytest.mark.cpu_only
def test_samples_of_many_columns_equal_torchs() -> None:
    """Drawn in the memory order of the columns, and compared in chunks of the rows."""
    probs = torch.rand(1000, 3000).t()
    for num_samples in (1, 3):
        assert_equals_torch(probs, num_samples)
    assert_equals_torch(probs.bfloat16(), 3)


@pytest.mark.cpu_only
def test_the_generator_is_free_between_large_rows() -> None:
    assert_equals_torch(torch.rand(3, 70_000), 5, replacement=True)


@pytest.mark.once
@pytest.mark.cpu_only
def test_other_threads_draw_during_a_call() -> None:
    probs, generator = torch.rand(65), torch.Generator()
    for work in (lambda: torch.rand((), generator=generator), generator.get_state):
        count = call_beside(lambda: functional.multinomial(probs, 40_000_000, True, generator=generator), work)
        assert count > 0


@pytest.mark.cpu_only
@pytest.mark.parametrize("scale", TINY_AND_HUGE)
def test_tiny_and_huge_weights(scale: float) -> None:
    """Ratios that are subnormal, or near the largest float32."""
    assert_equals_torch(torch.rand(200, 67) * scale)


def assert_equals_reference(probs: torch.Tensor, num_samples: int = 1, replacement: bool = False) -> None:
    """With "philox" and the seed of philox_samples."""
    generator = torch.Generator().manual_seed(1)
    expected = reference.multinomial(probs, num_samples, replacement, sampler="philox", generator=generator)
    assert torch.equal(philox_samples(probs, num_samples, replacement), expected)


@pytest.mark.parametrize("scale", TINY_AND_HUGE)
def test_philox_tiny_and_huge_weights(scale: float) -> None:
    assert_equals_reference(torch.rand(200, 67) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", hard_rows(torch.float32))
def test_philox_hard_rows(name: str, dtype: torch.dtype) -> None:
    row = hard_rows(dtype)[name].to(dtype)
    assert_equals_reference(row.expand(30, -1))
    assert_equals_reference(row.expand(3, -1), 2)
    assert_equals_reference(row, 50, replacement=True)


def philox_samples(probs: torch.Tensor, num_samples: int, replacement: bool = False, threads: int = 1) -> torch.Tensor:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(1)
        return functional.multinomial(probs, num_samples, replacement, sampler="philox", generator=generator)
    finally:
        torch.set_num_threads(threads_before)


def test_philox_draws_all_of_many_tokens() -> None:
    """Of several groups of blocks of weights."""
    probs = torch.rand(1, 2500) if IN_SIMT else torch.rand(2, 40_000)
    assert_equals_reference(probs, 20)
    assert torch.equal(philox_samples(probs, probs.size(1)).sort().values, torch.arange(probs.size(1)).expand_as(probs))


def philox_draws(sequences: torch.Tensor, position: int = 0) -> torch.Tensor:
    """What philox_samples draws for these rows."""
    seed = reference._draw_seed(torch.Generator().manual_seed(1))
    return reference.draws(seed, sequences, position)


@pytest.mark.parametrize("offset", [0, 1, -1, 2**20, -(2**20), 2**33, -(2**33)])
def test_philox_draws_near_the_bounds_of_tokens(offset: int) -> None:
    """The high bits of the draws do not decide between the token that ends there and the one that begins there."""
    draws = torch.stack([philox_draws(torch.tensor(0), k) for k in range(64)])
    bounds = (draws + offset).clamp(1, 2**63 - 1).sort().values
    steps = bounds.diff(prepend=torch.zeros(1, dtype=torch.int64), append=torch.tensor([2**63 - 1]))
    probs = steps.double()
    tokens = philox_samples(probs, len(draws), replacement=True)
    expected = reference.tokens_of_draws(reference.weights_of_probs(probs), draws)
    assert torch.equal(tokens, expected)
    after = torch.searchsorted(bounds, draws, right=True)
    assert ((tokens - after).abs() <= 1).all()


def test_philox_one_likely_token_beside_many_tiny_ones() -> None:
    """Each tail token weighs what it should, not the least that an integer can."""
    skip_if_long(2**24)
    probs = torch.full((2**24,), 1e-15).index_fill(0, torch.tensor([123]), 1)
    assert (philox_samples(probs, 100_000, replacement=True) == 123).all()
    likelier = torch.full((2**22,), 1e-9).index_fill(0, torch.tensor([123]), 1)
    share = float((philox_samples(likelier, 1_000_000, replacement=True) != 123).double().mean())
    assert share == pytest.approx(2**22 * 1e-9 / (1 + 2**22 * 1e-9), rel=0.1)


def test_philox_many_equal_weights() -> None:
    """Of 3 * 2^22, whose shares 31 bits of draws could not give alike."""
    skip_if_long(3 * 2**22)
    tokens = philox_samples(torch.ones(3 * 2**22), 4_000_000, replacement=True)
    assert_follow(tokens // 2**10, torch.ones(3 * 2**12))
    assert_follow(tokens % 2**10, torch.ones(2**10))
    assert_follow(tokens % 3, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_philox_tiny_probs_without_replacement(dtype: torch.dtype) -> None:
    """What is left is drawn in its own proportions, however little it is, and before what is impossible."""
    num_rows = fewer(10_000)
    probs = torch.tensor([1.0, 0.0, 3e-18, 1e-18, 2.0**-100, 3 * 2.0**-100], dtype=torch.float64).to(dtype)
    samples = philox_samples(probs.expand(num_rows, -1), 6)
    assert (samples[:, 0] == 0).all()
    assert (samples[:, 5] == 1).all()
    for k, pair in ((1, [2, 3]), (3, [4, 5])):
        assert (samples[:, k : k + 2].sort().values == torch.tensor(pair)).all()
        likelier = pair[int(probs[pair].argmax())]
        share = float((samples[:, k] == likelier).double().mean())
        assert share == pytest.approx(float(probs[likelier] / probs[pair].sum()), abs=2.5 / num_rows**0.5)
    assert_equals_reference(probs.expand(30, -1), 6)
    magnitudes = torch.exp2(-torch.arange(0, 120, dtype=torch.float64)).to(dtype)
    assert_equals_reference(magnitudes[torch.randperm(120)].expand(3, -1), 120)


@pytest.mark.once
@pytest.mark.cpu_only
def test_handlers_run_during_calls_by_philox() -> None:
    probs, large = torch.rand(65), torch.rand(20, 300_000)
    call_until_handled(lambda size: partial(philox_samples, probs, size * 50_000_000, replacement=True))
    call_until_handled(lambda size: partial(philox_samples, large.repeat(size, 1), 300_000))


def assert_follow(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-squared is within five standard deviations of its mean."""
    expected = probs / probs.sum() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    statistic = ((counts - expected).square() / expected)[possible].sum()
    degrees = possible.sum() - 1
    assert abs(statistic - degrees) <= 5 * (2 * degrees).sqrt()


@pytest.mark.parametrize("vocab_size", [2, 65, 1000])
def test_philox_follows_the_distribution(vocab_size: int) -> None:
    num_rows = fewer(100_000)
    skip_if_long(2 * num_rows * vocab_size)
    probs = torch.rand(vocab_size) ** 3
    if vocab_size > 2:
        probs[::7] = 0
    assert_follow(philox_samples(probs, 3 * num_rows, replacement=True), probs)
    assert_follow(philox_samples(probs.expand(num_rows, -1), 1)[:, 0], probs)
    pairs = philox_samples(probs.expand(num_rows, -1), 2)
    assert_follow(pairs[:, 0], probs)
    argmax = int(probs.argmax())
    after_argmax = pairs[pairs[:, 0] == argmax, 1]
    assert (after_argmax != argmax).all()
    if vocab_size == 65:
        assert_follow(after_argmax, probs.index_fill(0, torch.tensor(argmax), 0))


def test_philox_samples_depend_only_on_row_and_position() -> None:
    skip_if_long(100 * 40 * 3000)
    probs = torch.rand(40, 3000)
    for replacement in (False, True):
        samples = philox_samples(probs, 70, replacement)
        for threads in (2, 3):
            assert torch.equal(philox_samples(probs, 70, replacement, threads), samples)
        assert torch.equal(philox_samples(probs[:3], 11, replacement), samples[:3, :11])
        assert torch.equal(philox_samples(probs, 1, replacement), samples[:, :1])
    many = philox_samples(probs[0], 100_000, replacement=True)
    assert torch.equal(many[:70], samples[0])
    assert torch.equal(many, philox_samples(probs[0], 100_000, replacement=True, threads=3))


def test_philox_takes_zeros_last() -> None:
    probs = torch.tensor([0.0, 1e-30, 0.0, 1.0, 0.5, 0.0])
    samples = philox_samples(probs.expand(20, 6), 6)
    assert (samples[:, :3].sort().values == torch.tensor([1, 3, 4])).all()
    assert (samples[:, 3:] == torch.tensor([0, 2, 5])).all()


def test_many_samples_follow_the_distribution() -> None:
    probs, count = torch.tensor([0.1, 0.0, 0.6, 0.3]), fewer(100_000)
    for samples in (
        functional.multinomial(probs, count, replacement=True),
        functional.multinomial(probs.expand(count, 4), 1)[:, 0],
    ):
        frequencies = torch.bincount(samples, minlength=4) / count
        torch.testing.assert_close(frequencies, probs, atol=0.01, rtol=0)
        assert frequencies[1] == 0


@pytest.mark.parametrize("sampler", [None, "philox"])
@pytest.mark.parametrize("replacement", [False, True])
def test_more_categories_than_torch_takes(replacement: bool, sampler: Any) -> None:
    """More than 2^24 categories, which float32 sums could not count."""
    skip_if_long(2**24)
    probs = torch.ones(2**24 + 8)
    probs[: 2**24] = 0
    samples = functional.multinomial(probs, 1 if not replacement else 500, replacement, sampler=sampler)
    assert samples.min() >= 2**24
    if replacement:
        assert len(samples.unique()) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0), 1), RuntimeError, r"1 or 2 dim, got shape \[\]"),
        ((torch.ones(1, 1, 1), 1), RuntimeError, r"1 or 2 dim, got shape \[1, 1, 1\]"),
        ((torch.ones(3, dtype=torch.int64), 1), RuntimeError, r"only supports floating-point dtypes.*got: Long"),
        ((torch.ones(3, dtype=torch.bool), 1), RuntimeError, r"only supports floating-point dtypes.*got: Bool"),
        ((torch.ones(3).to(torch.float8_e4m3fn), 1), NotImplementedError, r"Float8"),
        ((torch.ones(3), 0), RuntimeError, r"num_samples <= 0 samples, got 0"),
        ((torch.ones(3), 4), RuntimeError, r"\(4 > 3\) samples without replacement"),
        ((torch.zeros(0), 1), RuntimeError, r"without replacement"),
        ((torch.zeros(0), 1, True), RuntimeError, r"sum of probabilities <= 0"),
        ((torch.ones(3), 1.5), TypeError, r"'int' for argument 'num_samples'"),
        (([1.0], 1), TypeError, r"'Tensor' for argument 'probs'"),
        ((None, 1), TypeError, r"no tensor arguments"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        functional.multinomial(*map(on_device, arguments))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(error, match=message):
        functional.multinomial(*map(on_device, arguments), sampler="philox")


@pytest.mark.device_assertion
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([1.0, float("nan")]), 1), r"`inf`, `nan` or element < 0.*nan in row 0 at position 1"),
        ((torch.tensor([1.0, float("inf")]), 2, True), r"holds inf in row 0 at position 1"),
        ((torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), 1), r"holds -1 in row 1 at position 0"),
        ((torch.zeros(2), 1), r"sum of probabilities <= 0"),
        ((torch.zeros(2), 2, True), r"sum of probabilities <= 0"),
    ],
)
def test_bad_probs(arguments: tuple[Any, ...], message: str) -> None:
    state = torch.get_rng_state()
    with raises_in_kernel("multinomial", RuntimeError, message):
        functional.multinomial(*arguments)
    assert IN_SIMT or torch.equal(torch.get_rng_state(), state)
    with raises_in_kernel("multinomial", RuntimeError, message):
        functional.multinomial(*arguments, sampler="philox")


def test_bad_sampler() -> None:
    with pytest.raises(ValueError, match=r"'philox'.* got 'foo'"):
        functional.multinomial(torch.ones(3), 1, sampler="foo")  # type: ignore[arg-type]


@pytest.mark.gpu_only
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_does_not_capture_the_cpus_draws() -> None:
    with draws_frozen_by_a_graph("multinomial"), capturing():
        functional.multinomial(torch.ones(3), 1, generator=torch.Generator())


@pytest.mark.gpu_only
def test_a_gpu_cannot_replay_the_cpus_generator() -> None:
    with pytest.raises(ValueError, match=r"'philox'.* got 'torch'"):
        functional.multinomial(torch.ones(3), 1, sampler="torch")


@pytest.mark.device_assertion
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), -1.0, -(2.0**-20)])
def test_bad_probs_anywhere(value: float, dtype: torch.dtype) -> None:
    for position in range(67):
        probs = torch.zeros(3, 67, dtype=dtype)
        probs[:, 5] = 1
        probs[1, position] = value
        with raises_in_kernel("multinomial", RuntimeError, f"in row 1 at position {position}"):
            functional.multinomial(probs, 1)


def rows_of_zeros(dtype: torch.dtype) -> torch.Tensor:
    """Rows of zeros and negative zeros; only the first two have an element that is not zero."""
    probs = torch.zeros(3, 67, dtype=dtype)
    probs[:, ::2] = -0.0
    probs[:2, 66] = torch.finfo(dtype).smallest_normal
    return probs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_and_negative_zeros(dtype: torch.dtype) -> None:
    assert functional.multinomial(rows_of_zeros(dtype)[:2], 1).tolist() == [[66], [66]]


@pytest.mark.device_assertion
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_only(dtype: torch.dtype) -> None:
    with raises_in_kernel("multinomial", RuntimeError, r"sum of probabilities <= 0\) in row 2"):
        functional.multinomial(rows_of_zeros(dtype), 1)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_probs_that_require_grad(num_samples: int) -> None:
    probs = torch.rand(5, 3).t().requires_grad_()
    actual = functional.multinomial(probs, num_samples, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    sampler: Any = default_sampler()
    expected = reference.multinomial(probs.detach(), num_samples, sampler=sampler, generator=generator)
    assert torch.equal(actual, expected)


def test_bad_generator() -> None:
    with pytest.raises(TypeError, match="generator"):
        functional.multinomial(torch.ones(3), 1, generator=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_samples", "replacement", "message"),
    [
        (2**62, True, r"num_samples times the number of rows to be less than 2\^63, got 4611686018427387904 \* 3"),
        (2**60, True, "Storage size calculation overflowed"),
        (2**50, True, "memory"),
        (-(2**63), True, "num_samples <= 0 samples, got -9223372036854775808"),
        (2**63 - 1, False, r"num_samples > probs.size\(-1\)"),
    ],
)
def test_numbers_of_samples_out_of_range(num_samples: int, replacement: bool, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        functional.multinomial(torch.ones(3, 5), num_samples, replacement)
