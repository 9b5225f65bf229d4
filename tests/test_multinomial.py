"""functional.multinomial draws what torch.multinomial or, by "philox", the reference draws; and refuses what it refuses."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1,), (2,), (65,), (1, 65), (7, 33), (3, 1000), (0, 4)]),
    dtype=st.sampled_from(DTYPES),
    num_samples=st.sampled_from([1, 2, 5]),
    replacement=st.booleans(),
    zeros=st.booleans(),
    transposed=st.booleans(),
    sampler=st.sampled_from(["torch", "philox"]),
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
    expected = reference.multinomial(probs, num_samples, replacement, sampler=sampler, generator=references)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    assert torch.equal(ours.get_state(), references.get_state())


def test_default_generator() -> None:
    probs = torch.rand(5, 65)
    torch.manual_seed(3)
    actual = functional.multinomial(probs, 1)
    torch.manual_seed(3)
    assert torch.equal(actual, torch.multinomial(probs, 1))


@pytest.mark.parametrize("scale", [1e-38, 1e-44, 1e30])
def test_tiny_and_huge_weights(scale: float) -> None:
    """Ratios that are subnormal, or near the largest float32."""
    probs = torch.rand(200, 67) * scale
    by_reference = reference.multinomial(probs, 1, sampler="philox", generator=torch.Generator().manual_seed(1))
    assert torch.equal(philox_samples(probs, 1), by_reference)
    actual = functional.multinomial(probs, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual, torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)))


def philox_samples(probs: torch.Tensor, num_samples: int, replacement: bool = False, threads: int = 1) -> torch.Tensor:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(1)
        return functional.multinomial(probs, num_samples, replacement, sampler="philox", generator=generator)
    finally:
        torch.set_num_threads(threads_before)


def assert_follow(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-squared, within five of its standard deviations."""
    expected = probs / probs.sum() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    statistic = ((counts - expected).square() / expected)[possible].sum()
    degrees = possible.sum() - 1
    assert abs(statistic - degrees) <= 5 * (2 * degrees).sqrt()


@pytest.mark.parametrize("vocab_size", [2, 65, 1000])
def test_philox_follows_the_distribution(vocab_size: int) -> None:
    probs = torch.rand(vocab_size) ** 3
    if vocab_size > 2:
        probs[::7] = 0
    assert_follow(philox_samples(probs, 300_000, replacement=True), probs)
    assert_follow(philox_samples(probs.expand(100_000, -1), 1)[:, 0], probs)
    pairs = philox_samples(probs.expand(100_000, -1), 2)
    assert_follow(pairs[:, 0], probs)
    likeliest = int(probs.argmax())
    after_likeliest = pairs[pairs[:, 0] == likeliest, 1]
    assert (after_likeliest != likeliest).all()
    if vocab_size == 65:
        assert_follow(after_likeliest, probs.index_fill(0, torch.tensor(likeliest), 0))


def test_philox_samples_depend_on_row_and_position_alone() -> None:
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
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    for samples in (
        functional.multinomial(probs, 100_000, replacement=True),
        functional.multinomial(probs.expand(100_000, 4), 1)[:, 0],
    ):
        frequencies = torch.bincount(samples, minlength=4) / 100_000
        torch.testing.assert_close(frequencies, probs, atol=0.01, rtol=0)
        assert frequencies[1] == 0


@pytest.mark.parametrize("sampler", ["torch", "philox"])
@pytest.mark.parametrize("replacement", [False, True])
def test_more_categories_than_torch_takes(replacement: bool, sampler: Any) -> None:
    """2^24 categories and one: float32 sums could not count them."""
    probs = torch.ones(2**24 + 8)
    probs[: 2**24] = 0
    samples = functional.multinomial(probs, 1 if not replacement else 500, replacement, sampler=sampler)
    assert samples.min() >= 2**24
    if replacement:
        assert len(samples.unique()) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.tensor([1.0, float("nan")]), 1),
            RuntimeError,
            r"`inf`, `nan` or element < 0.*nan in row 0 at position 1",
        ),
        ((torch.tensor([1.0, float("inf")]), 2, True), RuntimeError, r"holds inf in row 0 at position 1"),
        ((torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), 1), RuntimeError, r"holds -1 in row 1 at position 0"),
        ((torch.zeros(2), 1), RuntimeError, r"sum of probabilities <= 0"),
        ((torch.zeros(2), 2, True), RuntimeError, r"sum of probabilities <= 0"),
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
        functional.multinomial(*arguments)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(error, match=message):
        functional.multinomial(*arguments, sampler="philox")


def test_bad_sampler() -> None:
    with pytest.raises(ValueError, match="'torch' or 'philox', got 'foo'"):
        functional.multinomial(torch.ones(3), 1, sampler="foo")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_probs_that_require_grad(num_samples: int) -> None:
    probs = torch.rand(5, 3).t().requires_grad_()
    actual = functional.multinomial(probs, num_samples, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual, torch.multinomial(probs, num_samples, generator=torch.Generator().manual_seed(1)))


def test_bad_generator() -> None:
    with pytest.raises(TypeError, match="generator"):
        functional.multinomial(torch.ones(3), 1, generator=5)  # type: ignore[arg-type]
