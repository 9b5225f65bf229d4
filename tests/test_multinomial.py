"""functional.multinomial draws what torch.multinomial draws, and refuses what it refuses."""

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
)
def test_equals_torch(
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_samples: int,
    replacement: bool,
    zeros: bool,
    transposed: bool,
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
    ours, torchs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    actual = functional.multinomial(probs, num_samples, replacement, generator=ours)
    expected = reference.multinomial(probs, num_samples, replacement, generator=torchs)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    assert torch.equal(ours.get_state(), torchs.get_state())


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
    actual = functional.multinomial(probs, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual, torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)))


def test_many_samples_follow_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    for samples in (
        functional.multinomial(probs, 100_000, replacement=True),
        functional.multinomial(probs.expand(100_000, 4), 1)[:, 0],
    ):
        frequencies = torch.bincount(samples, minlength=4) / 100_000
        torch.testing.assert_close(frequencies, probs, atol=0.01, rtol=0)
        assert frequencies[1] == 0


@pytest.mark.parametrize("replacement", [False, True])
def test_more_categories_than_torch_takes(replacement: bool) -> None:
    """2^24 categories and one: float32 sums could not count them."""
    probs = torch.ones(2**24 + 8)
    probs[: 2**24] = 0
    samples = functional.multinomial(probs, 1 if not replacement else 500, replacement)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), -1.0, -(2.0**-20)])
def test_bad_probs_anywhere(value: float, dtype: torch.dtype) -> None:
    for position in range(67):
        probs = torch.zeros(3, 67, dtype=dtype)
        probs[:, 5] = 1
        probs[1, position] = value
        with pytest.raises(RuntimeError, match=f"in row 1 at position {position}"):
            functional.multinomial(probs, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_and_negative_zeros(dtype: torch.dtype) -> None:
    probs = torch.zeros(3, 67, dtype=dtype)
    probs[:, ::2] = -0.0
    probs[:2, 66] = torch.finfo(dtype).smallest_normal
    assert functional.multinomial(probs[:2], 1).tolist() == [[66], [66]]
    with pytest.raises(RuntimeError, match=r"sum of probabilities <= 0\) in row 2"):
        functional.multinomial(probs, 1)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_probs_that_require_grad(num_samples: int) -> None:
    probs = torch.rand(5, 3).t().requires_grad_()
    actual = functional.multinomial(probs, num_samples, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual, torch.multinomial(probs, num_samples, generator=torch.Generator().manual_seed(1)))


def test_bad_generator() -> None:
    with pytest.raises(TypeError, match="generator"):
        functional.multinomial(torch.ones(3), 1, generator=5)  # type: ignore[arg-type]
