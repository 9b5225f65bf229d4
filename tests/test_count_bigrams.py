"""functional.count_bigrams against a Counter and bincount."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bigramx import functional, reference
from tests import processes
from tests.devices import on_device, raises_in_kernel, skip_if_long
from tests.interrupts import call_until_handled

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64]
BLOCK = 256  # pairs
CHUNK = 2**21  # pairs of a job between checks for signals
JOB = 2**17  # pairs that make another thread worthwhile, for tables of no more entries than that
PIECE = 2**15  # pairs of a row, of more of which CUDA kernels make pieces


def counted(tokens: Tensor, vocab_size: int) -> Tensor:
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    values = tokens.tolist()
    for pair, count in Counter(itertools.pairwise(values)).items():
        counts[pair] = count
    return counts


@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 65, 67, 127, 256, 1000]),
    num_tokens=st.sampled_from([0, 1, 2, 3, 100, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1, 4097]),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2]),
)
def test_equals_a_counter(seed: int, vocab_size: int, num_tokens: int, dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(vocab_size, (num_tokens * step,)).to(dtype)[::step]
    counts = functional.count_bigrams(tokens, vocab_size)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, counted(tokens, vocab_size))
    assert torch.equal(counts, reference.count_bigrams(tokens, vocab_size))


# Sizes at which one job becomes two, 16-bit counters become 8-bit ones, and a job's own table begins to pay off.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab_size", "num_pairs"),
    [
        *[(65, jobs * JOB + extra) for jobs in (1, 2, 3) for extra in (-1, 0, 1, BLOCK)],
        *[(vocab_size, 2 * JOB + 7) for vocab_size in (1, 2, 67, 128, 129, 256)],
        *[(1000, pairs) for pairs in (10**6 - 1, 10**6, 2 * 10**6)],
    ],
)
def test_large(vocab_size: int, num_pairs: int, dtype: torch.dtype, num_threads: int) -> None:
    skip_if_long(num_pairs if dtype == torch.int64 else 4 * num_pairs)
    tokens = torch.randint(vocab_size, (num_pairs + 1,)).to(dtype)
    assert torch.equal(functional.count_bigrams(tokens, vocab_size), reference.count_bigrams(tokens, vocab_size))


@pytest.mark.parametrize("vocab_size", [65, 256])
@pytest.mark.parametrize("num_pairs", [255, 256, 65535, 65536, 70_000, JOB - 1, JOB, JOB + 1, 200_000, 4 * JOB + 3])
def test_a_pair_that_outgrows_its_counter(vocab_size: int, num_pairs: int, num_threads: int) -> None:
    expected = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    expected[3, 3] = num_pairs
    assert torch.equal(functional.count_bigrams(torch.full((num_pairs + 1,), 3), vocab_size), expected)
    expected[3, 3] = 0
    expected[0, 64], expected[64, 0] = (num_pairs + 1) // 2, num_pairs // 2
    assert torch.equal(functional.count_bigrams(64 * (torch.arange(num_pairs + 1) % 2), vocab_size), expected)


@pytest.mark.parametrize("extra", [-1, 0, 1, 2 * CHUNK])
def test_chunks(extra: int, num_threads: int) -> None:
    """Sizes at which a chunk of each job becomes two."""
    skip_if_long(CHUNK)
    tokens = torch.randint(65, (num_threads * CHUNK + extra,)).to(torch.uint8)
    assert torch.equal(functional.count_bigrams(tokens, 65), reference.count_bigrams(tokens, 65))
    tokens[-1] = 65
    message = f"tokens holds 65 at position {len(tokens) - 1}"
    with raises_in_kernel("count_bigrams", IndexError, message):
        functional.count_bigrams(tokens, 65)


@pytest.mark.once
@pytest.mark.cpu_only
def test_handlers_run_during_a_call() -> None:
    """In a table that is too large for each thread to have its own."""
    tokens = torch.randint(5000, (15_000_000,), dtype=torch.int32)
    call_until_handled(lambda size: partial(functional.count_bigrams, tokens.repeat(size), 5000))


def test_large_vocabulary() -> None:
    tokens = torch.randint(2003, (1000,))
    counts = functional.count_bigrams(tokens, 2003)
    assert torch.equal(counts, reference.count_bigrams(tokens, 2003))


def test_a_row_with_most_of_the_pairs() -> None:
    tokens = torch.multinomial(1 / torch.arange(1.0, 301), 5 * PIECE, replacement=True)
    tokens[torch.rand(len(tokens)) < 0.8] = 7
    assert torch.equal(functional.count_bigrams(tokens, 300), reference.count_bigrams(tokens, 300))


@pytest.mark.parametrize(
    "row_sizes",
    [
        [PIECE - 1],
        [PIECE],
        [PIECE + 1],
        [2 * PIECE],
        [2 * PIECE + 1],
        [1, PIECE],  # cut, but too short to be split
        [1, PIECE + 1],
        [1, 2 * PIECE - 1, 1],  # ends at a cut
        [1, 2 * PIECE, 1],
        [PIECE, 0, 0, PIECE, PIECE + 1, 0, 5],  # each begins at a cut
        [PIECE // 2, 2 * PIECE, PIECE // 2 + 1],
    ],
)
def test_rows_in_pieces(row_sizes: list[int]) -> None:
    """Sizes at which a row has one piece more."""
    vocab_size = 200  # a table too large for shared memory
    tokens = torch.arange(len(row_sizes)).repeat_interleave(torch.tensor(row_sizes))
    tokens = torch.cat((tokens[torch.randperm(len(tokens))], torch.tensor([vocab_size - 1])))
    assert torch.equal(functional.count_bigrams(tokens, vocab_size), reference.count_bigrams(tokens, vocab_size))


@pytest.mark.device_assertion
@pytest.mark.parametrize("num_tokens", [1, 3, 2 * BLOCK + 9, 2 * JOB + 9])
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.uint8, [65, 255]),
        (torch.uint16, [65, 65535]),
        (torch.int32, [-1, 65, -(2**31), 2**31 - 1]),
        (torch.int64, [-1, 65, -(2**63), 2**63 - 1, 2**32 + 3, 2**16, 2**8]),
    ],
)
def test_token_out_of_range(dtype: torch.dtype, values: list[int], num_tokens: int, num_threads: int) -> None:
    borders = [0, 1, 2, num_tokens // 2, num_tokens - 2, num_tokens - 1]
    borders += [border + offset for border in (BLOCK, 2 * BLOCK, JOB + 4) for offset in (-1, 0, 1)]
    skip_if_long(len(borders) * len(values) * num_tokens)
    for position in sorted({border for border in borders if 0 <= border < num_tokens}):
        for value in values:
            tokens = torch.randint(65, (num_tokens,)).to(dtype)
            if value != values[0]:
                tokens[-1] = torch.tensor(values[0]).to(dtype)  # the error names the first of the two
            tokens[position] = torch.tensor(value).to(dtype)
            message = rf"tokens holds {value} at position {position}, expected 0 <= token < 65"
            with raises_in_kernel("count_bigrams", IndexError, message):
                functional.count_bigrams(tokens, 65)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([0.0]), 5), RuntimeError, r"dtypes.*got Float"),
        ((torch.tensor([0], dtype=torch.int8), 5), RuntimeError, r"dtypes.*got Char"),
        ((torch.tensor([[0]]), 5), RuntimeError, r"1-D, got shape \[1, 1\]"),
        ((torch.tensor([0]), 0), ValueError, r"vocab_size > 0, got 0"),
        ((torch.tensor([0]), -3), ValueError, r"vocab_size > 0, got -3"),
        ((torch.tensor([0]), -(2**63)), ValueError, r"vocab_size > 0, got -9223372036854775808"),
        (
            (torch.tensor([0]), 2**32),
            RuntimeError,
            r"vocab_size\^2 to be less than 2\^63, got 4294967296 \* 4294967296",
        ),
        ((torch.tensor([0]), 2**63 - 1), RuntimeError, r"vocab_size\^2"),
        ((torch.tensor([0]), 2**31), RuntimeError, r"Storage size calculation overflowed"),
        ((torch.tensor([0]), 2**28), RuntimeError, r"memory"),
        ((torch.tensor([0]), 2**63), TypeError, r"vocab_size"),
        ((torch.tensor([0]), 1.5), TypeError, r"vocab_size"),
        (([0], 5), TypeError, r"tokens"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.count_bigrams(*map(on_device, arguments))


# ---------------------------------------------------------------------------------------------------------- sparse


def assert_same_csr(actual: Tensor, expected: Tensor) -> None:
    assert actual.layout == torch.sparse_csr
    assert actual.shape == expected.shape
    for part in ("crow_indices", "col_indices", "values"):
        assert getattr(actual, part)().dtype == torch.int64
        assert torch.equal(getattr(actual, part)(), getattr(expected, part)().to(actual.device))


@pytest.mark.cpu_only
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 65, 127, 1000]),
    num_tokens=st.sampled_from([0, 1, 2, 3, 100, 4097]),
    dtype=st.sampled_from([*DTYPES, torch.uint32]),
    step=st.sampled_from([1, 2]),
)
def test_sparse_equals_dense(seed: int, vocab_size: int, num_tokens: int, dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(seed)
    vocab_size = min(vocab_size, torch.iinfo(dtype).max)
    tokens = torch.randint(vocab_size, (num_tokens * step,)).to(dtype)[::step]
    counts = functional.count_bigrams(tokens, vocab_size, torch.sparse_csr)
    assert_same_csr(counts, reference.count_bigrams(tokens, vocab_size, layout=torch.sparse_csr))
    assert torch.equal(counts.to_dense(), functional.count_bigrams(tokens, vocab_size))
    assert torch.equal(counts.to_dense(), counted(tokens, vocab_size))


@pytest.mark.cpu_only
@pytest.mark.parametrize("vocab_size", [1, 300, 50257, 200_000])
def test_large_sparse(vocab_size: int, num_threads: int) -> None:
    tokens = torch.randint(vocab_size, (700_000,)) // torch.randint(1, 50, (700_000,))
    counts = functional.count_bigrams(tokens.int(), vocab_size, layout=torch.sparse_csr)
    assert_same_csr(counts, reference.count_bigrams(tokens, vocab_size, torch.sparse_csr))
    tokens[600_000] = vocab_size
    with pytest.raises(IndexError, match=f"tokens holds {vocab_size} at position 600000, expected 0 <= token"):
        functional.count_bigrams(tokens, vocab_size, layout=torch.sparse_csr)


@pytest.mark.once
@pytest.mark.cpu_only
def test_the_first_sparse_counts_warn_of_nothing() -> None:
    """PyTorch says once in each process that CSR tensors are in beta state."""
    code = (
        "import torch; from bigramx import functional as f; f.count_bigrams(torch.tensor([0, 1]), 2, torch.sparse_csr)"
    )
    result = processes.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert result.stderr == ""


@pytest.mark.cpu_only
def test_sparse_counts_under_compile() -> None:
    """The graph is broken: it has no sparse tensors."""

    def count(tokens: Tensor) -> Tensor:
        return functional.count_bigrams(tokens + 1, 9, torch.sparse_csr)

    tokens = torch.tensor([0, 1, 0, 1])
    compiled = torch.compile(count, backend="eager")
    assert_same_csr(compiled(tokens), count(tokens))


@pytest.mark.parametrize("function", [functional.count_bigrams, reference.count_bigrams])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csc, torch.sparse_bsr])
def test_other_layouts(function: Any, layout: torch.layout) -> None:
    with pytest.raises(NotImplementedError, match=f"not implemented for layout {layout}"):
        function(on_device(torch.tensor([0, 1])), 2, layout)


def test_no_layout() -> None:
    with pytest.raises(TypeError, match=r"argument 'layout' must be torch.layout, not str"):
        functional.count_bigrams(on_device(torch.tensor([0, 1])), 2, "sparse_csr")  # type: ignore[arg-type]


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([0.0]), 5), RuntimeError, r"dtypes.*got Float"),
        ((torch.tensor([[0]]), 5), RuntimeError, r"1-D, got shape \[1, 1\]"),
        ((torch.tensor([0]), 0), ValueError, r"0 < vocab_size <= 2\^31, got 0"),
        ((torch.tensor([0]), 2**32), ValueError, r"0 < vocab_size <= 2\^31, got 4294967296"),
        ((torch.tensor([0]), 2**63), ValueError, r"0 < vocab_size <= 2\^31"),
        ((torch.tensor([0]), 1.5), TypeError, "expected vocab_size to be an int, got float"),
        (([0], 5), TypeError, r"expected tokens to be a Tensor or TokenShards, got list"),
    ],
)
def test_bad_arguments_of_sparse_counts(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    tokens, vocab_size = arguments
    with pytest.raises(error, match=message):
        functional.count_bigrams(tokens, vocab_size, torch.sparse_csr)
