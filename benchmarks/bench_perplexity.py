"""How well the models from counts predict text that they have not seen: no times, but the figure of a baseline.

The text is that of the installed Python packages, whose every tenth file is held out; the tokens are those of a BPE
that is trained on the rest.
"""

from __future__ import annotations

import math
from typing import get_args

from benchmarks.comparison import OURS, Case, Outcome, Result, RunConfig
from benchmarks.peers import package_texts
from bigramx import BigramCounts, SmoothedBigramModel
from bigramx.smoothed_model import Method


def perplexity(config: RunConfig, vocab_size: int, most: float) -> Result:
    """The perplexity of held-out text under each method."""
    result = Result(f"validation perplexity, a BPE of V={vocab_size} on the text of installed packages")
    try:
        from bigramx.tokenizer import train_bpe

        texts = package_texts(10**6 if config.quick else 32 * 10**6)
        held_out = texts[::10]
        texts = [text for n, text in enumerate(texts) if n % 10]
        tokenizer = train_bpe(texts, vocab_size)
    except ImportError as error:
        result.skipped = {OURS: str(error)}
        return result
    counts, held_out_counts = BigramCounts(vocab_size), BigramCounts(vocab_size)
    for part, of_part in ((texts, counts), (held_out, held_out_counts)):
        for text in part:
            of_part.update(tokenizer.encode(text))
    for method in get_args(Method):  # kneser-ney first, which none of the others should beat
        tuned = held_out_counts if method == "jelinek-mercer" else None
        model = SmoothedBigramModel.from_counts(counts, method, held_out=tuned)
        figure = math.exp(model.evaluate_counts(held_out_counts))
        best = result.targets[0].figure or 0.0 if result.targets else None
        result.targets.append(
            Outcome(figure, f" perplexity, {method}", "<=" if best is None else ">=", most if best is None else best)
        )
    return result


CASES = [
    Case(perplexity, headline="V=8000", vocab_size=8000, most=279),
    Case(perplexity, headline="V=32000", vocab_size=32000, most=470),
]
