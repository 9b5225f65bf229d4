"""Estimators of p(next | last) from pair counts, which give pairs that were never seen a probability.

All of them interpolate what a row's own counts say with a distribution of the next token alone, and so have one form:

    p(j | i) = pair_probs[i, j] + backoff[i] * unigram[j],    pair_probs[i, j] = 0 where (i, j) was not seen

which takes memory in proportion to the distinct pairs. The unigram in turn is interpolated with the uniform
distribution, so that a token that never occurs has a probability too. A row without any pair is the unigram.

The arithmetic is float64, the results are float32: the probabilities of a row sum to 1 within 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Counts that are computed with at once: what is in between stays in cache; and so few that PyTorch does not divide them
# among threads, which on a busy machine wait for each other at each of many small steps. Its index_select does not; its
# indexing and repeat_interleave do.
_CHUNK = 2**15 - 1
_CHUNK_OF_PAIRS = 2**21  # of those that a kernel seeks: memory that malloc keeps from one part to the next
_LARGEST_DISCOUNTED = 3  # counts from here on share a discount
_BISECTIONS = 60


class Interpolation(NamedTuple):
    """p(j | i) = pair_probs[i, j] + backoff[i] * unigram[j].

    Attributes:
        pair_probs: (nnz) float32, in the order of the counts.
        backoff: (V) float32.
        unigram: (V) float32.
    """

    pair_probs: Tensor
    backoff: Tensor
    unigram: Tensor


def kneser_ney(
    counts: Tensor, *, discount: float | Sequence[float] | None = None, uniform_weight: float | None = None
) -> Interpolation:
    """Interpolated modified Kneser-Ney (Chen, Goodman: "An empirical study of smoothing techniques", 1999).

    A count c of row i, whose sum is c(i), gives (c - D(c)) / c(i), and what is discounted in the row is the weight of
    the unigram. That is estimated from how many distinct tokens precede each token, in the same way: with discounts
    of its own, and the uniform distribution below.

    From n_k, how many counts are k, with Y = n_1 / (n_1 + 2 n_2): D(k) = k - (k + 1) Y n_(k + 1) / n_k for k = 1, 2,
    and D(3) for all larger counts. Where a discount cannot be had (an n_k is 0) or is not in (0, k], all three are 0.5,
    1 and 1.5, as ``lmplz --discount_fallback`` of KenLM has it.

    Args:
        counts: (V, V) torch.sparse_csr, int64, all positive.
        discount: That of the pairs, in place of the estimate: one for all counts, from 0 to 1, or three, for counts of
            1, 2, and more, each from 0 to the count. With a discount of 0 a pair that was never seen may have
            probability 0. One discount and ``uniform_weight=0`` is plain interpolated Kneser-Ney.
        uniform_weight: See ``absolute_discounting``.

    Raises:
        ValueError: An option is out of range.
    """
    of_rows = _row_statistics(counts)
    discounts = _modified_discounts(of_rows.counts_of_counts) if discount is None else _given_discounts(discount)
    continuations = torch.bincount(counts.col_indices(), minlength=counts.size(1))
    of_continuations = _modified_discounts(_counts_of_counts(continuations))
    unigram = _discounted_unigram(continuations, of_continuations, uniform_weight)
    return _discount(counts, of_rows, discounts, unigram)


def absolute_discounting(
    counts: Tensor, *, discount: float | None = None, uniform_weight: float | None = None
) -> Interpolation:
    """Interpolated absolute discounting (Ney, Essen, Kneser, 1994).

    As ``kneser_ney``, but with one discount, and the unigram is estimated from how often each token follows another.

    Args:
        counts: (V, V) torch.sparse_csr, int64, all positive.
        discount: That of the pairs, from 0 to 1. None: n_1 / (n_1 + 2 n_2), or 0.75 where no count is 1. With a
            discount of 0 a pair that was never seen has probability 0.
        uniform_weight: The weight of the uniform distribution in the unigram, from 0 to 1. None: what the method gives
            it. With 0, as in nltk.lm, a token that never occurs has probability 0.

    Raises:
        ValueError: An option is out of range.
    """
    of_rows = _row_statistics(counts)
    discounts = _single_discount(of_rows.counts_of_counts) if discount is None else _given_discounts(float(discount))
    totals = _column_sums(counts)
    unigram = _discounted_unigram(totals, _single_discount(_counts_of_counts(totals)), uniform_weight)
    return _discount(counts, of_rows, discounts, unigram)


def witten_bell(counts: Tensor, *, uniform_weight: float | None = None) -> Interpolation:
    """Interpolated Witten-Bell (Bell, Cleary, Witten: "Text compression", 1990, method C).

    The weight of the unigram in row i is T(i) / (c(i) + T(i)), where T(i) counts the distinct tokens that follow i.

    Args:
        counts: (V, V) torch.sparse_csr, int64, all positive.
        uniform_weight: See ``absolute_discounting``.

    Raises:
        ValueError: An option is out of range.
    """
    of_rows = _row_statistics(counts)
    totals = _column_sums(counts)
    num_seen = (totals > 0).sum().double()
    unigram = _mixed_unigram(totals, _ratio(num_seen, num_seen + totals.sum()), uniform_weight)
    num_distinct = counts.crow_indices().diff().double()
    denominators = of_rows.sums + num_distinct
    return _divide(counts, denominators, _ratio(num_distinct, denominators, 1.0), unigram)


def jelinek_mercer(
    counts: Tensor,
    *,
    weight: float | None = None,
    held_out: Tensor | None = None,
    uniform_weight: float | None = None,
) -> Interpolation:
    """Jelinek-Mercer: ``weight`` of each row's relative frequencies, and the rest of the unigram.

    Args:
        counts: (V, V) torch.sparse_csr, int64, all positive.
        weight: From 0 to 1; with 1 a pair that was never seen has probability 0. None: the one under which
            ``held_out`` is most likely, but for n pairs there at most n / (n + 1).
        held_out: (V, V) torch.sparse_csr, int64: the pair counts of other tokens.
        uniform_weight: See ``absolute_discounting``. None: fitted to ``held_out`` as well, or where there is none
            that of ``witten_bell``.

    Raises:
        ValueError: An option is out of range; or there is neither a weight nor a held-out pair.
    """
    if weight is None and (held_out is None or held_out.values().numel() == 0):
        raise ValueError("expected a weight, or held_out with at least one pair, to fit it to")
    _check_share("weight", weight)
    of_rows = _row_statistics(counts)
    totals = _column_sums(counts)
    if held_out is None:
        num_seen = (totals > 0).sum().double()
        share = _ratio(num_seen, num_seen + totals.sum())
    else:
        frequencies = _ratio(totals.double(), totals.sum().double())
        share = 1 - _fitted_weight(frequencies, torch.full_like(frequencies, 1 / len(totals)), _column_sums(held_out))
    unigram = _mixed_unigram(totals, share, uniform_weight)
    if weight is None:
        assert held_out is not None
        weight = _fitted_pair_weight(counts, of_rows.sums, unigram, held_out)
    backoff = torch.where(of_rows.sums > 0, 1 - weight, 1.0).double()
    return _divide(counts, of_rows.sums / weight, backoff, unigram)


def add_k(counts: Tensor, *, smoothing: float = 1.0) -> Interpolation:
    """Adds ``smoothing`` to each of the V * V counts (Laplace: 1; Lidstone: another number).

    Args:
        counts: (V, V) torch.sparse_csr, int64, all positive.
        smoothing: Finite, >= 0. With 0 a pair that was never seen has probability 0, but for rows without any pair,
            which are uniform.

    Raises:
        ValueError: ``smoothing`` is out of range.
    """
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"expected smoothing to be finite and >= 0, got {smoothing}")
    sums = _row_statistics(counts).sums
    vocab_size = counts.size(1)
    added = torch.full_like(sums, smoothing * vocab_size)
    denominators = sums + added
    uniform = torch.full_like(sums, 1 / vocab_size)
    return _divide(counts, denominators, _ratio(added, denominators, 1.0), uniform)


ESTIMATORS: dict[str, Callable[..., Interpolation]] = {
    "kneser-ney": kneser_ney,
    "witten-bell": witten_bell,
    "absolute-discounting": absolute_discounting,
    "jelinek-mercer": jelinek_mercer,
    "add-k": add_k,
}


class _RowStatistics(NamedTuple):
    """Of the rows of counts: their sums, (V) float64, how many counts are 1, 2 and more, (3, V), and n_0 to n_4."""

    sums: Tensor
    numbers: Tensor
    counts_of_counts: Tensor


def _row_statistics(counts: Tensor) -> _RowStatistics:
    crow, values = counts.crow_indices(), counts.values()
    sums = torch.zeros(counts.size(0), dtype=torch.int64, device=values.device)
    numbers = torch.zeros(_LARGEST_DISCOUNTED, len(sums), dtype=torch.int64, device=values.device)
    of_counts = _counts_of_counts(values[:0])
    for rows, entries, borders in _blocks(crow):
        chunk = values[entries]
        sums[rows] += _sums_between(chunk, borders)
        both = _sums_between((chunk == 1).long() + ((chunk == 2).long() << 32), borders)  # one pass in place of two
        ones, twos = both & 2**32 - 1, both >> 32
        numbers[:, rows] += torch.stack((ones, twos, borders.diff() - ones - twos))
        of_counts += _counts_of_counts(chunk)
    return _RowStatistics(sums.double(), numbers, of_counts)


def _blocks(crow: Tensor, size: int | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """So many entries at a time: their rows, which ones they are, and where among them those of each row end."""
    size, num_entries = _CHUNK if size is None else size, int(crow[-1])
    for begin in range(0, num_entries, size):
        end = min(begin + size, num_entries)
        first_row = int(torch.searchsorted(crow, begin, right=True)) - 1
        end_row = int(torch.searchsorted(crow, end))
        borders = crow[first_row : end_row + 1].clamp(begin, end) - begin
        yield slice(first_row, end_row), slice(begin, end), borders


def _rows_between(borders: Tensor) -> Tensor:
    """From borders 0, ..., n, the number of the row that each of n entries belongs to.

    As repeat_interleave, which divides even a few entries among threads.
    """
    ends = borders[1:]
    num_ended = torch.zeros_like(borders[:1]).expand(int(borders[-1]) + 1).clone()
    return num_ended.scatter_add_(0, ends, torch.ones_like(ends))[:-1].cumsum(0)


def row_sums(crow: Tensor, values: Tensor) -> Tensor:
    """The sum of the values of each row, (V) float64."""
    sums = torch.zeros(len(crow) - 1, dtype=torch.float64, device=values.device)
    for rows, entries, borders in _blocks(crow):
        sums[rows] += _sums_between(values[entries].double(), borders)
    return sums


def _sums_between(values: Tensor, borders: Tensor) -> Tensor:
    """The sums of the values from each border to the next."""
    cumulative = torch.cat((values.new_zeros(1), values.cumsum(0)))
    return cumulative.index_select(0, borders).diff()


def _counts_of_counts(values: Tensor) -> Tensor:
    """(5): how many of the counts are 0, 1, 2, 3 and 4."""
    return torch.bincount(values.clamp(max=5), minlength=6)[:5]


def _column_sums(counts: Tensor) -> Tensor:
    """(V) int64."""
    values = counts.values()
    sums = torch.zeros(counts.size(1), dtype=torch.int64, device=values.device)
    return sums.scatter_add_(0, counts.col_indices().long(), values)


def _modified_discounts(counts_of_counts: Tensor) -> Tensor:
    """(3) float64, of counts of 1, 2, and more."""
    n = counts_of_counts.double().cpu()
    k = torch.arange(1, 4, device="cpu")
    discounts = k - (k + 1) * (n[1] / (n[1] + 2 * n[2])) * n[k + 1] / n[k]
    is_sound = bool(((discounts > 0) & (discounts <= k)).all())  # NaN is not
    return discounts if is_sound else torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, device="cpu")


def _single_discount(counts_of_counts: Tensor) -> Tensor:
    n = counts_of_counts.double().cpu()
    return _given_discounts(float(n[1] / (n[1] + 2 * n[2])) if n[1] > 0 else 0.75)


def _given_discounts(discount: float | Sequence[float]) -> Tensor:
    values = [float(discount)] * 3 if isinstance(discount, (int, float)) else [float(value) for value in discount]
    most = [1, 1, 1] if isinstance(discount, (int, float)) else [1, 2, 3]
    if len(values) != len(most) or not all(0 <= value <= bound for value, bound in zip(values, most, strict=True)):
        raise ValueError(f"expected discount to be from 0 to 1, or three from 0 to 1, 2 and 3, got {discount}")
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _discounts_of(values: Tensor, discounts: Tensor) -> Tensor:
    """The discount of each count; 0 for counts of 0."""
    table = torch.cat((discounts.new_zeros(1), discounts)).to(values.device)
    return table.index_select(0, values.clamp(max=_LARGEST_DISCOUNTED))


def _discounted_unigram(counts: Tensor, discounts: Tensor, uniform_weight: float | None) -> Tensor:
    if uniform_weight is not None:
        return _mixed_unigram(counts, 0.0, uniform_weight)
    removed = _discounts_of(counts, discounts)
    total = counts.sum().double()
    if total == 0:
        return _mixed_unigram(counts, 0.0, None)
    return (counts - removed) / total + removed.sum() / total / len(counts)


def _mixed_unigram(counts: Tensor, share: Tensor | float, uniform_weight: float | None) -> Tensor:
    """The relative frequencies, (V) float64, with this share of the uniform distribution: 1 where there are none."""
    _check_share("uniform_weight", uniform_weight)
    share = share if uniform_weight is None else uniform_weight
    total = counts.sum().double()
    share = torch.as_tensor(share, dtype=torch.float64, device=counts.device)
    share = torch.where(total > 0, share, 1.0)
    return (1 - share) * _ratio(counts.double(), total) + share / len(counts)


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"expected {name} to be from 0 to 1, got {share}")


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float = 0.0) -> Tensor:
    """Where the denominator is positive; elsewhere the number given."""
    return torch.where(denominator > 0, numerator / denominator, otherwise)


def _discount(counts: Tensor, of_rows: _RowStatistics, discounts: Tensor, unigram: Tensor) -> Interpolation:
    removed = (of_rows.numbers * discounts[:, None].to(unigram.device)).sum(0)
    backoff = _ratio(removed, of_rows.sums, 1.0)
    return _divide(counts, of_rows.sums, backoff, unigram, discounts)


def _divide(
    counts: Tensor, denominators: Tensor, backoff: Tensor, unigram: Tensor, discounts: Tensor | None = None
) -> Interpolation:
    """The counts, less their discounts, divided by what there is for each row, (V) float64."""
    crow, values = counts.crow_indices(), counts.values()
    pair_probs = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    for rows, entries, borders in _blocks(crow):
        chunk = values[entries]
        kept = chunk.double() if discounts is None else chunk - _discounts_of(chunk, discounts)
        pair_probs[entries] = kept / denominators[rows].index_select(0, _rows_between(borders))
    return Interpolation(pair_probs, backoff.float(), unigram.float())


def _fitted_pair_weight(counts: Tensor, sums: Tensor, unigram: Tensor, held_out: Tensor) -> float:
    """The weight of a row's own frequencies under which the held-out pairs of rows that were seen are most likely."""
    rows, columns, numbers = entries(held_out)
    is_known = sums[rows] > 0
    rows, columns, numbers = rows[is_known], columns[is_known], numbers[is_known]
    frequencies = _counts_at(counts, rows, columns) / sums[rows]
    return float(_fitted_weight(frequencies, unigram[columns], numbers))


def entry_blocks(counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows, the columns and the counts, a part at a time: what is computed from them stays in cache."""
    crow, columns, values = counts.crow_indices(), counts.col_indices(), counts.values()
    for rows, part, borders in _blocks(crow, _CHUNK_OF_PAIRS):
        yield rows.start + _rows_between(borders), columns[part].long(), values[part]


def entries(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row, the column and the count of each."""
    sizes = counts.crow_indices().diff()
    rows = torch.arange(counts.size(0), device=sizes.device).repeat_interleave(sizes)
    return rows, counts.col_indices().long(), counts.values()


def _counts_at(counts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The counts, (V, V) torch.sparse_csr, of these pairs; 0 where there is none."""
    all_rows, all_columns, values = entries(counts)
    if len(values) == 0:
        return torch.zeros_like(rows)
    keys = all_rows * counts.size(1) + all_columns
    wanted = rows * counts.size(1) + columns
    places = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, values[places], 0)


def _fitted_weight(first: Tensor, second: Tensor, numbers: Tensor) -> Tensor:
    """The weight w that maximises sum(numbers * log(w first + (1 - w) second)), which is concave, by bisection."""
    difference = first - second
    most = numbers.sum().double()
    low, high = torch.zeros_like(most), most / (most + 1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        slope = (numbers * _ratio(difference, second + middle * difference)).sum()
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return high
