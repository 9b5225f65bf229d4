"""The smoothed model of a real vocabulary: Kneser-Ney from counts, the exact loss of tokens, and chains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparison import (
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    Target,
    assert_means_within,
    at_most,
    faster_than,
)
from bigramx import SmoothedBigramModel, functional, smoothing

SHORTER = "a tenth as many tokens"


def seconds(target: float) -> Target:
    """Our time."""
    return at_most(target, " s", lambda medians: medians[OURS])


def ns_per_further_token(num_tokens: int, target: float) -> Target:
    """Our time beyond that for a tenth as many tokens, in which most rows were met, over the number of the others."""
    return at_most(
        target, " ns per further token", lambda medians: (medians[OURS] - medians[SHORTER]) / (0.9 * num_tokens) * 1e9
    )


def counts_of_pairs(vocab_size: int, num_pairs: int) -> Tensor:
    """(V, V) torch.sparse_csr: rows of all sizes, columns over all of V, most counts small."""
    sizes = 1 / torch.arange(1, vocab_size + 1) ** 0.5
    sizes = (sizes / sizes.sum() * num_pairs).long().clamp_(1, vocab_size)
    crow = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    rows = torch.arange(vocab_size).repeat_interleave(sizes)
    of_row = torch.arange(len(rows)) - crow[rows]
    gaps = (vocab_size // sizes)[rows]
    columns = of_row * gaps + (torch.rand(len(rows)) * gaps).long()
    values = (1 / torch.rand(len(rows)).clamp_(min=1e-6)).long()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(crow, columns, values, (vocab_size, vocab_size), check_invariants=False)


def model_of(counts: Tensor) -> SmoothedBigramModel:
    """The Kneser-Ney model, of counts that need no check."""
    model = SmoothedBigramModel(counts.size(0), device="meta")
    model.crow_indices, model.col_indices = counts.crow_indices(), counts.col_indices().int()
    model.pair_probs, model.backoff, model.unigram = smoothing.kneser_ney(counts)
    return model


def estimate(config: RunConfig, num_pairs: int, vocab_size: int, targets: Sequence[Target]) -> Result:
    """Interpolated modified Kneser-Ney from counts."""
    counts = counts_of_pairs(vocab_size, num_pairs)
    comparison = Comparison(
        f"Kneser-Ney from {peers.in_powers_of_ten(num_pairs)} distinct pairs, V={vocab_size}",
        targets,
        bytes_moved=24 * counts.values().numel(),  # columns, counts twice
    )
    comparison.add(OURS, partial(smoothing.kneser_ney, counts))
    comparison.add_peer("NumPy", lambda: peers.numpy_kneser_ney(counts))
    return comparison.run(config)


def evaluate(config: RunConfig, num_tokens: int, num_pairs: int, vocab_size: int, targets: Sequence[Target]) -> Result:
    """The mean loss of all tokens: they are counted, and joined with the model's pairs."""
    model = model_of(counts_of_pairs(vocab_size, num_pairs))
    tokens = functional.interpolated_bigram_generate(torch.zeros(1, 1).long(), *model._parts(), num_tokens - 1)[0]
    comparison = Comparison(
        f"evaluate {peers.in_powers_of_ten(num_tokens)} tokens, {peers.in_powers_of_ten(num_pairs)} distinct pairs, "
        f"V={vocab_size}",
        targets,
        bytes_moved=tokens.nbytes,
    )
    comparison.add(OURS, lambda: model.evaluate(tokens))
    comparison.add_peer("NumPy", lambda: peers.numpy_smoothed_loss(model, tokens))
    comparison.add_lower_bound("BigramCounts", lambda: functional.count_bigrams(tokens, vocab_size, torch.sparse_csr))
    return comparison.run(config)


def generate(config: RunConfig, num_tokens: int, num_pairs: int, vocab_size: int, targets: Sequence[Target]) -> Result:
    """One chain, sampler "philox"."""
    model = model_of(counts_of_pairs(vocab_size, num_pairs))
    comparison = Comparison(
        f'generate {peers.in_powers_of_ten(num_tokens)} tokens, sampler "philox", '
        f"{peers.in_powers_of_ten(num_pairs)} distinct pairs, V={vocab_size}",
        targets,
        check=assert_means_within(vocab_size),
    )
    idx = torch.zeros(1, 1, dtype=torch.int64)
    chain = partial(model.generate, idx, sampler="philox")
    comparison.add(OURS, partial(chain, num_tokens))
    comparison.add_lower_bound(SHORTER, partial(chain, num_tokens // 10))
    return comparison.run(config)


CASES = [
    Case(
        estimate,
        num_pairs=3 * 10**7,
        vocab_size=50257,
        targets=[seconds(1)],
    ),
    Case(
        evaluate,
        headline="the exact loss of 10 million tokens, V=50257, 30 million distinct pairs",
        num_tokens=10**7,
        num_pairs=3 * 10**7,
        vocab_size=50257,
        targets=[seconds(0.3), faster_than("NumPy", 2)],
    ),
    Case(
        generate,
        num_tokens=10**7,
        num_pairs=3 * 10**7,
        vocab_size=50257,
        targets=[ns_per_further_token(10**7, 50)],
    ),
]
