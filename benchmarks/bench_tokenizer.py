"""Text to tokens and back, against the comprehensions of the lecture's script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import lower_bounds, peers
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, faster_than
from bigramx import CharTokenizer, data

NUM_CHARACTERS = 10**6


def encode(config: RunConfig) -> Result:
    """A text to a tensor of tokens."""
    text = long_text()
    comparison = Comparison("CharTokenizer.encode, 10^6 characters", [faster_than("the lecture's comprehension", 20)])
    tokenizer = CharTokenizer.from_text(text)
    stoi = {character: token for token, character in enumerate(tokenizer.characters)}
    comparison.add(OURS, lambda: tokenizer.encode(text))
    comparison.add("the lecture's comprehension", lambda: torch.tensor([stoi[c] for c in text], dtype=torch.long))
    comparison.add_peer("NumPy", lambda: peers.numpy_encode(text))
    tokens = tokenizer.encode(text)
    comparison.add_lower_bound("copying the tokens", lambda: tokens.clone())
    return comparison.run(config)


def decode(config: RunConfig, from_list: bool) -> Result:
    """Tokens, a tensor or a list, to a text."""
    text = long_text()
    comparison = Comparison(
        f"CharTokenizer.decode, 10^6 tokens, a {'list' if from_list else 'tensor'}",
        [faster_than("the lecture's comprehension", 20)],
    )
    tokenizer = CharTokenizer.from_text(text)
    itos = dict(enumerate(tokenizer.characters))
    tokens = tokenizer.encode(text)
    numbers: list[int] = tokens.tolist()

    def comprehension(tokens: Sequence[int]) -> str:
        return "".join([itos[token] for token in tokens])

    given: Tensor | list[int] = numbers if from_list else tokens
    comparison.add(OURS, lambda: tokenizer.decode(given))
    comparison.add("the lecture's comprehension", lambda: comprehension(numbers if from_list else tokens.tolist()))
    if not from_list:
        comparison.add_lower_bound("reading the tokens", partial(lower_bounds.native().read_words, tokens))
    return comparison.run(config)


def long_text() -> str:
    """The default text, repeated."""
    text = data.default_text()
    return (text * (NUM_CHARACTERS // len(text) + 1))[:NUM_CHARACTERS]


CASES = [Case(encode), Case(decode, from_list=False), Case(decode, from_list=True)]
