"""Runs the Python examples of the README, each by itself. Also a script, for environments with nothing but bigramx."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

README = Path(__file__).parents[1] / "README.md"

# What the examples take for granted, in the words of the README and of the lecture.
PREAMBLE = """
import torch
import bigramx
from bigramx import BigramLanguageModel, functional

text = bigramx.data.default_text()[:20_000]
tok = bigramx.CharTokenizer.from_text(text)
encode, decode, vocab_size = tok.encode, tok.decode, tok.vocab_size
tokens = encode(text)
train, val = bigramx.data.split(tokens)
xb, yb = idx, targets = bigramx.data.get_batch(train, 32, 8)
model = BigramLanguageModel(vocab_size)
model.tokenizer = tok
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""


def examples() -> Iterator[CodeType]:
    """The examples; those with pictures only where matplotlib is installed."""
    content = README.read_text("utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```", content, re.DOTALL | re.MULTILINE):
        if "plots" in found[1] and importlib.util.find_spec("matplotlib") is None:
            continue
        lines = content.count("\n", 0, found.start(1))
        yield compile("\n" * lines + found[1], str(README), "exec")


def run() -> int:
    """Runs them in the current folder, where they may leave files; returns how many there are."""
    number = 0
    for example in examples():
        namespace: dict[str, object] = {"__name__": "__main__"}
        exec(PREAMBLE, namespace)
        exec(example, namespace)
        number += 1
    return number


if __name__ == "__main__":
    print(run(), "examples of the README ran")
