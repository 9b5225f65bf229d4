"""CharTokenizer decodes what it encodes, loads what it saves, and names what it does not know."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from bigramx import BigramLanguageModel, CharTokenizer, storage, tokenizer
from tests.interrupts import call_beside, call_until_handled, call_with_handlers
from tests.tokenizer_checks import TEXTS, check_stream, check_tokenizer

# All characters that a str can hold, including lone surrogates and NUL.
CHARACTERS = st.characters(codec=None, categories=None, exclude_characters=None)
TEXTS_OF_CHARACTERS = st.text(CHARACTERS, max_size=100)  # no more characters than int8 has tokens

INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip

# The last character of each form in which a str is stored, and the first of the next.
WIDTHS = "\x7f\x80\xff\u0100\uffff\U00010000\U0010ffff"


@given(text=TEXTS_OF_CHARACTERS)
def test_decodes_what_it_encodes(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text
    assert CharTokenizer.from_json(tokenizer.to_json()) == tokenizer


@given(text=TEXTS_OF_CHARACTERS)
def test_numbers_as_the_lecture_does(text: str) -> None:
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(text).tolist() == [stoi[c] for c in text]


def test_encodes_many_characters() -> None:
    """More tokens than fit into two huge pages, in each of the three widths."""
    for text in ("abc" * 200_000, "abя" * 200_000, "aя\U0001f600" * 200_000):
        tokens = CharTokenizer.from_text(text).encode(text)
        assert torch.equal(tokens, torch.arange(3).repeat(200_000))


@pytest.fixture(scope="module")
def all_characters() -> tuple[CharTokenizer, Tensor, str]:
    """The tokenizer of all characters, all tokens in an order that is slow to encode and decode, and their text."""
    tokens = torch.randperm(sys.maxunicode + 1)
    tokenizer = CharTokenizer("".join(map(chr, range(len(tokens)))))
    return tokenizer, tokens, "".join(map(chr, tokens.tolist()))


def test_long_texts_in_chunks(all_characters: tuple[CharTokenizer, Tensor, str]) -> None:
    """Handlers and other threads run meanwhile."""
    tokenizer, tokens, text = all_characters
    long, many_tokens = 60 * text, tokens.int().repeat(60)
    encoded, size = call_until_handled(lambda size: partial(tokenizer.encode, size * long))
    assert torch.equal(encoded, tokens.repeat(60 * size))
    decoded, size = call_until_handled(lambda size: partial(tokenizer.decode, many_tokens.repeat(size)))
    assert decoded == size * long
    for call in (lambda: tokenizer.encode(long), lambda: tokenizer.decode(many_tokens)):
        assert call_beside(call, bool) > 0


def test_errors_beyond_the_first_chunk() -> None:
    tokenizer, length = CharTokenizer("ab"), 2**20 + 5
    text, tokens = "a" * length + "c", torch.zeros(length + 1, dtype=torch.int64)
    tokens[-1] = 2
    with pytest.raises(ValueError, match=f"unknown character 'c' at position {length}"):
        tokenizer.encode(text)
    for wrong in (tokens, tokens.tolist()):
        with pytest.raises(IndexError, match=f"token 2 at position {length} is out of range"):
            tokenizer.decode(wrong)
    mixed: list[Any] = [*tokens[:-1].tolist(), np.int64(1)]
    assert tokenizer.decode(mixed) == "a" * length + "b"


def test_a_long_list_in_chunks(all_characters: tuple[CharTokenizer, Tensor, str]) -> None:
    tokenizer, tokens, text = all_characters
    every = [*range(len(tokens))]
    listed = 15 * [every[token] for token in tokens.tolist()]  # far apart in memory
    decoded, size = call_until_handled(lambda size: partial(tokenizer.decode, size * listed))
    assert decoded == 15 * size * text
    listed *= size
    with pytest.raises(RuntimeError, match="tokens to keep its size"):
        call_with_handlers(lambda: tokenizer.decode(listed), listed.clear)


@pytest.mark.parametrize("before", ["", *WIDTHS])
@pytest.mark.parametrize("unknown", ["X", *WIDTHS])
@pytest.mark.parametrize("after", ["", "aa"])
def test_unknown_character_anywhere(before: str, unknown: str, after: str) -> None:
    """Next to characters of every width, which determine how the text is stored."""
    characters = "".join(sorted(set("abc" + WIDTHS) - {unknown}))
    text = before.replace(unknown, "b") + unknown + after
    message = f"unknown character {unknown!r} at position {len(before)}: expected one of"
    with pytest.raises(ValueError, match=re.escape(message)):
        CharTokenizer(characters).encode(text)


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


def test_an_empty_tokenizer_knows_no_character() -> None:
    empty = CharTokenizer.from_text("")
    assert empty.vocab_size == 0
    assert empty.encode("").shape == (0,)
    for text in ("\x00", "a"):
        with pytest.raises(ValueError, match="unknown character"):
            empty.encode(text)


@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
@pytest.mark.parametrize("wrong", [-1, 3, -(2**31), 2**31, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_token_out_of_range(make: Callable[[list[int]], Sequence[int]], wrong: int, position: int) -> None:
    tokens = [0, 1, 2, 1, 0]
    tokens[position] = wrong
    message = f"token {wrong} at position {position} is out of range: expected 0 <= token < 3"
    with pytest.raises(IndexError, match=message):
        CharTokenizer.from_text("abc").decode(make(tokens))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_extreme_tokens_are_out_of_range(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    for wrong in {limits.min, limits.max} - {0}:
        with pytest.raises(IndexError, match=f"token {wrong} at position 1 is out of range"):
            CharTokenizer.from_text("abc").decode(torch.tensor([0, wrong], dtype=dtype))


@pytest.mark.parametrize("tokens", [[2**63], [-(2**63) - 1], (2**64,), [2**200]])
def test_huge_ints_are_out_of_range(tokens: Sequence[int]) -> None:
    with pytest.raises(IndexError, match=f"token {tokens[0]} at position 0 is out of range"):
        CharTokenizer.from_text("abc").decode(tokens)


def test_an_empty_tokenizer_knows_no_token() -> None:
    empty = CharTokenizer("")
    assert empty.decode([]) == empty.decode(torch.tensor([], dtype=torch.int64)) == ""
    for tokens in ([0], torch.tensor([0])):
        with pytest.raises(IndexError, match="token 0 at position 0 is out of range: expected 0 <= token < 0"):
            empty.decode(tokens)


@given(text=TEXTS_OF_CHARACTERS, dtype=st.sampled_from(INTEGERS))
def test_decodes_every_dtype(text: str, dtype: torch.dtype) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text).to(dtype)) == text


def test_many_distinct_characters() -> None:
    """Some in every 256 code points; and ints far beyond those that CPython caches."""
    characters = "".join(map(chr, range(0, sys.maxunicode + 1, 97)))
    tokenizer = CharTokenizer(characters)
    tokens = tokenizer.encode(characters)
    assert torch.equal(tokens, torch.arange(len(characters)))
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == characters
    with pytest.raises(ValueError, match="unknown character"):
        tokenizer.encode(chr(98))


def test_decodes_any_shape_and_stride() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    tokens = torch.tensor([[0, 1], [2, 0]])
    assert tokenizer.decode(tokens) == "abca"
    assert tokenizer.decode(tokens.T) == "acba"
    assert tokenizer.decode(tokens[:, 1]) == "ba"
    assert tokenizer.decode(tokens[1:, :1].expand(1, 3)) == "ccc"
    assert tokenizer.decode(tokens[0, 1]) == "b"


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 2, 1],
        (0, 2, 1),
        range(0, 3, 1),
        [[0, 2], [1, 1]],
        [np.int64(0), np.int32(2), 1],
        [torch.tensor(0), torch.tensor(2)],
        [False, 2, True],
        np.array([0, 2, 1], dtype=np.uint16),
    ],
)
def test_decodes_what_makes_a_tensor_of_integers(tokens: Sequence[int]) -> None:
    expected = "".join("abc"[token] for token in torch.as_tensor(tokens).flatten().tolist())
    assert CharTokenizer("abc").decode(tokens) == expected


@pytest.mark.parametrize("empty", [[], (), torch.empty(0), torch.empty((0, 3), dtype=torch.int32), np.empty(0)])
def test_decodes_nothing(empty: Sequence[int]) -> None:
    assert CharTokenizer("abc").decode(empty) == ""


@given(characters=st.lists(CHARACTERS, min_size=1, unique=True), choice=st.data())
def test_decoded_text_is_stored_like_any_other(characters: list[str], choice: st.DataObject) -> None:
    """In the narrowest form that fits, whatever the other characters of the tokenizer require."""
    tokens = choice.draw(st.lists(st.integers(0, len(characters) - 1), min_size=2))
    first, *rest = (characters[token] for token in tokens)
    expected = first + "".join(rest)
    tokenizer = CharTokenizer("".join(characters))
    for text in (tokenizer.decode(tokens), tokenizer.decode(torch.tensor(tokens))):
        assert text == expected
        assert hash(text) == hash(expected)
        assert text.isascii() == expected.isascii()
        assert sys.getsizeof(text) == sys.getsizeof(expected)


@pytest.mark.parametrize("widest", WIDTHS)
@pytest.mark.parametrize("used", WIDTHS)
def test_widths_of_decoded_text(widest: str, used: str) -> None:
    tokenizer = CharTokenizer("".join(sorted({"a", widest, used})))
    expected = "".join(["a", used, "a"])
    tokens = tokenizer.encode(expected)
    for text in (tokenizer.decode(tokens), tokenizer.decode(tokens.tolist())):
        assert text == expected
        assert sys.getsizeof(text) == sys.getsizeof(expected)


def test_adjacent_surrogates_stay_two() -> None:
    tokenizer = CharTokenizer.from_text("\ud83d\ude00")
    assert CharTokenizer.from_json(tokenizer.to_json()).vocab_size == 2


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        ([0.9, 1.7], "float32"),
        ((0, 1.5), "float32"),
        ([True, False], "bool"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([1j]), "complex64"),
        (torch.tensor([1.0], dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_tokens_are_integers(tokens: Sequence[int] | Tensor, dtype: str) -> None:
    with pytest.raises(TypeError, match=f"expected tokens to be integers, got torch.{dtype}"):
        CharTokenizer.from_text("abc").decode(tokens)


@pytest.mark.parametrize(("text", "name"), [(b"ab", "bytes"), (5, "int"), (None, "NoneType"), (["a"], "list")])
def test_text_is_a_str(text: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"expected text to be a str, got {name}"):
        CharTokenizer.from_text("abc").encode(text)
    with pytest.raises(TypeError, match=f"expected characters to be a str, got {name}"):
        CharTokenizer(text)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies(copied: Callable[[CharTokenizer], CharTokenizer]) -> None:
    tokenizer = copied(CharTokenizer("bca\U0001f600"))
    assert tokenizer.characters == "bca\U0001f600"
    assert tokenizer.encode("\U0001f600ab").tolist() == [3, 2, 0]


def test_duplicate_characters() -> None:
    with pytest.raises(ValueError, match="distinct characters, got 'b' twice"):
        CharTokenizer("abcb")


def test_saves_and_loads(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text('a "quote", \\, \n, é, 日本, \U0001f600')
    tokenizer.save(tmp_path / "tokenizer.json")
    assert CharTokenizer.load(tmp_path / "tokenizer.json") == tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '"x"',
        "NaN",
        "5",
        "[" * 10**5,
        '{"a":' * 10**5,
        "9" * 5000,
        "\ufeff{}",
        "\x00",
        '{"format": "bigramx.CharTokenizer"}',
        *(
            '{"format": "bigramx.CharTokenizer", "code_points": ' + points + "}"
            for points in (
                "5",
                "null",
                '"ab"',
                "{}",
                '["a"]',
                "[[97]]",
                "[97.0]",
                "[true]",
                "[-1]",
                "[1114112]",
                "[1e999]",
                "[NaN]",
                "[" + "9" * 4000 + "]",
                "[" + "9" * 5000 + "]",
            )
        ),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_foreign_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        CharTokenizer.load(tmp_path / "tokenizer.json")


# ---------------------------------------------------------------------------------- any tokenizer, and models


class Bytes:
    """A tokenizer of somebody's own."""

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        return bytes(torch.as_tensor(tokens).flatten().tolist()).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"format": "tests.Bytes"})


class Shouting(CharTokenizer):
    """Of one's own, and read again as what it derives from."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_READERS", dict(tokenizer._READERS))
    tokenizer.register("tests.Bytes", lambda _text: Bytes())


def saved_with(made: Any, path: Path, vocab_size: int = 256) -> BigramLanguageModel:
    model = BigramLanguageModel(vocab_size)
    model.tokenizer = made
    model.save(path)
    return BigramLanguageModel.load(path)


def test_the_protocol(tmp_path: Path) -> None:
    assert isinstance(CharTokenizer("ab"), tokenizer.Tokenizer)
    assert isinstance(Bytes(), tokenizer.Tokenizer)
    assert not isinstance("ab", tokenizer.Tokenizer)
    check_tokenizer(CharTokenizer("".join(sorted(set("".join(TEXTS))))), tmp_path)


def test_the_format_of_characters() -> None:
    """That of earlier versions."""
    text = '{"format": "bigramx.CharTokenizer", "code_points": [98, 97, 128512]}'
    assert CharTokenizer("ba\U0001f600").to_json() == text
    assert tokenizer.from_json(text.encode()) == CharTokenizer("ba\U0001f600")


def test_own_tokenizers_are_used_as_they_are() -> None:
    own = Bytes()
    assert tokenizer.adapt(own) is own
    model = BigramLanguageModel(256)
    model.tokenizer = own
    assert model.tokenizer is own


def test_own_tokenizers_that_cannot_be_read_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved_with(None, path)
    before = path.read_bytes()
    wrong: list[tuple[Any, str]] = [
        (Bytes(), "a Bytes could not be loaded again .*register"),
        (object(), "expected a tokenizer: .* got object"),
        (Bytes, "expected a tokenizer: .* got type"),
        ("tokenizer.json", "expected a tokenizer: .* got str"),
        (b"", "got bytes"),
    ]
    for own, message in wrong:
        with pytest.raises(TypeError, match=message):
            saved_with(own, path)
        assert path.read_bytes() == before


@pytest.mark.usefixtures("registered")
def test_registered_tokenizers(tmp_path: Path) -> None:
    assert isinstance(saved_with(Bytes(), tmp_path / "model").tokenizer, Bytes)
    (tmp_path / "own.json").write_text(Bytes().to_json())
    assert isinstance(tokenizer.load(tmp_path / "own.json"), Bytes)

    class Other(Bytes):
        def to_json(self) -> str:
            return CharTokenizer("ab").to_json()

    with pytest.raises(TypeError, match="a Other would be loaded as a CharTokenizer"):
        saved_with(Other(), tmp_path / "model")


def test_a_derived_tokenizer_is_read_as_its_base(tmp_path: Path) -> None:
    assert saved_with(Shouting("ab"), tmp_path / "model").tokenizer == CharTokenizer("ab")


def test_padded_tables(tmp_path: Path) -> None:
    """A table may have more rows than there are tokens, as padded vocabularies do; not fewer."""
    path = tmp_path / "model.safetensors"
    assert saved_with(CharTokenizer("abc"), path, 8).tokenizer == CharTokenizer("abc")
    with pytest.raises(ValueError, match="the tokenizer has 3 tokens, the table 2 rows"):
        saved_with(CharTokenizer("abc"), path, 2)
    storage.write_tensors(
        path,
        "model",
        {"token_embedding_table.weight": torch.zeros(2, 2)},
        {"tokenizer": CharTokenizer("abc").to_json()},
    )
    with pytest.raises(ValueError, match=r"model.safetensors: the tokenizer has 3 tokens, the table 2 rows"):
        BigramLanguageModel.load(path)


def test_no_file_whose_header_would_be_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    saved_with(None, path)
    before = path.read_bytes()
    monkeypatch.setattr(storage, "_MOST_HEADER", 2000)
    saved_with(CharTokenizer("abc"), tmp_path / "short")
    for target in (path, io.BytesIO()):
        model = BigramLanguageModel(500)
        model.tokenizer = CharTokenizer("".join(map(chr, range(500))))
        with pytest.raises(ValueError, match="expected metadata of 2,000 bytes at most"):
            model.save(target)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "5",
        '{"format": 5}',
        '{"format": "x"}',
        '{"format": [1]}',
        "[" * 10**5,
        '{"format": "x", "format": "y"}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_texts_of_no_tokenizer(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer.from_json(content)
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"/file: not a tokenizer"):
        tokenizer.load(tmp_path / "file")


def test_loads_from_file_objects() -> None:
    text = CharTokenizer("abc").to_json()
    assert tokenizer.load(io.StringIO(text)) == tokenizer.load(io.BytesIO(text.encode())) == CharTokenizer("abc")


MODULES = ["tokenizers", "sentencepiece", "tiktoken"]
FILES = {
    "tokenizers": b'{"version": "1.0", "model": {}}',
    "sentencepiece": b"\x0a\x05",
    "tiktoken": b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)),
}


@pytest.mark.parametrize("module", MODULES)
def test_missing_libraries(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"this tokenizer needs {module}: pip install bigramx\[{module}\]"):
        tokenizer.load(io.BytesIO(FILES[module]), pattern=".")


# ----------------------------------------------------------------------------------------------------- streams


@given(text=TEXTS_OF_CHARACTERS, ends=st.lists(st.integers(0, 30), max_size=5))
def test_streams_of_characters(text: str, ends: list[int]) -> None:
    made = CharTokenizer.from_text(text)
    check_stream(made, made.encode(text).tolist(), ends)


@given(
    tokens=st.lists(st.sampled_from(list("aé日\U0001f600\ufffd".encode())), max_size=20),
    ends=st.lists(st.integers(0, 20)),
)
def test_streams_of_own_tokenizers(tokens: list[int], ends: list[int]) -> None:
    check_stream(Bytes(), tokens, ends)


def test_own_tokenizers_may_have_own_streams() -> None:
    class Own(Bytes):
        def decode_stream(self) -> tokenizer.DecodeStream:
            return tokenizer.decode_stream(CharTokenizer("abc"))

    assert tokenizer.decode_stream(Own()).step([0, 2]) == "ac"


def test_steps_of_a_stream() -> None:
    stream = tokenizer.decode_stream(Bytes())
    assert [stream.step(byte) for byte in "é日".encode()] == ["", "é", "", "", "日"]
    assert stream.step(torch.tensor([[0xC3]])) == ""
    assert stream.finish() == "\ufffd"
    characters = tokenizer.decode_stream(CharTokenizer("abc"))
    assert characters.step(torch.tensor([[0, 1], [2, 2]])) == "abcc"
    assert characters.step((1,)) + characters.step(()) + characters.step(range(2)) == "bab"
    with pytest.raises(IndexError, match="token 3 at position 1"):
        characters.step([0, 3])
    assert characters.step(2) == "c"
