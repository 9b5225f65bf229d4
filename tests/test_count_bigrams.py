"""functional.count_bigrams against bincount."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import functional, reference

DTYPES = [torch.uint8, torch.uint16, torch.int32, torch.int64]


@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 65, 67, 127, 256]),
    num_tokens=st.sampled_from([0, 1, 2, 3, 100, 4097]),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2]),
)
def test_equals_reference(seed: int, vocab_size: int, num_tokens: int, dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(vocab_size, (num_tokens * step,)).to(dtype)[::step]
    counts = functional.count_bigrams(tokens, vocab_size)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, reference.count_bigrams(tokens, vocab_size))
    assert counts.sum() == max(num_tokens - 1, 0)


def test_large_vocabulary() -> None:
    tokens = torch.randint(60_000, (1000,))
    tokens[1] = 5
    counts = functional.count_bigrams(tokens % 3001, 3001)
    assert torch.equal(counts, reference.count_bigrams(tokens % 3001, 3001))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.int64, -1), (torch.int32, 5), (torch.uint16, 65535), (torch.uint8, 5)]
)
def test_token_out_of_range(dtype: torch.dtype, value: int, position: int) -> None:
    tokens = torch.tensor([1, 2, 3])
    tokens[position] = value
    with pytest.raises(IndexError, match=rf"holds {value} at position {position}, expected 0 <= token < 5"):
        functional.count_bigrams(tokens.to(dtype), 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([0.0]), 5), RuntimeError, r"dtypes.*got Float"),
        ((torch.tensor([0], dtype=torch.int8), 5), RuntimeError, r"dtypes.*got Char"),
        ((torch.tensor([[0]]), 5), RuntimeError, r"1-D, got shape \[1, 1\]"),
        ((torch.tensor([0]), 0), ValueError, r"vocab_size > 0, got 0"),
        ((torch.tensor([0]), -3), ValueError, r"vocab_size > 0, got -3"),
        ((torch.tensor([0]), 1.5), TypeError, r"vocab_size"),
        (([0], 5), TypeError, r"tokens"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.count_bigrams(*arguments)
