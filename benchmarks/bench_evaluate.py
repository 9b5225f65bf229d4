"""The loss on a split: exact, against the lecture's estimate from 200 batches."""

from __future__ import annotations

from functools import partial

import bigramx
from benchmarks import peers
from benchmarks.race import OURS, Effort, Race, Result, assert_means_within, faster_than
from bigramx import data, functional, reference


def evaluate(effort: Effort, both_splits: bool) -> Result:
    """10^6 tokens: as one split, or as the two that the lecture's estimate_loss() goes through."""
    tokens = peers.text_tokens(10**6)
    splits = data.split(tokens) if both_splits else (tokens,)
    what = "both splits of 10^6 tokens" if both_splits else "one split of 10^6 tokens"
    race = Race(
        f"evaluate, exact, {what}, V=65",
        [faster_than("the lecture's estimate_loss", 200)],
        bytes_moved=tokens.nbytes,
        same=assert_means_within(0.05),
    )
    ours, eager = bigramx.BigramLanguageModel(65), reference.BigramLanguageModel(65)
    ours.load_state_dict(eager.state_dict())
    race.add(OURS, lambda: [ours.evaluate(split) for split in splits])
    race.add("the lecture's estimate_loss", lambda: [peers.lecture_estimate_loss(eager, split) for split in splits])
    race.add_floor("count_bigrams", lambda: [functional.count_bigrams(split, 65) for split in splits])
    return race.run(effort)


JOBS = [partial(evaluate, both_splits=False), partial(evaluate, both_splits=True)]
