"""The loss on a split: exact, against the lecture's estimate from 200 batches."""

from __future__ import annotations

import bigramx
from benchmarks import peers
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, assert_means_within, faster_than
from bigramx import data, functional, reference


def evaluate(config: RunConfig, both_splits: bool) -> Result:
    """10^6 tokens: as one split, or as the two that the lecture's estimate_loss() goes through."""
    tokens = peers.text_tokens(10**6)
    splits = data.split(tokens) if both_splits else (tokens,)
    what = "both splits of 10^6 tokens" if both_splits else "one split of 10^6 tokens"
    comparison = Comparison(
        f"evaluate, exact, {what}, V=65",
        [faster_than("the lecture's estimate_loss", 200)],
        bytes_moved=tokens.nbytes,
        check=assert_means_within(0.05),
    )
    ours, eager = bigramx.BigramLanguageModel(65), reference.BigramLanguageModel(65)
    ours.load_state_dict(eager.state_dict())
    comparison.add(OURS, lambda: [ours.evaluate(split) for split in splits])
    comparison.add(
        "the lecture's estimate_loss", lambda: [peers.lecture_estimate_loss(eager, split) for split in splits]
    )
    comparison.add_lower_bound("count_bigrams", lambda: [functional.count_bigrams(split, 65) for split in splits])
    return comparison.run(config)


CASES = [Case(evaluate, both_splits=False), Case(evaluate, both_splits=True)]
