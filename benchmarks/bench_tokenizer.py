"""Text to tokens and back, against the comprehensions of the lecture's script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import floors, peers
from benchmarks.race import OURS, Effort, Race, Result, faster_than
from bigramx import CharTokenizer, data

NUM_CHARACTERS = 10**6


def encode(effort: Effort) -> Result:
    """A text to a tensor of tokens."""
    text = long_text()
    race = Race("CharTokenizer.encode, 10^6 characters", [faster_than("the lecture's comprehension", 20)])
    tokenizer = CharTokenizer.from_text(text)
    stoi = {character: token for token, character in enumerate(tokenizer.characters)}
    race.add(OURS, lambda: tokenizer.encode(text))
    race.add("the lecture's comprehension", lambda: torch.tensor([stoi[c] for c in text], dtype=torch.long))
    race.add_peer("NumPy", lambda: peers.numpy_encode(text))
    tokens = tokenizer.encode(text)
    race.add_floor("copying the tokens", lambda: tokens.clone())
    return race.run(effort)


def decode(effort: Effort, from_list: bool) -> Result:
    """Tokens, a tensor or a list, to a text."""
    text = long_text()
    race = Race(
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
    race.add(OURS, lambda: tokenizer.decode(given))
    race.add("the lecture's comprehension", lambda: comprehension(numbers if from_list else tokens.tolist()))
    if not from_list:
        race.add_floor("reading the tokens", lambda: floors.read(tokens))
    return race.run(effort)


def long_text() -> str:
    """The default text over and over."""
    text = data.default_text()
    return (text * (NUM_CHARACTERS // len(text) + 1))[:NUM_CHARACTERS]


JOBS = [encode, partial(decode, from_list=False), partial(decode, from_list=True)]
