"""CharTokenizer: what it encodes it decodes, what it saves it loads, and what it does not know it names."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import CharTokenizer

# Any characters that a str can hold: lone surrogates and NUL too.
TEXTS = st.text(st.characters(codec=None, categories=None, exclude_characters=None), max_size=200)


@given(text=TEXTS)
def test_decodes_what_it_encodes(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text
    assert CharTokenizer.from_json(tokenizer.to_json()) == tokenizer


@given(text=TEXTS)
def test_numbers_as_the_lecture_does(text: str) -> None:
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(text).tolist() == [stoi[c] for c in text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abcXab", "unknown character 'X' at position 3: expected one of the tokenizer's 3 characters"),
        ("\U0001f600", "unknown character '\U0001f600' at position 0"),
        ("ab\n", r"unknown character '\\n' at position 2"),
        ("ab\ud800", r"unknown character '\\ud800' at position 2"),
    ],
)
def test_unknown_character(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CharTokenizer.from_text("abc").encode(text)


def test_unknown_to_an_empty_tokenizer() -> None:
    empty = CharTokenizer.from_text("")
    assert empty.vocab_size == 0
    assert empty.encode("").shape == (0,)
    for text in ("\x00", "a"):
        with pytest.raises(ValueError, match="unknown character"):
            empty.encode(text)


@pytest.mark.parametrize("tokens", [[0, 3], [-1], torch.tensor([2, 1, 5])])
def test_token_out_of_range(tokens: list[int]) -> None:
    with pytest.raises(IndexError, match=r"token (3 at position 1|-1 at position 0|5 at position 2) is out of range"):
        CharTokenizer.from_text("abc").decode(tokens)


def test_decode_takes_any_shape_and_dtype() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    assert tokenizer.decode(torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8)) == "abca"
    assert tokenizer.decode([]) == ""


def test_surrogates_that_stand_together_stay_two() -> None:
    tokenizer = CharTokenizer.from_text("\ud83d\ude00")
    assert CharTokenizer.from_json(tokenizer.to_json()).vocab_size == 2


@pytest.mark.parametrize("tokens", [[0.9, 1.7], torch.tensor([True])])
def test_tokens_are_integers(tokens: list[int]) -> None:
    with pytest.raises(TypeError, match="expected tokens to be integers, got torch"):
        CharTokenizer.from_text("abc").decode(tokens)


def test_duplicate_characters() -> None:
    with pytest.raises(ValueError, match="distinct characters, got 'b' twice"):
        CharTokenizer("abcb")


def test_saves_and_loads(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text('a "quote", \\, \n, é, 日本, \U0001f600')
    tokenizer.save(tmp_path / "tokenizer.json")
    assert CharTokenizer.load(tmp_path / "tokenizer.json") == tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "bigramx.CharTokenizer", "code_points": 5}', '"x"']
)
def test_foreign_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        CharTokenizer.load(tmp_path / "tokenizer.json")
