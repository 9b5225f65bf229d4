"""make statistics: what is drawn follows its exact distribution, and draws are independent of each other.

python -m tests.trust.statistics [SECONDS] [--seed SEED] [--only NAME]

Each case draws from a sampler, and holds the counts to a distribution computed in float64 (goodness_of_fit.py has the
tests). It draws until a bias is found with a probability over 0.99: half of the probability (one token, or half of the
tokens) raised by 0.1 % and the rest lowered. Of pairs of draws, and where draws are slow, it is a larger bias, which is
printed.

No false alarms: with m = 2000, and no more tests than that in a round, a p-value under 10^-4 / m (Bonferroni) makes the
case draw once more, from a fresh seed and ten times as much, and only a test that is under that bound again is a
finding. Sound samplers fall with a probability of at most m (10^-4 / m)^2 = 5 10^-12 a round; of 5 10^-11 if the tails
of the tests are three times too heavy. Seeds are fresh, and printed; --seed draws the same again. With SECONDS, rounds
go on until the time is over.

"torch" replays what torch.multinomial draws, and is held to that where it is not what the weights mean: in 16 bits
the first of tied ratios wins (of equal weights in bfloat16 the first is 0.7 % likelier than the last); cumulative sums
in float32 are rounded (of 3 * 2^22 equal weights tokens are off by a quarter or a half). So do batches and
torch.randint: a 32-bit word modulo the range.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bigramx import SmoothedBigramModel, data, functional
from bigramx.functional import Sampler
from tests.test_multinomial import DTYPES, generator_that_draws
from tests.trust import goodness_of_fit, report

MAX_TESTS = 2000  # of a round
ALPHA = 1e-4 / MAX_TESTS
SOUGHT_POWER = 0.995  # of the first try; the second, with ten times the draws, misses nothing
BIAS = 1e-3
BIAS_OF_PAIRS = 2e-3
CALL = 1 << 18  # draws
SAMPLERS: tuple[Sampler, ...] = ("torch", "philox")

Draw = Callable[[torch.Generator], Tensor]
Binning = Callable[[Tensor], Tensor]  # a number for each category, (1, C) -> their sums over coarser ones, (1, bins)


class View(Protocol):
    """What is looked at in the draws of a case, and added up call by call."""

    @property
    def num_tests(self) -> int:
        """How many p-values there are."""

    @property
    def degrees(self) -> int:
        """Of freedom, of the test that needs the most draws."""

    def observe(self, draws: Tensor) -> Tensor:
        """What is added up."""

    def num_samples(self, total: Tensor) -> int:
        """How many draws, or pairs of draws, were added up."""

    def p_values(self, total: Tensor) -> dict[str, float]:
        """By test."""


@dataclass(frozen=True)
class Counts:
    """How often each category occurs, in each of R circumstances.

    Attributes:
        name: Of what is counted.
        probs: (R, C) float64.
        index: Draws -> int64, circumstance * C + category.
        binnings: Coarser categories, for more of them than there are draws.
    """

    name: str
    probs: Tensor
    index: Callable[[Tensor], Tensor] = torch.flatten
    binnings: Mapping[str, Binning] = field(default_factory=dict)

    @property
    def num_tests(self) -> int:
        return (4 if len(self.probs) == 1 else 3) * (1 + len(self.binnings))

    @property
    def degrees(self) -> int:
        if self.binnings:
            return max(binning(self.probs).size(1) for binning in self.binnings.values()) - 1
        return int((self.probs > 0).sum()) - len(self.probs)

    def observe(self, draws: Tensor) -> Tensor:
        return torch.bincount(self.index(draws).flatten(), minlength=self.probs.numel())

    def num_samples(self, total: Tensor) -> int:
        return int(total.sum())

    def p_values(self, total: Tensor) -> dict[str, float]:
        counts = total.view(self.probs.shape)
        tables = {self.name: (counts, self.probs)}
        for name, binning in self.binnings.items():
            tables[f"{self.name}, {name}"] = (binning(counts), binning(self.probs))
        return {
            f"{table}, {test}": float(p)
            for table, (counts, probs) in tables.items()
            for test, p in goodness_of_fit.p_values(counts, probs).items()
        }


@dataclass(frozen=True)
class Correlations:
    """Between draws at distances of 1 to K along the last axis: all together (Box, Pierce), and the largest of them.

    scores: (V), of mean 0 and variance 1.
    """

    name: str
    scores: Tensor
    num_lags: int = 256
    num_tests = 2

    @property
    def degrees(self) -> int:
        return self.num_lags

    def observe(self, draws: Tensor) -> Tensor:
        scores = self.scores[draws].view(-1, draws.size(-1))
        length = scores.size(1)
        power = torch.fft.rfft(scores, 2 * length).abs().square()
        sums = torch.fft.irfft(power, 2 * length)[:, 1 : self.num_lags + 1].sum(0)
        return torch.stack((sums, len(scores) * (length - torch.arange(1, self.num_lags + 1)).double()))

    def num_samples(self, total: Tensor) -> int:
        return int(total[1, -1])

    def p_values(self, total: Tensor) -> dict[str, float]:
        squares = total[0].square() / total[1]
        one, all_lags = torch.tensor(1), torch.tensor(self.num_lags)
        largest = self.num_lags * goodness_of_fit.chi_square_tail(squares.max(), one)
        together = goodness_of_fit.chi_square_tail(squares.sum(), all_lags)
        return {f"{self.name}, Box-Pierce": float(together), f"{self.name}, largest": float(largest.clamp(max=1))}


@dataclass(frozen=True)
class Case:
    """A sampler, what is looked at, and the bias that is found, relative, of half of the probability."""

    name: str
    draw: Draw
    views: Sequence[View]
    bias: float = BIAS

    @property
    def num_tests(self) -> int:
        return sum(view.num_tests for view in self.views)


@functools.cache
def samples_needed(bias: float, degrees: int) -> int:
    """How many draws find the bias."""
    return goodness_of_fit.samples_needed(bias**2, degrees, ALPHA, SOUGHT_POWER)


def examine(case: Case, seed: int, times: float = 1) -> tuple[dict[str, float], int]:
    """Draws ``times`` as much as is needed; returns the p-values, and how many draws, or pairs, were looked at."""
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor | None] = [None for _ in case.views]
    needed = [times * samples_needed(case.bias, view.degrees) for view in case.views]
    sizes = [0 for _ in case.views]
    while any(size < least for size, least in zip(sizes, needed, strict=True)):
        draws = case.draw(generator)
        for k, view in enumerate(case.views):
            if sizes[k] < needed[k]:
                observed, total = view.observe(draws), totals[k]
                totals[k] = total = observed if total is None else total.add_(observed)
                sizes[k] = view.num_samples(total)
    p_values: dict[str, float] = {}
    for view, total in zip(case.views, totals, strict=True):
        assert total is not None
        p_values |= view.p_values(total)
    assert len(p_values) == case.num_tests
    return p_values, max(sizes)


def judge(case: Case, seed: int) -> tuple[list[str], int, float]:
    """The findings of a case, by the rule above; how much was looked at; the smallest p-value of the first try."""
    p_values, size = examine(case, seed)
    suspects = [test for test, p in p_values.items() if not p >= ALPHA]
    findings = []
    if suspects:
        again, more = examine(case, random.Random(seed).getrandbits(63), times=10)
        size += more
        findings = [
            f"{case.name}: {test}: p = {p_values[test]:.1e}, then {again[test]:.1e}"
            for test in suspects
            if not again[test] >= ALPHA
        ]
    return findings, size, min(p_values.values())


# ------------------------------------------------------------------------------------------ distributions


def peaked(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Half on one token, the rest by Zipf's law: a bias of that token is one of half of the probability."""
    tail = 1 / torch.arange(1, vocab_size, dtype=torch.float64)
    return torch.cat((torch.ones(1), tail / tail.sum())).to(dtype)


def exact(probs: Tensor) -> Tensor:
    """(V) weights -> (1, V): the distribution that they mean."""
    return (probs.double() / probs.double().sum())[None]


def equal(vocab_size: int) -> Tensor:
    """(1, V), in the memory of one number."""
    return torch.tensor([[1 / vocab_size]], dtype=torch.float64).expand(1, vocab_size)


def joint(first: Tensor, second: Tensor) -> Tensor:
    """(1, V) each -> (1, V * V): that of two independent draws."""
    return (first.T * second).view(1, -1)


def scores_of(probs: Tensor) -> Tensor:
    """(1, V) -> (V): a number for each token, of mean 0 and variance 1."""
    scores: Tensor = torch.arange(probs.size(1), dtype=torch.float64)
    scores -= scores @ probs[0]
    variance: Tensor = scores.square() @ probs[0]
    return scores * variance.rsqrt()


def pairs(vocab_size: int, axis: int, lag: int = 1, start: int = 0) -> Callable[[Tensor], Tensor]:
    """The index of pairs of draws at a distance along an axis; no draw is in two of them."""

    def index(draws: Tensor) -> Tensor:
        length = (draws.size(axis) - start) // (2 * lag) * (2 * lag)
        blocks: Tensor = draws.narrow(axis, start, length).unflatten(axis, (-1, 2, lag))
        return blocks.select(axis + 1, 0) * vocab_size + blocks.select(axis + 1, 1)

    return index


def consecutive(vocab_size: int, length: int) -> Callable[[Tensor], Tensor]:
    """The index of all runs of ``length`` tokens along the last axis, which overlap: for Markov chains."""

    def index(draws: Tensor) -> Tensor:
        runs = draws.unfold(-1, length, 1)
        code = runs[..., 0]
        for k in range(1, length):
            code = code * vocab_size + runs[..., k]
        return code

    return index


def pair_views(probs: Tensor, lags: Mapping[str, tuple[int, Sequence[int]]]) -> list[View]:
    """Of tokens that all have the distribution (1, V): pairs at lags along axes, each {"name": (axis, lags)}."""
    vocab_size = probs.size(1)
    views: list[View] = [Counts("tokens", probs)]
    for name, (axis, distances) in lags.items():
        views += [Counts(f"{name} {lag} apart", joint(probs, probs), pairs(vocab_size, axis, lag)) for lag in distances]
        views.append(Counts(f"{name} 1 apart from the second", joint(probs, probs), pairs(vocab_size, axis, 1, 1)))
    return views


def residues(*moduli: int) -> dict[str, Binning]:
    """Binnings of many tokens: their low bits and residues, and 16 parts in order."""
    return {**{f"modulo {modulus}": modulo(modulus) for modulus in moduli or (2, 3, 5, 7, 16)}, "in order": parts(16)}


def modulo(modulus: int) -> Binning:
    """By the residue."""
    return lambda values: F.pad(values, (0, -values.size(1) % modulus)).view(1, -1, modulus).sum(1)


def parts(number: int) -> Binning:
    """Neighbours, as many in each bin."""
    return lambda values: F.pad(values, (0, -values.size(1) % number)).view(1, number, -1).sum(2)


def tail(values: Tensor) -> Tensor:
    """The first token, and all others."""
    return torch.stack((values[:, 0], values[:, 1:].sum(1)), dim=1)


def by_bins(bins: Callable[[], Tensor]) -> Binning:
    """By the bin of each token, (V)."""

    def binning(values: Tensor) -> Tensor:
        where = bins()
        return values.new_zeros(1, int(where.max()) + 1).index_add_(1, where, values)

    return binning


def equal_mass(probs: Tensor, number: int) -> Tensor:
    """(V): bins of tokens in order, as likely as each other."""
    return ((probs[0].cumsum(0) - probs[0] / 2) * number).long().clamp(max=number - 1)


def weight_classes(probs: Tensor) -> Tensor:
    """(V): bins by the power of two under the probability, the largest first."""
    return (torch.frexp(probs.max()).exponent - torch.frexp(probs[0]).exponent).long()


# ------------------------------------------------------------------------------------------------- cases


def multinomial_case(
    name: str,
    probs: Tensor,
    count: int,
    views: Sequence[View],
    *,
    sampler: Sampler,
    replacement: bool = False,
    bias: float = BIAS,
    direct: bool = False,
) -> Case:
    """By the public function, or by the op itself."""

    def draw(generator: torch.Generator) -> Tensor:
        function = torch.ops.bigramx.multinomial if direct else functional.multinomial
        tokens: Tensor = function(probs, count, replacement, sampler=sampler, generator=generator)
        return tokens

    return Case(f"multinomial, {sampler}, {name}", draw, views, bias)


def rows_of(probs: Tensor, num_rows: int) -> Tensor:
    """The same distribution in each row."""
    return probs.expand(num_rows, -1).contiguous()


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def multinomial_cases() -> Iterator[Case]:
    """All samplers and dtypes, with and without replacement, first and later draws."""
    for sampler in SAMPLERS:
        for dtype in DTYPES:
            yield from multinomial_cases_of(sampler, dtype)
        yield from long_draws_without_replacement(sampler)


def multinomial_cases_of(sampler: Sampler, dtype: torch.dtype) -> Iterator[Case]:
    """Short rows."""
    direct = dtype == torch.float64
    probs = peaked(65, dtype)
    yield multinomial_case(
        f"{name_of(dtype)}, with replacement",
        probs,
        CALL,
        [Counts("tokens", exact(probs))],
        sampler=sampler,
        replacement=True,
        direct=direct,
    )
    has_ties = sampler == "torch" and dtype.itemsize == 2
    for vocab_size, bias in ((4, BIAS), (65, 3 * BIAS)) if has_ties else ((4, BIAS), (65, 3 * BIAS), (1000, 10 * BIAS)):
        probs = peaked(vocab_size, dtype)
        first = goodness_of_fit.race(probs)[None] if has_ties else exact(probs)
        rows = rows_of(probs, max(CALL // vocab_size, 1 << 10))
        name = f"{name_of(dtype)}, one of {vocab_size}"
        yield multinomial_case(name, rows, 1, [Counts("tokens", first)], sampler=sampler, bias=bias, direct=direct)
    if not has_ties:  # which of several tied ratios comes second is topk's choice
        yield all_draws_case(f"{name_of(dtype)}, all of 4", peaked(4, dtype), 4, sampler, 2 * BIAS)


def all_draws_case(name: str, probs: Tensor, length: int, sampler: Sampler, bias: float) -> Case:
    """The joint distribution of the draws without replacement: the first, those after each, and what is among them."""
    distribution = goodness_of_fit.without_replacement(exact(probs)[0], length)[None]
    view = Counts("in order", distribution, consecutive(len(probs), length))
    return multinomial_case(name, rows_of(probs, CALL // 16), length, [view], sampler=sampler, bias=bias)


def long_draws_without_replacement(sampler: Sampler) -> Iterator[Case]:
    """Two of many, half of them, and all of several blocks of weights, as uniform numbers."""
    probs = peaked(65, torch.float32)
    yield all_draws_case("two of 65", probs, 2, sampler, 10 * BIAS)
    included = goodness_of_fit.inclusion(exact(probs)[0], 32)
    views = [
        Counts(f"token {token} is among them", torch.stack((1 - included[token], included[token]))[None], has(token))
        for token in (1, 2, 10, 33, 64)
    ]
    yield multinomial_case("32 of 65", rows_of(probs, 1 << 12), 32, views, sampler=sampler, bias=10 * BIAS)
    weights = (torch.arange(300) % 7 + 1.0) / 4
    rows = rows_of(weights, 1 << 8)

    def draw(generator: torch.Generator) -> Tensor:
        samples = functional.multinomial(rows, 300, sampler=sampler, generator=generator)
        return goodness_of_fit.rosenblatt(samples, weights, generator)

    def nth(uniforms: Tensor) -> Tensor:
        return (uniforms * 8).long() + torch.arange(300) * 8

    def two(uniforms: Tensor) -> Tensor:
        return pairs(8, 1)((uniforms * 8).long())

    uniform_views = [
        Counts("draw by draw", equal(8).expand(300, 8), nth),
        Counts("all draws", equal(64), lambda uniforms: (uniforms * 64).long()),
        Counts("a draw and the next", equal(64), two),
    ]
    yield Case(f"multinomial, {sampler}, 300 of 300", draw, uniform_views, 20 * BIAS)


def has(token: int) -> Callable[[Tensor], Tensor]:
    """The index of whether a token is among the draws of a row."""
    return lambda draws: (draws == token).any(-1).long()


def independence_cases() -> Iterator[Case]:
    """Pairs of draws: of calls, seeds, rows or sequences, and positions, at the distances that the code knows of."""
    for sampler in SAMPLERS:
        yield from independence_cases_of(sampler)
    yield keys_case()


IID = torch.tensor([4.0, 2.0, 1.0, 1.0])  # the distribution of draws that are held to be independent


def draw_stream(generator: torch.Generator, sampler: Sampler, count: int = CALL) -> Tensor:
    """From one call, (count)."""
    return functional.multinomial(IID, count, True, sampler=sampler, generator=generator)


def independence_cases_of(sampler: Sampler) -> Iterator[Case]:
    """Of one sampler."""
    probs = exact(IID)
    rows, table = rows_of(IID, 1 << 10), rows_of(IID.log(), 4)
    few, many = (1, 2, 3, 4), (1, 2, 3, 4, 8, 64, 128)

    def draw_chains(generator: torch.Generator) -> Tensor:
        idx = torch.zeros((1 << 9, 1), dtype=torch.long)
        return functional.generate(idx, table, 1 << 9, sampler=sampler, generator=generator)[:, 1:]

    def draw_calls(generator: torch.Generator) -> Tensor:
        return torch.stack([draw_stream(generator, sampler, 1 << 13) for _ in range(32)])

    def draw_seeds(generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.stack([draw_stream(torch.Generator().manual_seed(seed + k), sampler) for k in range(4)])

    def draw_first_of_seeds(generator: torch.Generator) -> Tensor:
        seed, other = int(torch.randint(2**31, (), generator=generator)), torch.Generator()
        return torch.stack([draw_stream(other.manual_seed(seed + k), sampler, 4) for k in range(1 << 12)])

    views = pair_views(probs, {"rows": (0, few), "draws": (1, many)})
    yield multinomial_case(
        "rows and draws", rows, 1 << 10, views, sampler=sampler, replacement=True, bias=BIAS_OF_PAIRS
    )
    views = pair_views(probs, {"rows": (0, many)})
    yield multinomial_case(
        "rows, one draw each", rows_of(IID, CALL // 4), 1, views, sampler=sampler, bias=BIAS_OF_PAIRS
    )
    views = pair_views(probs, {"sequences": (0, few), "steps": (1, many)})
    yield Case(f"generate, {sampler}, sequences and steps", draw_chains, views, BIAS_OF_PAIRS)
    yield Case(f"multinomial, {sampler}, calls", draw_calls, pair_views(probs, {"calls": (0, few)}), BIAS_OF_PAIRS)
    yield Case(f"multinomial, {sampler}, seeds", draw_seeds, pair_views(probs, {"seeds": (0, (1, 2))}), BIAS_OF_PAIRS)
    views = pair_views(probs, {"seeds": (0, (1, 2)), "draws": (1, (1,))})
    yield Case(f"multinomial, {sampler}, first draws of seeds", draw_first_of_seeds, views, 10 * BIAS)
    yield Case(
        f"multinomial, {sampler}, lags",
        lambda generator: draw_stream(generator, sampler),
        [Correlations("draws 1 to 256 apart", scores_of(probs))],
        BIAS_OF_PAIRS,
    )
    yield Case(
        f"generate, {sampler}, lags of sequences",
        lambda generator: draw_chains(generator).T.contiguous(),
        [Correlations("sequences 1 to 64 apart", scores_of(probs), 64)],
        BIAS_OF_PAIRS,
    )


def keys_case() -> Case:
    """Philox itself under consecutive keys."""

    def draw(generator: torch.Generator) -> Tensor:
        key = int(torch.randint(2**52, (), generator=generator))
        return torch.stack([draw_stream(generator_that_draws([key + k]), "philox") for k in range(4)])

    return Case("multinomial, philox, keys", draw, pair_views(exact(IID), {"keys": (0, (1, 2))}), BIAS_OF_PAIRS)


def generate_cases() -> Iterator[Case]:
    """Chains of all kinds of rows, dtypes and filters."""
    generator = torch.Generator().manual_seed(1)
    small, wide = (torch.randn(n, n, generator=generator) * 1.5 for n in (6, 300))
    filters: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ]
    for sampler in SAMPLERS:
        for options in filters:
            bias = BIAS if not options and sampler == "philox" else 3 * BIAS
            name = ", ".join(f"{key} {value}" for key, value in options.items()) or "no filters"
            yield chain_case(name, small, sampler, options, bias)
            if sampler == "philox":
                yield smoothed_chain_case(name, options, bias)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            yield chain_case(name_of(dtype), small.to(dtype), sampler, {}, 3 * BIAS)
        yield chain_case("bfloat16, top_k 4", small.bfloat16(), sampler, {"top_k": 4}, 5 * BIAS)
        # Few draws a row, which philox prepares in blocks; then many.
        yield first_steps_case(wide, sampler, 1 << 12, 1, 10 * BIAS)
        yield first_steps_case(wide, sampler, 1 << 6, 16, 30 * BIAS)
    yield first_steps_case(wide, "philox", 1 << 14, 4, 3 * BIAS)
    yield tail_of_logits_case()


def next_tokens(weight: Tensor, sampler: Sampler, options: Mapping[str, Any]) -> Tensor:
    """(V, V): the distribution of the token that follows each."""
    if sampler == "torch" and weight.dtype.itemsize == 2 and not options:
        return torch.stack([goodness_of_fit.race(row) for row in weight.softmax(-1)])
    return goodness_of_fit.filtered(weight, **options)


def chain_case(name: str, weight: Tensor, sampler: Sampler, options: Mapping[str, Any], bias: float) -> Case:
    """A few long chains, whose tokens depend on the one before and no other."""

    def draw(generator: torch.Generator) -> Tensor:
        idx = torch.randint(len(weight), (4, 1), generator=generator)
        return functional.generate(idx, weight, CALL // 4, sampler=sampler, generator=generator, **options)

    views = chain_views(next_tokens(weight, sampler, options))
    return Case(f"generate, {sampler}, {name}", draw, views, bias)


def chain_views(probs: Tensor) -> list[View]:
    """What chains whose next tokens have these probabilities, (V, V), show."""
    vocab_size = len(probs)
    return [
        Counts("next tokens", probs, consecutive(vocab_size, 2)),
        Counts("after two", probs.repeat(vocab_size, 1), consecutive(vocab_size, 3)),
    ]


def smoothed_chain_case(name: str, options: Mapping[str, Any], bias: float) -> Case:
    """The same from a smoothed model, of which about half of the tokens are drawn from the unigram."""
    counts = torch.tensor(
        [[9, 1, 2, 0, 0, 0], [0, 0, 3, 1, 0, 0], [1] * 6, [0, 4, 0, 0, 0, 0], [2, 0, 1, 0, 1, 0], [0] * 6]
    )
    model = SmoothedBigramModel.from_counts(counts).double()
    parts = model._parts()

    def draw(generator: torch.Generator) -> Tensor:
        idx = torch.randint(len(counts), (4, 1), generator=generator)
        return functional.interpolated_bigram_generate(idx, *parts, CALL // 4, generator=generator, **options)

    weight = model.to_dense().token_embedding_table.weight.detach()
    views = chain_views(next_tokens(weight, "philox", options))
    return Case(f"interpolated_bigram_generate, {name}", draw, views, bias)


def first_steps_case(weight: Tensor, sampler: Sampler, num_chains: int, num_steps: int, bias: float) -> Case:
    """Chains from one token, by torch.ops: the distribution of the last token of each."""
    step = next_tokens(weight, sampler, {})
    probs = torch.linalg.matrix_power(step, num_steps)[:1]

    def draw(generator: torch.Generator) -> Tensor:
        idx = torch.zeros((num_chains, 1), dtype=torch.long)
        tokens: Tensor = torch.ops.bigramx.generate(idx, weight, num_steps, sampler=sampler, generator=generator)
        return tokens[:, -1]

    view = Counts("last tokens", probs, binnings={"in order": by_bins(lambda: equal_mass(probs, 16))})
    return Case(f"generate, {sampler}, {num_chains} x {num_steps} of {len(weight)}", draw, [view], bias)


def tail_of_logits_case() -> Case:
    """One logit of 0 beside many of -21.6."""
    vocab_size = 2048
    table = torch.full((vocab_size, vocab_size), -21.6)
    table[:, 0] = 0

    def draw(generator: torch.Generator) -> Tensor:
        idx = torch.zeros((CALL, 1), dtype=torch.long)
        return functional.generate(idx, table, 8, sampler="philox", generator=generator)[:, 1:]

    probs = table[:1].double().softmax(-1)
    return Case("generate, philox, logits of -21.6", draw, [Counts("tokens", probs, binnings={"tail": tail})])


def large_cases() -> Iterator[Case]:
    """Many categories and tiny probabilities."""
    yield from equal_weights_cases()
    yield from uneven_weights_cases()
    yield from tiny_cases()


def equal_weights_cases() -> Iterator[Case]:
    """3 * 2^22, and 2^24, which is all that torch takes."""
    third, all_of_torch = 3 << 22, 1 << 24
    chosen: list[tuple[Sampler, torch.dtype]] = [
        ("philox", torch.float32),
        ("philox", torch.float64),
        ("torch", torch.float64),
    ]
    for sampler, dtype in chosen:
        name = f"{name_of(dtype)}, 3 * 2^22 equal weights"
        yield many_case(name, torch.ones(third, dtype=dtype), equal(third), sampler)
    sums = (torch.arange(third + 1).double() / third).float().double()
    yield many_case("float32, 3 * 2^22 equal weights, as torch rounds", torch.ones(third), sums.diff()[None], "torch")
    yield many_case("float32, 2^24 equal weights", torch.ones(all_of_torch), equal(all_of_torch), "torch")


def uneven_weights_cases() -> Iterator[Case]:
    """More than 2^24, of 30 orders of magnitude."""
    vocab_size = (1 << 24) + 1000
    weights = (torch.rand(vocab_size, generator=torch.Generator().manual_seed(1)) * 30 - 30).exp2()
    for sampler in SAMPLERS:
        for dtype in (torch.float32, torch.float64):
            name = f"{name_of(dtype)}, 2^24 + 1000 weights"
            yield many_case(name, weights.to(dtype), exact(weights), sampler, 3 * BIAS)
        yield one_of_many_case("one of 2^24 + 1000 weights", weights, sampler)


def many_case(name: str, weights: Tensor, probs: Tensor, sampler: Sampler, bias: float = BIAS) -> Case:
    """With replacement, of more tokens than there are draws."""
    binnings = residues()
    if weights.min() != weights.max():
        binnings["by weight"] = by_bins(lambda: weight_classes(probs))
        binnings["equal mass"] = by_bins(lambda: equal_mass(probs, 16))
    view = Counts("tokens", probs, binnings=binnings)
    return multinomial_case(name, weights, 16 * CALL, [view], sampler=sampler, replacement=True, bias=bias)


def one_of_many_case(name: str, weights: Tensor, sampler: Sampler) -> Case:
    """A few hundred draws, each from all weights: below and above the median."""
    bins = equal_mass(exact(weights), 2)
    probs = torch.zeros(1, 2, dtype=torch.float64).index_add_(1, bins, exact(weights))
    view = Counts("halves", probs, lambda draws: bins[draws])
    return multinomial_case(name, weights, 1, [view], sampler=sampler, bias=0.5)


def tiny_cases() -> Iterator[Case]:
    """One large weight beside many tiny ones, with replacement; two large ones, which are drawn before the others."""
    two = torch.full((1 << 10,), 1e-12).index_fill(0, torch.tensor([0, 1]), 1)
    orders = torch.tensor([[0, 0.5, 0.5, 0]], dtype=torch.float64)
    for sampler in SAMPLERS:
        for vocab_size, weight in ((1 << 24, 1e-15), (1 << 20, 1e-9), (1 << 12, 1e-12)):
            yield tail_case(vocab_size, weight, sampler)
        view = Counts("in order", orders, lambda draws: (2 * draws[:, 0] + draws[:, 1]).clamp(max=3))
        name = "two of two 1.0 beside 1022 of 1e-12"
        yield multinomial_case(name, rows_of(two, 1 << 8), 2, [view], sampler=sampler, bias=10 * BIAS)


def tail_case(vocab_size: int, weight: float, sampler: Sampler) -> Case:
    """Of one 1.0 beside many of a tiny weight."""
    weights = torch.full((vocab_size,), weight, dtype=torch.float64).index_fill(0, torch.tensor(0), 1)
    view = Counts("tokens", exact(weights), binnings={"tail": tail})
    name = f"one 1.0 beside {vocab_size - 1} of {weight}"
    return multinomial_case(name, weights, 16 * CALL, [view], sampler=sampler, replacement=True)


def get_batch_cases() -> Iterator[Case]:
    """Where batches begin."""
    for num_offsets in (2, 3, 65, 1000, 3 << 22):
        yield get_batch_case(num_offsets)


def get_batch_case(num_offsets: int) -> Case:
    """torch.randint's 32-bit words modulo the range."""
    words = torch.tensor(1 << 32)
    probs = ((words // num_offsets + (torch.arange(num_offsets) < words % num_offsets)).double() / words)[None]
    tokens = torch.arange(num_offsets + 3, dtype=torch.int32)
    function = torch.ops.bigramx.get_batch if num_offsets == 65 else data.get_batch
    count = CALL if num_offsets < CALL else 16 * CALL

    def draw(generator: torch.Generator) -> Tensor:
        idx: Tensor = function(tokens, count, 3, generator=generator)[0]
        return idx[:, 0]

    name = f"get_batch, {num_offsets} offsets"
    if num_offsets <= 3:
        return Case(name, draw, pair_views(probs, {"batch": (0, (1, 2, 3, 4))}), BIAS_OF_PAIRS)
    binnings = residues(2, 3, 16) if num_offsets >= 1000 else {}
    return Case(name, draw, [Counts("offsets", probs, binnings=binnings)])


def cases() -> Iterator[Case]:
    """Those of a round; one at a time, as some are large."""
    yield from multinomial_cases()
    yield from independence_cases()
    yield from generate_cases()
    yield from get_batch_cases()
    yield from large_cases()


def run(seconds: float | None, seed: int, only: str) -> tuple[dict[str, int], list[str]]:
    """Rounds of the cases whose name has ``only`` in it."""
    begin = time.monotonic()
    tried = {"cases": 0, "tests": 0, "samples": 0}
    findings: list[str] = []
    for number in itertools.count() if seconds is not None else range(1):
        for case in (case for case in cases() if only in case.name):
            if seconds is not None and time.monotonic() - begin > seconds:
                return tried, findings
            found, size, smallest = judge(case, random.Random(f"{seed + number} {case.name}").getrandbits(63))
            tried["cases"] += 1
            tried["tests"] += case.num_tests
            tried["samples"] += size
            findings += [f"{finding} (--seed {seed + number})" for finding in found]
            print(
                f"{case.name}: {size:,} samples find a bias of {case.bias:.1%}; {case.num_tests} tests, smallest p "
                f"{smallest:.1e}{': FOUND' if found else ''}",
                flush=True,
            )
        assert tried["tests"] <= MAX_TESTS * (number + 1)
        assert tried["cases"] > 0, f"no case has {only!r} in its name"
    return tried, findings


def main() -> None:
    """The target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, help="how long; default: each case once")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    arguments = parser.parse_args()
    print(f"make statistics: --seed {arguments.seed}", flush=True)
    report.run("make statistics", lambda: run(arguments.seconds, arguments.seed, arguments.only))


if __name__ == "__main__":
    main()
