"""Exact losses of tokens and of pair counts.

Tokens are read chunk by chunk and tables block by block, so that a memory-mapped corpus stays on its disk: beyond a
table and its counts everything here takes less than 64 MB of memory, however many tokens there are.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from bigramx import functional
from bigramx.data import (
    TokenShards,
    are_worth_counting,
    check_range,
    check_tokens,
    num_pairs,
    shards_of,
    token_range,
)

_CHUNK = 2**18  # tokens, or elements of a table, that are read at once: 2 MB in 64 bits
_COUNTED_AT_ONCE = 2**24  # bytes of tokens that are given to count_bigrams
_LARGE_TABLE = 24 * 2**20  # bytes of a table of counts of which there should be only one
_SAMPLE_STEP = 2**10  # every so many values of a run are in the sample by which runs are divided

# Reads a run, (2, n): n distinct values in ascending order, and how often each occurs.
_StoredRun = Callable[[], Tensor]


def count_pairs(tokens: Tensor | TokenShards, vocab_size: int, device: torch.device) -> Tensor:
    """``functional.count_bigrams`` on ``device`` of tokens, (N), that may lie elsewhere; of shards the sum of theirs.

    No pair whose first token is the ``eot`` of the shards is counted: it would join two documents.

    Raises:
        IndexError: A token is out of range. On a GPU that may be an assertion on the device.
    """
    if 8 * vocab_size**2 > _LARGE_TABLE or vocab_size**2 * len(shards_of(tokens)) > len(tokens):
        return _count_in_place(tokens, vocab_size, device)
    counts = torch.zeros((vocab_size, vocab_size), dtype=torch.int64, device=device)
    try:
        for chunk in _overlapping(tokens, _COUNTED_AT_ONCE // tokens.dtype.itemsize):
            counts += functional.count_bigrams(chunk.to(device), vocab_size)
    except IndexError:
        check_range(tokens, vocab_size)  # its message has the position among all tokens
        raise
    eot = getattr(tokens, "eot", None)
    if eot is not None and eot < vocab_size:
        counts[eot] = 0
    return counts


def _count_in_place(tokens: Tensor | TokenShards, vocab_size: int, device: torch.device) -> Tensor:
    check_range(tokens, vocab_size)
    counts = torch.zeros(vocab_size**2, dtype=torch.int64, device=device)
    for last, following in _pairs(tokens, device):
        entries = last * vocab_size + following
        counts.scatter_add_(0, entries, torch.ones_like(entries))
    return counts.view(vocab_size, vocab_size)


def loss_of_tokens(weight: Tensor, tokens: Tensor | TokenShards) -> float:
    """The mean cross-entropy of ``tokens``, (N), under the logits ``weight``, (V, V). NaN where there is no pair.

    One logsumexp for each row that occurs, in float64 for a float64 table and else in float32; all sums are in float64.

    Raises:
        IndexError: A token is out of range.
    """
    if num_pairs(tokens) == 0:
        return float("nan")
    vocab_size, device = len(weight), weight.device
    check_range(tokens, vocab_size)
    occurs = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    for last, _following in _pairs(tokens, device):
        occurs.index_fill_(0, last, True)
    # The logsumexp of a row in two parts: where logits are large, their sum would lose the digits of the second.
    largest = torch.empty(vocab_size, dtype=torch.float64, device=device)
    rest = torch.empty_like(largest)
    for rows in occurs.nonzero().squeeze(1).split(_rows_at_once(vocab_size)):
        logits = weight.index_select(0, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest[rows] = logits.amax(dim=1).double()
        rest[rows] = -logits.log_softmax(dim=1).amax(dim=1).double()
    total = sum(
        _sum(largest[last] - weight[last, following] + rest[last]) for last, following in _pairs(tokens, device)
    )
    return total / num_pairs(tokens)


def loss_of_counts(weight: Tensor, counts: Tensor) -> float:
    """The mean cross-entropy, in float64, of pairs with these counts, (V, V), under the logits ``weight``, (V, V)."""
    total = 0.0
    for logits, pair_counts in zip(row_blocks(weight), row_blocks(counts), strict=True):
        losses = -logits.double().log_softmax(dim=1)
        # Pairs that never occur may have probability 0.
        total += _sum(losses.mul_(pair_counts).masked_fill_(pair_counts == 0, 0))
    return _mean(total, counts)


def optimal_loss(tokens: Tensor | TokenShards) -> float:
    """The lowest mean cross-entropy, in nats, that a bigram table can have on ``tokens``, (N), which are any integers.

    It is the conditional entropy H(next | last) of the pairs: the loss of W = log(counts) in closed form. NaN where
    there is no pair. Of shards only the pairs within each count.

    Where no table of counts pays off, the distinct pairs take 8 bytes of memory each (16 if the tokens span more than
    16 bits), and half as much again while they are counted.

    Raises:
        RuntimeError: ``tokens`` is not 1-D, or of another dtype than uint8, uint16, uint32, int32 or
            int64.
    """
    check_tokens(tokens)
    if num_pairs(tokens) == 0:
        return float("nan")
    smallest, largest = token_range(tokens)
    if smallest >= 0 and are_worth_counting(tokens, largest + 1):
        return optimal_loss_of_counts(count_pairs(tokens, largest + 1, tokens.device))
    last_runs = _occurrences(last for last, _following in _pairs(tokens, tokens.device))
    of_last = _sum_n_log_n(load()[1] for load in last_runs)
    if largest - smallest < 2**32:
        rank, num_ranks = partial(torch.sub, other=smallest), largest - smallest + 1
    else:
        never_last = [shard[-1:].long() for shard in shards_of(tokens)]
        if getattr(tokens, "eot", None) is not None:
            never_last.append(torch.tensor([tokens.eot], device=tokens.device))  # type: ignore[union-attr]
        values = torch.cat([load()[0] for load in last_runs] + never_last).unique()
        rank, num_ranks = partial(torch.searchsorted, values), len(values)
    del last_runs
    pair_runs = _occurrences(_numbered_pairs(tokens, rank, num_ranks))
    return (of_last - _sum_n_log_n(load()[1] for load in pair_runs)) / num_pairs(tokens)


def optimal_loss_of_counts(counts: Tensor) -> float:
    """The same from pair counts, (V, V). NaN for no pairs."""
    of_last = _sum_n_log_n(counts.sum(dim=1).split(_CHUNK))
    return _mean(of_last - _sum_n_log_n(row_blocks(counts)), counts)


def row_blocks(table: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows of a table, (V, V), small enough to compute with in float64."""
    blocks: tuple[Tensor, ...] = table.split(_rows_at_once(table.size(1)))
    return blocks


def _rows_at_once(row_size: int) -> int:
    return max(1, _CHUNK // max(1, row_size))


def _overlapping(tokens: Tensor | TokenShards, num_pairs: int) -> Iterator[Tensor]:
    """Views of the tokens, with as many pairs each: the last token of one is the first of the next.

    The tokens of each shard by themselves.
    """
    for shard in shards_of(tokens):
        for begin in range(0, max(1, len(shard) - 1), num_pairs):
            yield shard[begin : begin + num_pairs + 1]


def _pairs(
    tokens: Tensor | TokenShards, device: torch.device, rank: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens but the last of each shard, chunk by chunk, and the one that follows each; int64, or their ranks.

    Without those that end a document.
    """
    eot = getattr(tokens, "eot", None)
    for views in _gathered(_overlapping(tokens, _CHUNK)):
        values = torch.cat([view.to(device, tokens.dtype) for view in views]).long()
        is_pair = torch.ones_like(values[1:], dtype=torch.bool)
        sizes = torch.tensor([len(view) for view in views[:-1]], dtype=torch.int64, device=device)
        is_pair[sizes.cumsum(0) - 1] = False  # of two shards
        if eot is not None:
            is_pair &= values[:-1] != eot
        values = values if rank is None else rank(values)
        last, following = values[:-1], values[1:]
        yield (last, following) if len(views) == 1 and eot is None else (last[is_pair], following[is_pair])


def _gathered(views: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of the views, each of about a chunk of tokens: shards may be much smaller."""
    gathered: list[Tensor] = []
    size = 0
    for view in views:
        if size + len(view) > _CHUNK + 1 and gathered:
            yield gathered
            gathered, size = [], 0
        if len(view) > 0:
            gathered.append(view)
            size += len(view)
    if gathered:
        yield gathered


def _sum(values: Tensor) -> float:
    """The sum, the same for any number of threads: so few values at once are not divided among them."""
    return torch.stack([part.sum() for part in values.flatten().split(2**14)]).sum().item()


def _sum_n_log_n(blocks: Iterable[Tensor]) -> float:
    return sum(_sum(torch.special.xlogy(counts, counts.double())) for counts in blocks)


def _mean(total: float, counts: Tensor) -> float:
    """``total`` divided by the sum of the counts: NaN where both are 0."""
    return (total / counts.sum().double()).item()


def _numbered_pairs(tokens: Tensor | TokenShards, rank: Callable[[Tensor], Tensor], num_ranks: int) -> Iterator[Tensor]:
    """A number for each pair of tokens, chunk by chunk: int32 if that holds it, and how often it may occur."""
    is_short = num_ranks <= 2**16 and len(tokens) <= 2**31
    for last, following in _pairs(tokens, tokens.device, rank):
        numbers = (last - num_ranks // 2) * num_ranks + following
        yield numbers.int() if is_short else numbers


def _occurrences(parts: Iterable[Tensor]) -> list[_StoredRun]:
    """How often each value of the parts occurs, as runs that follow each other. The counts fit into their dtype.

    The runs of new parts are merged into those before as soon as they are half as large: a value is merged a few times.
    """
    runs: list[_StoredRun] = []
    merged_size = new_size = 0
    for part in parts:
        values, counts = torch.unique(part, return_counts=True)
        runs.append(_store(torch.stack([values, counts.to(values.dtype)])))
        new_size += max(len(values), _CHUNK // 16)  # lest there be many small runs
        if new_size > max(2 * _CHUNK, merged_size // 2):
            runs = _merge(runs)
            merged_size, new_size = sum(load().size(1) for load in runs), 0
    return _merge(runs) if new_size else runs


def _merge(stored: list[_StoredRun]) -> list[_StoredRun]:
    """Merges runs that overlap into runs of about _CHUNK values that follow each other; ``stored`` is emptied."""
    runs = [load() for load in stored]
    stored.clear()
    sample = torch.cat([run[0, ::_SAMPLE_STEP] for run in runs]).sort().values
    step = _CHUNK // _SAMPLE_STEP
    borders = sample[step::step].contiguous()
    groups: list[list[Tensor]] = [[] for _ in range(len(borders) + 1)]
    while runs:
        run = runs.pop()
        ends = [0, *torch.searchsorted(run[0], borders).tolist(), run.size(1)]
        for group, begin, end in zip(groups, ends[:-1], ends[1:], strict=True):
            if begin < end:
                group.append(run[:, begin:end])
    for group in groups:
        if group:
            stored.append(_store(_sum_of_runs(torch.cat(group, dim=1))))
        group.clear()  # what has been merged is freed before the rest is
    return stored


def _sum_of_runs(runs: Tensor) -> Tensor:
    """The run of values that occur more than once in ``runs``, (2, n)."""
    values, counts = runs
    distinct, positions = torch.unique(values, return_inverse=True)
    return torch.stack([distinct, torch.zeros_like(distinct).index_add_(0, positions, counts)])


def _store(run: Tensor) -> _StoredRun:
    """Copies a run to pages of its own, and returns what reads it there.

    An allocator whose many large and short-lived tensors are interspersed with what stays cannot reuse their memory.
    """
    if not run.is_cpu:
        return lambda: run
    try:
        pages = mmap.mmap(-1, run.nbytes, flags=mmap.MAP_PRIVATE)
    except OSError:  # no more of it: the run stays where it is
        return lambda: run
    torch.frombuffer(pages, dtype=run.dtype).view(2, -1).copy_(run)
    dtype = run.dtype
    return lambda: torch.frombuffer(pages, dtype=dtype).view(2, -1)
