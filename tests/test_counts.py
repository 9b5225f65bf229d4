"""BigramCounts against a Counter, and what becomes of the counts where a call fails."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bigramx import BigramCounts, functional, storage
from bigramx.shards import TokenShards
from tests import processes
from tests.interrupts import call_until_handled
from tests.threads import at_once

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64]
FEW = 2**18  # tokens that are kept until there are more
TASK = 2**20  # pairs that a thread takes at once
CHUNK = 3 * 2**23  # pairs between two calls of progress


def counter_of(tokens: Tensor, eot: int | None = None) -> Counter[tuple[int, int]]:
    return Counter(pair for pair in itertools.pairwise(tokens.tolist()) if pair[0] != eot)


def as_counter(counts: BigramCounts) -> Counter[tuple[int, int]]:
    """By way of CSR, whose form is checked."""
    csr = counts.to_csr()
    assert csr.layout == torch.sparse_csr
    assert csr.shape == (counts.vocab_size, counts.vocab_size)
    crow, columns, values = csr.crow_indices(), csr.col_indices(), csr.values()
    assert {part.dtype for part in (crow, columns, values)} == {torch.int64}
    rows = torch.repeat_interleave(torch.arange(counts.vocab_size), crow.diff())
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert counts.num_distinct == len(pairs)
    assert counts.num_pairs == int(values.sum())
    return Counter(dict(zip(pairs, values.tolist(), strict=True)))


def counted(*sequences: Tensor, vocab_size: int, eot: int | None = None) -> BigramCounts:
    counts = BigramCounts(vocab_size, eot=eot)
    for tokens in sequences:
        counts.update(tokens)
    return counts


def zipf(num_tokens: int, vocab_size: int) -> Tensor:
    ranks = (torch.rand(num_tokens, dtype=torch.float64) * torch.tensor(vocab_size + 1.0).log()).exp().long()
    return ranks.clamp(max=vocab_size) - 1


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 65, 127, 1000, 1024, 50257, 2**16, 200_000, 2**21, 2**31 - 5]),
    sizes=st.lists(st.sampled_from([0, 1, 2, 3, 100, 1000]), max_size=4),
    num_values=st.sampled_from([1, 3, 50]),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2]),
    has_eot=st.booleans(),
)
def test_equals_a_counter(
    seed: int, vocab_size: int, sizes: list[int], num_values: int, dtype: torch.dtype, step: int, has_eot: bool
) -> None:
    generator = random.Random(seed)
    vocab_size = min(vocab_size, torch.iinfo(dtype).max)
    values = torch.tensor([generator.randrange(vocab_size) for _ in range(num_values)] + [vocab_size - 1])
    sequences = [values[torch.randint(len(values), (size * step,))].to(dtype)[::step] for size in sizes]
    eot = int(values[0]) if has_eot else None
    counts = counted(*sequences, vocab_size=vocab_size, eot=eot)
    expected = sum((counter_of(tokens, eot) for tokens in sequences), Counter())
    assert counts.num_pairs == sum(expected.values())
    if vocab_size <= 2**16:
        assert as_counter(counts) == expected
    else:
        rows = {row for row, _column in expected}
        for row in rows:
            found = counts.rows(row, row + 1)
            pairs = zip(found.col_indices().tolist(), found.values().tolist(), strict=True)
            assert dict(pairs) == {column: n for (first, column), n in expected.items() if first == row}


# A task of a thread, and what is kept until there are more; keys of 32 bits, and of 64.
@pytest.mark.parametrize("vocab_size", [2, 50257, 3 * 10**6])
@pytest.mark.parametrize("num_tokens", [FEW, FEW + 1, TASK + 2])
def test_large(num_tokens: int, vocab_size: int) -> None:
    tokens = zipf(num_tokens, vocab_size)
    pairs, expected = (tokens[:-1] * vocab_size + tokens[1:]).unique(return_counts=True)
    csr = counted(tokens.int(), vocab_size=vocab_size).to_csr()
    rows = torch.repeat_interleave(torch.arange(vocab_size), csr.crow_indices().diff())
    assert torch.equal(rows * vocab_size + csr.col_indices(), pairs)
    assert torch.equal(csr.values(), expected)


@pytest.mark.parametrize("vocab_size", [65, 2**22])
def test_several_chunks(vocab_size: int) -> None:
    """More pairs than are counted at once, with 32-bit keys and with 64-bit ones."""
    period = torch.arange(1009)
    tokens = (period % 61 if vocab_size == 65 else period * 4001).to(torch.uint8 if vocab_size == 65 else torch.int32)
    num_periods = CHUNK // 1009 + 2
    counts = counted(tokens.repeat(num_periods), vocab_size=vocab_size)
    once = counter_of(torch.cat((tokens, tokens[:1])))
    expected = Counter({pair: count * num_periods for pair, count in once.items()})
    expected[int(tokens[-1]), int(tokens[0])] -= 1
    assert as_counter(counts) == expected


def test_any_order_and_any_number_of_threads() -> None:
    shards = [zipf(size, 300).to(torch.int32) for size in (3, FEW + 7, 1000, FEW + 5, 0, 70_000)]
    expected = counted(*shards, vocab_size=300, eot=3)
    for num_threads, order in ((1, shards), (2, shards[::-1])):
        torch.set_num_threads(num_threads)
        counts = BigramCounts(300, eot=3)
        counts.update(TokenShards(order, eot=3))
        assert counts == expected
    assert as_counter(expected) == sum((counter_of(shard, 3) for shard in shards), Counter())


@pytest.mark.parametrize("num_tokens", [10, 2 * FEW])
def test_end_of_text(num_tokens: int) -> None:
    tokens = torch.arange(num_tokens) % 3
    assert set(as_counter(counted(tokens, vocab_size=3))) == {(0, 1), (1, 2), (2, 0)}
    counts = counted(tokens, vocab_size=3, eot=2)
    assert as_counter(counts) == counter_of(tokens, 2)
    assert set(as_counter(counts)) == {(0, 1), (1, 2)}
    counts = counted(torch.full((num_tokens,), 2), vocab_size=3, eot=2)
    assert (counts.num_pairs, counts.num_distinct) == (0, 0)


def test_memory_mapped_tokens(tmp_path: Path) -> None:
    tokens = zipf(2 * FEW, 1000).to(torch.uint16)
    path = tmp_path / "tokens.bin"
    path.write_bytes(tokens.numpy().tobytes())
    mapped = torch.from_file(str(path), size=len(tokens), dtype=torch.uint16)
    assert counted(mapped, vocab_size=1000) == counted(tokens, vocab_size=1000)


def test_rows_and_dense() -> None:
    tokens = torch.randint(2000, (50_000,))
    counts = counted(tokens, vocab_size=2000)
    dense = functional.count_bigrams(tokens, 2000)
    assert torch.equal(counts.to_dense(), dense)
    for begin, end in [(0, 2000), (0, 0), (2000, 2000), (5, 6), (1, 1999), (63, 65), (64, 128), (500, 1500)]:
        rows = counts.rows(begin, end)
        assert rows.shape == (end - begin, 2000)
        assert torch.equal(rows.to_dense(), dense[begin:end])
    for begin, end in [(-1, 5), (5, 4), (0, 2001), (2001, 2001)]:
        with pytest.raises(IndexError, match=f"expected 0 <= begin <= end <= 2000, got {begin} and {end}"):
            counts.rows(begin, end)


def test_merge() -> None:
    first, second = zipf(2 * FEW, 3000), torch.randint(3000, (1000,))
    counts, other = counted(first, vocab_size=3000), counted(second, vocab_size=3000)
    counts.merge(other)
    assert counts == counted(second, first, vocab_size=3000)
    assert other == counted(second, vocab_size=3000)
    other.merge(other)
    assert other == counted(second, second, vocab_size=3000)
    for different in (BigramCounts(2999), BigramCounts(3000, eot=1)):
        with pytest.raises(ValueError, match="expected counts with vocab_size=3000 and eot=None, got"):
            counts.merge(different)
        assert counts != different


# Counts need more bits than are left beside a pair, of which there are 11 for the largest V.
@pytest.mark.parametrize("vocab_size", [7, 50257, 2**22, 2**31])
def test_huge_counts(vocab_size: int, tmp_path: Path) -> None:
    if vocab_size > 2**22:  # a CSR tensor of all rows would take 16 GB
        tokens = torch.full((2**13,), vocab_size - 1)
        counts = counted(tokens, vocab_size=vocab_size)
        for _ in range(40):
            counts.merge(counts)
        assert counts.num_pairs == (2**13 - 1) * 2**40
        last = counts.rows(vocab_size - 3, vocab_size)
        assert last.crow_indices().tolist() == [0, 0, 0, 1]
        assert last.values().tolist() == [(2**13 - 1) * 2**40]
        return
    values = [2**32 + 5, 1, 2**62 - 2**40]
    columns = [0, 3, vocab_size - 1]
    crow = torch.full((vocab_size + 1,), 3)
    crow[0] = 0
    csr = torch.sparse_csr_tensor(crow, torch.tensor(columns), torch.tensor(values), check_invariants=True)
    counts = BigramCounts.from_csr(csr)
    counts.merge(counts)
    expected = {(0, column): 2 * value for column, value in zip(columns, values, strict=True)}
    assert as_counter(counts) == expected
    counts.save(tmp_path / "counts")
    assert BigramCounts.load(tmp_path / "counts") == counts
    before = copy.deepcopy(counts)
    with pytest.raises(OverflowError, match=r"the sum of the counts to be less than 2\^63"):
        counts.merge(counts)
    assert counts == before


def csr_of(dense: Tensor) -> Tensor:
    """With one zero among the values."""
    is_kept = dense != 0
    is_kept[0, 0] = True
    ends = is_kept.sum(1).cumsum(0)
    columns = is_kept.nonzero()[:, 1]
    return torch.sparse_csr_tensor(
        torch.cat((ends.new_zeros(1), ends)), columns, dense[is_kept], dense.shape, check_invariants=True
    )


def test_counts_of_tensors() -> None:
    dense = torch.randint(-5, 9, (30, 30)).clamp(min=0)
    dense[3], dense[0, 0] = 0, 0
    for layout in ("strided", "sparse_coo", "sparse_csr"):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            given_counts = dense.to(dtype)
            if layout == "sparse_coo":
                given_counts = given_counts.to_sparse_coo()
            elif layout == "sparse_csr":
                given_counts = csr_of(given_counts)
            counts = BigramCounts.from_csr(given_counts)
            assert torch.equal(counts.to_dense(), dense)
            assert torch.equal(
                BigramCounts.from_csr(given_counts, eot=5).to_dense()[4:7], dense[4:7] * torch.tensor([[1], [0], [1]])
            )
    uncoalesced = torch.sparse_coo_tensor(
        torch.tensor([[2, 1, 2], [0, 1, 0]]), torch.tensor([1, 2, 3]), (3, 3), check_invariants=True
    )
    assert as_counter(BigramCounts.from_csr(uncoalesced)) == {(2, 0): 4, (1, 1): 2}


def unchecked_csr(crow: list[int], columns: list[int], values: list[int], vocab_size: int = 3) -> Tensor:
    parts = torch.tensor(crow), torch.tensor(columns), torch.tensor(values)
    return torch.sparse_csr_tensor(*parts, (vocab_size, vocab_size), check_invariants=False)


WRONG_CSR = [
    ([0, 1, 2, 2], [0, 3], [1, 1], "col_indices of row 1 that ascend from 0 to below 3, got 3 after -1"),
    ([0, 1, 2, 2], [-1, 0], [1, 1], "col_indices of row 0 that ascend"),
    ([0, 2, 2, 2], [1, 1], [1, 1], "got 1 after 1"),
    ([0, 2, 2, 2], [1, 0], [1, 1], "got 0 after 1"),
    ([0, 1, 1, 1], [0], [-1], "expected values >= 0, got -1 in row 0, column 0"),
    ([0, 1, 1, 1], [0], [-(2**63)], "expected values >= 0"),
    ([1, 1, 1, 1], [0], [1], "crow_indices that begin with 0"),
    ([0, 2, 1, 2], [0, 1], [1, 1], "do not descend, got 1 at position 2"),
    ([0, 1, 1, 2**62], [0], [1], "crow_indices to end with 1, the number of counts"),
    ([0, -5, 1, 1], [0], [1], "do not descend"),
]


@pytest.mark.parametrize(("crow", "columns", "values", "message"), WRONG_CSR)
def test_wrong_csr(crow: list[int], columns: list[int], values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigramCounts.from_csr(unchecked_csr(crow, columns, values))


def test_wrong_counts() -> None:
    with pytest.raises(RuntimeError, match=r"square, \(V, V\), got shape \(2, 3\)"):
        BigramCounts.from_csr(torch.zeros(2, 3, dtype=torch.int64))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(RuntimeError, match="expected counts to hold integers"):
            BigramCounts.from_csr(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(ValueError, match="expected values >= 0, got -1 in row 1, column 0"):
        BigramCounts.from_csr(torch.tensor([[0, 2], [-1, 0]]))
    with pytest.raises(OverflowError):
        BigramCounts.from_csr(torch.full((2, 2), 2**62))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, r"expected 0 < vocab_size <= 2\^31, got 0"),
        ((2**31 + 1,), ValueError, r"got 2147483649"),
        ((5, 5), ValueError, "expected eot to be a token, 0 <= eot < 5, got 5"),
        ((5, -1), ValueError, "0 <= eot < 5, got -1"),
        ((2**70,), ValueError, "got 1180591620717411303424"),
        ((1.5,), TypeError, "expected vocab_size to be an int, got float"),
        ((5, "a"), TypeError, "expected eot to be an int, got str"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BigramCounts(arguments[0], eot=arguments[1] if len(arguments) > 1 else None)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([0.0]), RuntimeError, "dtypes.*got Float"),
        (torch.tensor([0], dtype=torch.int8), RuntimeError, "dtypes.*got Char"),
        (torch.tensor([[0]]), RuntimeError, r"1-D, got shape \[1, 1\]"),
        (torch.tensor(0), RuntimeError, "1-D"),
        (torch.zeros(3, dtype=torch.int64).to_sparse(), NotImplementedError, "tokens of layout Sparse"),
        ([0, 1], TypeError, "expected tokens to be a Tensor or TokenShards, got list"),
        (TokenShards([torch.tensor([0, 1])], eot=1), ValueError, "documents end with None, as these counts', got 1"),
    ],
)
def test_bad_tokens(tokens: Any, error: type[Exception], message: str) -> None:
    counts = counted(torch.tensor([0, 1, 2]), vocab_size=5)
    with pytest.raises(error, match=message):
        counts.update(tokens)
    assert as_counter(counts) == {(0, 1): 1, (1, 2): 1}


@pytest.mark.parametrize("num_tokens", [1, 2, 1000, FEW + 2, 2 * TASK])
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.uint8, [65, 255]),
        (torch.uint16, [65, 65535]),
        (torch.uint32, [65, 2**32 - 1]),
        (torch.int32, [-1, 2**31 - 1]),
        (torch.int64, [-1, 65, -(2**63), 2**63 - 1, 2**32 + 3]),
    ],
)
def test_token_out_of_range(dtype: torch.dtype, values: list[int], num_tokens: int) -> None:
    """The counts are as they were, and the error names the first."""
    counts = counted(torch.tensor([0, 1, 2]), vocab_size=65)
    for value in values:
        for position in {0, num_tokens // 2, num_tokens - 1}:
            tokens = torch.randint(65, (num_tokens,)).to(dtype)
            tokens[-1] = torch.tensor(values[0]).to(dtype)
            tokens[position] = torch.tensor(value).to(dtype)
            message = f"tokens holds {value} at position {position}, expected 0 <= token < 65"
            with pytest.raises(IndexError, match=message):
                counts.update(tokens)
    assert as_counter(counts) == {(0, 1): 1, (1, 2): 1}


def test_error_in_a_shard() -> None:
    shards = TokenShards([torch.tensor([0, 1]), torch.tensor([1, 9]), torch.tensor([2, 2])], names=["a", "b", "c"])
    counts = BigramCounts(5)
    with pytest.raises(IndexError, match=r"^b: count_bigrams: tokens holds 9 at position 1, expected 0 <= token < 5$"):
        counts.update(shards)
    assert as_counter(counts) == {(0, 1): 1}


def test_position_behind_the_first_chunk() -> None:
    tokens = torch.zeros(CHUNK + 5, dtype=torch.uint8)
    tokens[-2] = 3
    counts = BigramCounts(3)
    with pytest.raises(IndexError, match=f"tokens holds 3 at position {CHUNK + 3},"):
        counts.update(tokens)
    assert counts.num_pairs == 0


def test_progress() -> None:
    done: list[int] = []
    counts = BigramCounts(3)
    shards = [torch.zeros(size, dtype=torch.uint8) for size in (0, 1, 2, FEW, FEW + 1, CHUNK + 5)]
    for shard in shards:
        counts.update(shard, progress=done.append)
        assert sum(done) == len(shard)
        done.clear()
    counts.update(TokenShards(shards), progress=done.append)
    assert sum(done) == sum(map(len, shards))


@pytest.mark.parametrize("num_tokens", [2, FEW + 1, CHUNK + 5])
def test_progress_that_raises(num_tokens: int) -> None:
    counts = counted(torch.tensor([0, 1, 2]), vocab_size=3)

    def interrupt(_num_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counts.update(torch.zeros(num_tokens, dtype=torch.uint8), progress=interrupt)
    assert as_counter(counts) == {(0, 1): 1, (1, 2): 1}


# ------------------------------------------------------------------------------------------- interrupts, threads


def test_handlers_run_during_an_update() -> None:
    """And may use the counts that are being updated."""
    tokens = zipf(2**22, 50257).to(torch.uint16)
    counts, seen = [], []

    def prepare(size: int) -> Callable[[], None]:
        counts.append(BigramCounts(50257))
        return partial(counts[-1].update, tokens.repeat(16 * size))

    _, size = call_until_handled(prepare, lambda: seen.append(counts[-1].num_pairs))
    assert counts[-1] == counted(tokens.repeat(16 * size), vocab_size=50257)
    assert set(seen) - {kept.num_pairs for kept in counts} == {0}


def raising_handler(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted() -> Iterator[None]:
    """A KeyboardInterrupt at SIGALRM."""
    handler = signal.signal(signal.SIGALRM, raising_handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_leaves_the_counts() -> None:
    tokens = zipf(2**22, 50257).repeat(5).to(torch.uint16)
    counts = counted(torch.randint(50257, (2 * FEW,)), vocab_size=50257)
    before = copy.deepcopy(counts)
    for delay in (0.001, 0.01, 0.03):
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012, the signal may come a little later
            signal.setitimer(signal.ITIMER_REAL, delay)
            counts.update(tokens)
        assert counts == before


def test_threads_that_update_one_object() -> None:
    shards = [zipf(size, 2000).to(torch.int32) for size in [500, FEW + 1, 3, 80_000] * 4]
    counts = BigramCounts(2000)
    sums: list[tuple[int, int]] = []

    def update(k: int) -> None:
        for shard in shards[k::4]:
            counts.update(shard)
            csr = counts.to_csr()
            sums.append((int(csr.values().sum()), int(csr.crow_indices()[-1] - csr.values().numel())))

    threads = [threading.Thread(target=update, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == counted(*shards, vocab_size=2000)
    assert max(sums) == (sum(len(shard) - 1 for shard in shards), 0)
    assert {difference for _sum, difference in sums} == {0}


def merged_alone(counts: BigramCounts) -> BigramCounts:
    merged = BigramCounts(counts.vocab_size)
    merged.merge(counts)
    return merged


@pytest.mark.parametrize("read", [lambda counts: counts, copy.deepcopy, merged_alone])
def test_threads_see_their_own_updates(read: Callable[[BigramCounts], BigramCounts]) -> None:
    """Also where another, which began to count what is pending before the update, ends first."""
    counts = BigramCounts(2000)
    seen: list[list[int]] = [[], [], [], []]

    def update(k: int) -> None:
        for _ in range(100):
            counts.update(torch.tensor([k, k + 1]))
            seen[k].append(int(read(counts).rows(k, k + 1).values().sum()))

    at_once(*(partial(update, k) for k in range(len(seen))))
    assert seen == [list(range(1, 101))] * len(seen)


# ----------------------------------------------------------------------------------------------------------- files


def test_copies_and_files(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    for eot in (None, 0, 7):
        for tokens in (torch.tensor([], dtype=torch.int64), torch.tensor([1]), zipf(5000, 100)):
            counts = counted(tokens, vocab_size=100, eot=eot)
            counts.save(path)
            for same in (
                BigramCounts.load(path),
                copy.copy(counts),
                copy.deepcopy(counts),
                pickle.loads(pickle.dumps(counts)),
            ):
                assert same == counts
                assert (same.vocab_size, same.eot) == (100, eot)
                assert as_counter(same) == as_counter(counts)
                same.update(torch.tensor([3, 4]))
                assert same != counts
    with pytest.raises(TypeError):
        hash(counts)
    assert counts != 5
    assert repr(BigramCounts(5, eot=3)) == "BigramCounts(5, eot=3): 0 pairs"


def test_files_are_small(tmp_path: Path) -> None:
    counts = counted(torch.randint(1000, (100_000,)), vocab_size=1000)
    counts.save(tmp_path / "counts")
    assert (tmp_path / "counts").stat().st_size < 8 * counts.num_distinct + 8 * 1001 + 1000


def write_counts(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    parts = {
        "crow_indices": torch.tensor([0, 1, 2, 2]),
        "col_indices": torch.tensor([0, 2], dtype=torch.int32),
        "values": torch.tensor([5, 7], dtype=torch.int32),
    }
    storage.write_tensors(path, "counts", {**parts, **tensors}, {"vocab_size": "3", "eot": "null", **metadata})


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    write_counts(path, {})
    assert as_counter(BigramCounts.load(path)) == {(0, 0): 5, (1, 2): 7}
    for crow, columns, values, _message in WRONG_CSR:
        tensors = dict(
            zip(("crow_indices", "col_indices", "values"), map(torch.tensor, (crow, columns, values)), strict=True)
        )
        write_counts(path, tensors)
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)
    for tensors in (
        {"values": torch.tensor([5, 0])},
        {"values": torch.tensor([5])},
        {"values": torch.tensor([[5, 7]])},
        {"values": torch.tensor([5.0, 7.0])},
        {"values": torch.tensor([2**62, 2**62])},
        {"crow_indices": torch.tensor([0, 1, 2])},
        {"col_indices": torch.tensor([0, 2, 2])},
        {"more": torch.tensor(1)},
    ):
        write_counts(path, tensors)
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)
    for metadata in (
        {"vocab_size": value} for value in ("2", "4", "0", "-1", "3.0", "true", '"3"', "1e999", "{", str(2**70))
    ):
        write_counts(path, {}, **metadata)
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)
    for eot in ("3", "-1", "1.0", "[]", "nul"):
        write_counts(path, {}, eot=eot)
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)
    write_counts(path, {})
    content = path.read_bytes()
    for k in range(0, len(content), 7):
        path.write_bytes(content[:k] + bytes([content[k] ^ 4]) + content[k + 1 :])
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)
        path.write_bytes(content[:k])
        with pytest.raises(ValueError, match=f"^{path}: "):
            BigramCounts.load(path)


# ---------------------------------------------------------------------------------------------------------- memory

PEAK = """
import resource, torch
from bigramx import BigramCounts, functional
def peak(): return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
torch.set_num_threads(2)
tokens = torch.randint(50257, (4_000_000,), dtype=torch.int32)
functional.count_bigrams(tokens[:1000], 50257, torch.sparse_csr)
before = peak()
counts = functional.count_bigrams(tokens, 50257, torch.sparse_csr)
print(peak() - before - 16 * counts.values().numel())
"""


def test_memory() -> None:
    """At most 16 bytes for each distinct pair, of which there are almost as many as tokens here, and 256 MB."""
    result = processes.run([sys.executable, "-c", PEAK])
    assert int(result.stdout) < 256e6, result.stderr
