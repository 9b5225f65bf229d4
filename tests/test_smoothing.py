"""The estimators against the formulas, on dense tables in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigramx import BigramCounts, smoothing
from bigramx.smoothing import Interpolation

V = 300


def some_counts(num_tokens: int = 2500, vocab_size: int = V, seed: int = 1) -> Tensor:
    """Of tokens distributed as words are, half of which depend on the one before; the last ones never occur."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocab_size - 3) ** 1.2
    tokens = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    tokens[1::2] = (tokens[::2] * 7 + tokens[1::2]) % (vocab_size - 4)
    counts = BigramCounts(vocab_size)
    counts.update(tokens)
    return counts.to_csr()


def table(counts: Tensor, parts: Interpolation) -> Tensor:
    """P(j | i), (V, V) float64, from the form."""
    assert {part.dtype for part in parts} == {torch.float32}
    own = torch.zeros(counts.shape, dtype=torch.float64)
    own[smoothing.entries(counts)[:2]] = parts.pair_probs.double()
    return own + parts.backoff.double()[:, None] * parts.unigram.double()


def counts_of_counts(counts: Tensor) -> list[float]:
    return [float((counts == k).sum()) for k in range(5)]


def modified_discounts(counts: Tensor) -> Tensor:
    """D(c) of each count; Chen and Goodman, equation 17."""
    _n0, n1, n2, n3, n4 = counts_of_counts(counts)
    y = n1 / (n1 + 2 * n2)
    of = torch.tensor([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], dtype=torch.float64)
    assert (of[1:] > 0).all()
    return of[counts.long().clamp(max=3)]


def single_discount(counts: Tensor) -> Tensor:
    _n0, n1, n2, _n3, _n4 = counts_of_counts(counts)
    return torch.where(counts > 0, n1 / (n1 + 2 * n2), 0.0).double()


def interpolated(counts: Tensor, discounts: Tensor, lower: Tensor) -> Tensor:
    """Counts (..., V), discounts alike, and the distribution below: that where there are no counts."""
    totals = counts.sum(-1, keepdim=True)
    made = (counts - discounts) / totals + discounts.sum(-1, keepdim=True) / totals * lower
    return torch.where(totals > 0, made, lower)


def naive_kneser_ney(counts: Tensor) -> Tensor:
    uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    continuations = (counts > 0).sum(0).double()
    unigram = interpolated(continuations, modified_discounts(continuations), uniform)
    return interpolated(counts, modified_discounts(counts), unigram)


def naive_absolute_discounting(counts: Tensor) -> Tensor:
    uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    totals = counts.sum(0)
    unigram = interpolated(totals, single_discount(totals), uniform)
    return interpolated(counts, single_discount(counts), unigram)


def naive_witten_bell(counts: Tensor) -> Tensor:
    def of(counts: Tensor, lower: Tensor) -> Tensor:
        num_seen = (counts > 0).sum(-1, keepdim=True)
        made = (counts + num_seen * lower) / (counts.sum(-1, keepdim=True) + num_seen)
        return torch.where(num_seen > 0, made, lower)

    uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    return of(counts, of(counts.sum(0), uniform))


def naive_jelinek_mercer(counts: Tensor, weight: float, uniform_weight: float) -> Tensor:
    totals = counts.sum(0)
    unigram = (1 - uniform_weight) * totals / totals.sum() + uniform_weight / len(counts)
    sums = counts.sum(1, keepdim=True)
    return torch.where(sums > 0, weight * counts / sums + (1 - weight) * unigram, unigram)


def naive_add_k(counts: Tensor, k: float) -> Tensor:
    return (counts + k) / (counts.sum(1, keepdim=True) + k * len(counts))


NAIVE: list[tuple[Callable[..., Interpolation], dict[str, Any], Callable[[Tensor], Tensor]]] = [
    (smoothing.kneser_ney, {}, naive_kneser_ney),
    (smoothing.absolute_discounting, {}, naive_absolute_discounting),
    (smoothing.witten_bell, {}, naive_witten_bell),
    (
        smoothing.jelinek_mercer,
        {"weight": 0.7, "uniform_weight": 0.1},
        lambda counts: naive_jelinek_mercer(counts, 0.7, 0.1),
    ),
    (smoothing.add_k, {}, lambda counts: naive_add_k(counts, 1)),
    (smoothing.add_k, {"smoothing": 0.01}, lambda counts: naive_add_k(counts, 0.01)),
]


@pytest.mark.parametrize(("estimator", "options", "naive"), NAIVE, ids=range(len(NAIVE)))
@pytest.mark.parametrize("entries_at_once", [2**18, 7])
def test_equals_the_formula(
    estimator: Callable[..., Interpolation],
    options: dict[str, Any],
    naive: Callable[[Tensor], Tensor],
    entries_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smoothing, "_CHUNK", entries_at_once)
    counts = some_counts()
    assert counts_of_counts(counts.values())[1:] > [0, 0, 0, 0]
    probs = table(counts, estimator(counts, **options))
    torch.testing.assert_close(probs, naive(counts.to_dense().double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(probs.sum(1), torch.ones(V, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (probs > 0).all()


def test_plain_kneser_ney() -> None:
    counts = some_counts()
    probs = table(counts, smoothing.kneser_ney(counts, discount=0.6, uniform_weight=0))
    dense = counts.to_dense().double()
    continuations = (dense > 0).sum(0).double()
    expected = interpolated(dense, torch.where(dense > 0, 0.6, 0.0).double(), continuations / continuations.sum())
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)
    assert (probs[:, -1] == 0).all()  # a token that never occurs: the caller wants it so


def test_three_discounts() -> None:
    counts = some_counts()
    probs = table(counts, smoothing.kneser_ney(counts, discount=[0.4, 1.1, 2.5], uniform_weight=1))
    dense = counts.to_dense()
    of = torch.tensor([0, 0.4, 1.1, 2.5], dtype=torch.float64)[dense.clamp(max=3)]
    expected = interpolated(dense.double(), of, torch.full((V,), 1 / V, dtype=torch.float64))
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)


ESTIMATORS = [
    *[(name, {}) for name in ("kneser-ney", "witten-bell", "absolute-discounting", "add-k")],
    ("jelinek-mercer", {"weight": 0.5}),
]


def csr(counts: Tensor) -> Tensor:
    return BigramCounts.from_csr(counts).to_csr()


# Counts whose counts of counts give no discounts: none of 1; all of 1; none at all; one row alone; huge.
DEGENERATE = {
    "no singletons": torch.full((5, 5), 7),
    "singletons alone": torch.eye(5, dtype=torch.int64),
    "none": torch.zeros(5, 5, dtype=torch.int64),
    "one pair": torch.zeros(5, 5, dtype=torch.int64).index_put_((torch.tensor(2), torch.tensor(3)), torch.tensor(1)),
    "one token": torch.tensor([[3]]),
    "many twos": torch.tensor([[1, 2, 2, 2], [2, 2, 3, 2], [4, 2, 2, 2], [0, 2, 2, 2]]),
    "large": torch.tensor([[2**50, 1], [1, 2**40]]),
}


@pytest.mark.parametrize("counts", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize(("name", "options"), ESTIMATORS)
def test_always_a_distribution(name: str, options: dict[str, Any], counts: Tensor) -> None:
    counts = csr(counts)
    parts = smoothing.ESTIMATORS[name](counts, **options)
    probs = table(counts, parts)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs), dtype=torch.float64), rtol=0, atol=1e-6)
    assert (probs > 0).all()
    assert all((part >= 0).all() for part in parts)


def test_discounts_that_cannot_be_had_are_those_of_kenlm() -> None:
    counts = csr(DEGENERATE["no singletons"])
    parts = smoothing.kneser_ney(counts)
    torch.testing.assert_close(parts.pair_probs, torch.full((25,), (7 - 1.5) / 35))
    torch.testing.assert_close(parts.backoff, torch.full((5,), 5 * 1.5 / 35))


def test_a_row_that_was_never_seen_is_the_unigram() -> None:
    counts = some_counts()
    for name, options in ESTIMATORS:
        parts = smoothing.ESTIMATORS[name](counts, **options)
        torch.testing.assert_close(table(counts, parts)[-1], parts.unigram.double(), rtol=1e-6, atol=0)


def test_add_0() -> None:
    counts = some_counts()
    probs = table(counts, smoothing.add_k(counts, smoothing=0))
    dense = counts.to_dense().double()
    is_seen = dense.sum(1) > 0
    torch.testing.assert_close(probs[is_seen], (dense / dense.sum(1, keepdim=True))[is_seen], rtol=1e-6, atol=0)
    torch.testing.assert_close(probs[~is_seen], torch.full((V, V), 1 / V, dtype=torch.float64)[~is_seen])


def mean_loss(counts: Tensor, parts: Interpolation, held_out: Tensor) -> float:
    dense = held_out.to_dense()
    return float(-(dense * table(counts, parts).log()).sum() / dense.sum())


def test_the_weight_of_jelinek_mercer_is_the_best_on_what_is_held_out() -> None:
    counts, held_out = some_counts(), some_counts(seed=2)
    fitted, *others = (
        mean_loss(counts, smoothing.jelinek_mercer(counts, held_out=held_out, weight=weight), held_out)
        for weight in (None, 0.01, *(k / 10 for k in range(1, 10)), 0.99)
    )
    assert fitted <= min(others) + 1e-7
    assert min(others) < min(others[0], others[-1]) - 0.01  # neither end is


def test_a_fitted_weight_leaves_nothing_impossible() -> None:
    counts = some_counts()
    probs = table(counts, smoothing.jelinek_mercer(counts, held_out=counts))
    assert (probs > 0).all()


def test_held_out_pairs_of_rows_without_counts() -> None:
    counts = csr(torch.tensor([[2, 1, 0], [0, 0, 0], [0, 0, 0]]))
    held_out = csr(torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]]))
    parts = smoothing.jelinek_mercer(counts, held_out=held_out)
    torch.testing.assert_close(table(counts, parts).sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kneser-ney", {"discount": -0.1}),
        ("kneser-ney", {"discount": 1.1}),
        ("kneser-ney", {"discount": float("nan")}),
        ("kneser-ney", {"discount": [0.5, 1]}),
        ("kneser-ney", {"discount": [0.5, 1, 3.1]}),
        ("kneser-ney", {"uniform_weight": 2}),
        ("absolute-discounting", {"discount": 2}),
        ("witten-bell", {"uniform_weight": -1}),
        ("jelinek-mercer", {}),
        ("jelinek-mercer", {"weight": 1.5}),
        ("jelinek-mercer", {"held_out": csr(torch.zeros(V, V, dtype=torch.int64))}),
        ("add-k", {"smoothing": -1}),
        ("add-k", {"smoothing": float("inf")}),
    ],
)
def test_what_is_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        smoothing.ESTIMATORS[name](some_counts(), **options)
