"""What every tokenizer keeps, whoever made it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bigramx import BigramLanguageModel, tokenizer
from bigramx.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and THE END of it is not the end, isn't it? 12 345\tx\n\n  yes.\n"
TEXTS = [
    "",
    " ",
    "\n",
    "a",
    WORDS,
    "  two leading, two trailing  ",
    "Grüße aus Köln, 日本語のテキスト, привет, \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufffd \x00 \x7f",
    "<|endoftext|>x<|endoftext|>",
]


def check_tokenizer(made: Tokenizer, tmp_path: Path, texts: Sequence[str] = TEXTS) -> None:
    """The protocol; and tokens and texts that do not change as it is copied, saved, and saved with a model."""
    assert isinstance(made, Tokenizer)
    assert tokenizer.adapt(made) is made
    for again in copies(made, tmp_path):
        assert type(again) is type(made)
        assert again == made
        assert hash(again) == hash(made)
        assert again.vocab_size == made.vocab_size
        assert again.to_json() == made.to_json()
        for text in texts:
            tokens = made.encode(text)
            assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
            assert torch.equal(again.encode(text), tokens)
            assert tokens.numel() == 0 or 0 <= int(tokens.min()) <= int(tokens.max()) < made.vocab_size
            decoded = made.decode(tokens)
            assert again.decode(tokens.tolist()) == decoded
            for dtype in (torch.int32, torch.uint32, torch.uint64):
                assert made.decode(tokens.to(dtype)[None, :, None]) == decoded
    check_errors(made)


def copies(made: Tokenizer, tmp_path: Path) -> list[Tokenizer]:
    tokenizer_path, model_path = tmp_path / "tokenizer.json", tmp_path / "model.safetensors"
    made.save(tokenizer_path)  # type: ignore[attr-defined]
    model = BigramLanguageModel(made.vocab_size + 3)  # a padded table
    model.tokenizer = made
    model.save(model_path)
    loaded = BigramLanguageModel.load(model_path).tokenizer
    assert loaded is not None
    return [
        made,
        loaded,
        tokenizer.from_json(made.to_json()),
        tokenizer.load(tokenizer_path),
        type(made).load(tokenizer_path),  # type: ignore[attr-defined]
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
    ]


def check_errors(made: Tokenizer) -> None:
    size = made.vocab_size
    for tokens in ([0, size], (0, -1), torch.tensor([[0], [size]]), torch.tensor([0, -1]), [0, 2**70]):
        with pytest.raises(IndexError, match=r"at position 1 is out of range: expected 0 <= token < "):
            made.decode(tokens)
    wrong_tokens: list[Sequence[int] | torch.Tensor] = [[0.5], torch.tensor([True]), torch.tensor([1j])]  # type: ignore[list-item]
    for wrong in wrong_tokens:
        with pytest.raises(TypeError, match="expected tokens to be integers"):
            made.decode(wrong)
    assert made.decode([]) == made.decode(torch.empty(0)) == ""
    for text in (b"a", None, ["a"]):
        with pytest.raises(TypeError, match="expected text to be a str, got "):
            made.encode(text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'\\udc80' at position 3"):
        made.encode("日a \udc80x")
    model = BigramLanguageModel(size - 1)
    model.tokenizer = made
    with pytest.raises(ValueError, match=f"the tokenizer has {size} tokens, the table {size - 1} rows"):
        model.save("/dev/null")


def check_stream(made: Tokenizer, tokens: list[int], ends: list[int]) -> None:
    """However the tokens are split, the texts of the parts are the text of all."""
    stream = tokenizer.decode_stream(made)
    bounds = [0, *sorted(end % (len(tokens) + 1) for end in ends), len(tokens)]
    parts = [stream.step(tokens[begin:end]) for begin, end in pairwise(bounds)]
    parts.append(stream.finish())
    assert "".join(parts) == made.decode(tokens)
    assert stream.finish() == ""
