"""nltk.lm: the probabilities of the methods that both have, of all pairs of a small text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bigramx import BigramCounts, SmoothedBigramModel
from tests.integration import framework

lm = framework("nltk.lm")

TEXT = (
    "the cat sat on the mat and the dog sat on the log . the cat saw the dog , and the dog saw a cat on a mat . "
    "a log is a log , said the cat . the mat is the mat , said the dog ."
)
WORDS = TEXT.split()
VOCABULARY = [*sorted(set(WORDS)), "<UNK>"]  # nltk's has this one, which never occurs

# With the unigram of nltk, which has no share of the uniform distribution.
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("add-k", lambda: lm.MLE(2), {"smoothing": 0}),
    ("add-k", lambda: lm.Laplace(2), {}),
    ("add-k", lambda: lm.Lidstone(0.3, 2), {"smoothing": 0.3}),
    ("witten-bell", lambda: lm.WittenBellInterpolated(2), {"uniform_weight": 0}),
    (
        "absolute-discounting",
        lambda: lm.AbsoluteDiscountingInterpolated(2, discount=0.6),
        {"discount": 0.6, "uniform_weight": 0},
    ),
    ("kneser-ney", lambda: lm.KneserNeyInterpolated(2, discount=0.1), {"discount": 0.1, "uniform_weight": 0}),
    ("kneser-ney", lambda: lm.KneserNeyInterpolated(2, discount=0.8), {"discount": 0.8, "uniform_weight": 0}),
]


@pytest.mark.parametrize(("method", "make", "options"), CASES, ids=lambda case: case if isinstance(case, str) else None)
def test_the_same_probabilities(method: Any, make: Any, options: dict[str, Any]) -> None:
    theirs = make()
    # Its unigrams are those that follow another token, as ours are.
    theirs.fit([[*((word,) for word in WORDS[1:]), *itertools.pairwise(WORDS)]], vocabulary_text=WORDS)
    assert len(theirs.vocab) == len(VOCABULARY)
    counts = BigramCounts(len(VOCABULARY))
    counts.update(torch.tensor([VOCABULARY.index(word) for word in WORDS]))
    ours = SmoothedBigramModel.from_counts(counts, method, **options)
    seen = VOCABULARY[:-1]  # as a context: what a row without any pair is, each decides
    probs = ours(torch.arange(len(seen)))[0].exp()
    for row, last in enumerate(seen):
        expected = [theirs.score(word, [last]) for word in VOCABULARY]
        torch.testing.assert_close(probs[row].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-9)
