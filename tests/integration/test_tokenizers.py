"""SentencePiece, tiktoken, and the tokenizers of transformers, as tokenizers of a model."""

from __future__ import annotations

import base64
import io
import json
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bigramx import BigramLanguageModel, tokenizer
from bigramx.tokenizer import HFTokenizer, SentencePieceTokenizer, TiktokenTokenizer
from tests.integration import framework
from tests.tokenizer_checks import TEXTS, WORDS, check_stream, check_tokenizer

sentencepiece = framework("sentencepiece")
tiktoken = framework("tiktoken")
transformers: Any = framework("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

CORPUS = [*WORDS.split("\n"), "Grüße, 日本 日本語 привет привет", "the the end end of words"] * 20
OPTIONS: list[dict[str, Any]] = [
    {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "<|endoftext|>"]},
    {"model_type": "unigram", "byte_fallback": True, "remove_extra_whitespaces": False},
    {"model_type": "unigram", "add_dummy_prefix": False},
    {"model_type": "bpe", "treat_whitespace_as_suffix": True, "byte_fallback": True},
    {"model_type": "char", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
]


@cache
def processor(k: int) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=330, hard_vocab_limit=False, minloglevel=2,
        **OPTIONS[k],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@cache
def pieces(k: int) -> SentencePieceTokenizer:
    made = tokenizer.adapt(processor(k))
    assert isinstance(made, SentencePieceTokenizer)
    return made


@pytest.mark.parametrize("k", range(len(OPTIONS)))
class TestSentencePiece:
    def test_what_every_tokenizer_keeps(self, k: int, tmp_path: Path) -> None:
        check_tokenizer(pieces(k), tmp_path)
        for text in TEXTS:
            assert pieces(k).encode(text).tolist() == processor(k).encode(text)
        (tmp_path / "x.model").write_bytes(processor(k).serialized_model_proto())
        assert tokenizer.load(tmp_path / "x.model") == pieces(k)

    @given(st.data())
    def test_streams_equal_the_whole(self, k: int, data: st.DataObject) -> None:
        made = pieces(k)
        spaces = [token for token in range(made.vocab_size) if processor(k).id_to_piece(token).startswith("▁")]
        few = st.sampled_from([0, 1, 2, 3, *spaces[:4]])  # control symbols, unknown, and spaces
        tokens = data.draw(st.lists(st.integers(0, made.vocab_size - 1) | few, max_size=20))
        check_stream(made, tokens, data.draw(st.lists(st.integers(0, 20), max_size=5)))

    @given(text=st.text(max_size=20), ends=st.lists(st.integers(0, 30), max_size=5))
    def test_streams_of_texts(self, k: int, text: str, ends: list[int]) -> None:
        check_stream(pieces(k), pieces(k).encode(text).tolist(), ends)


def test_characters_of_bytes_are_streamed() -> None:
    made = pieces(0)
    stream = tokenizer.decode_stream(made)
    tokens = made.encode("\U0001f600é").tolist()
    texts = [stream.step(token) for token in tokens]
    assert "".join(texts) == "\U0001f600é"
    assert texts[-1] != ""
    assert sum(bool(text) for text in texts) >= 2


def test_symbols_that_a_text_spells_out() -> None:
    made = pieces(0)
    assert len(made.encode("<|endoftext|>")) <= 2
    assert made.decode(made.encode("a<sep>b")) == "a<sep>b"
    assert not {1, 2} & set(made.encode("<s>a</s>").tolist())


def test_models_of_sentencepiece_that_are_none(tmp_path: Path) -> None:
    model, draw = processor(0).serialized_model_proto(), random.Random(1)
    path = tmp_path / "x.model"
    contents = [b"\x0a\x00", b"\x80" * 50, model[:100], model[:-5], bytes(draw.randrange(256) for _ in range(500))]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.model: "):
            tokenizer.load(path)
        text = base64.b64encode(content).decode()
        with pytest.raises(ValueError, match="sentencepiece: "):
            tokenizer.from_json(json.dumps({"format": "bigramx.SentencePieceTokenizer", "model": text}))
    for model in (None, 5, "", "!", "é", "YQ"):
        with pytest.raises(ValueError, match=r"."):
            tokenizer.from_json(json.dumps({"format": "bigramx.SentencePieceTokenizer", "model": model}))


# ------------------------------------------------------------------------------------------------------ tiktoken

PATTERN = r"(?i:'s|'t)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RANKS = {bytes([byte]): 255 - byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"\xe6\x97": 261}
SPECIAL = {"<|endoftext|>": 300, "<|x|>": 270}


def encoding(**changed: Any) -> Any:
    parts = {"pat_str": PATTERN, "mergeable_ranks": RANKS, "special_tokens": SPECIAL, **changed}
    return tiktoken.Encoding("test", **parts)


def test_tiktoken(tmp_path: Path) -> None:
    made = tokenizer.adapt(encoding())
    assert isinstance(made, TiktokenTokenizer)
    check_tokenizer(made, tmp_path)
    assert made.vocab_size == 301
    for text in TEXTS:
        assert made.encode(text).tolist() == encoding().encode(text, allowed_special="all")
        assert made.decode(made.encode(text)) == text
    assert made.encode("the<|x|>").tolist() == [257, 270]
    assert made.decode([299, 257]) == "the"  # 299 is no token
    assert tokenizer.from_json(made.to_json())._encoding.name == "test"  # type: ignore[attr-defined]


@given(st.data())
def test_streams_of_tiktoken(data: st.DataObject) -> None:
    made = TiktokenTokenizer(encoding())
    tokens = data.draw(st.lists(st.integers(0, 300), max_size=20))
    check_stream(made, tokens, data.draw(st.lists(st.integers(0, 20), max_size=5)))


def ranks_file(ranks: dict[bytes, int]) -> str:
    return "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items())


def test_files_of_tiktoken(tmp_path: Path) -> None:
    path = tmp_path / "test.tiktoken"
    path.write_text(ranks_file(RANKS))
    made = tokenizer.load(path, pattern=PATTERN, special_tokens=SPECIAL)
    assert made.encode(WORDS).tolist() == encoding().encode(WORDS)
    with pytest.raises(ValueError, match=r"test.tiktoken: a .tiktoken file lacks the pattern"):
        tokenizer.load(path)
    with pytest.raises(ValueError, match=r"test.tiktoken: tiktoken: "):
        tokenizer.load(path, pattern="(")
    for wrong in ("IQ== 0\nIQ== 1\n", "IQ== 0\nIg== 0\n", "IQ== 0\nIg== x\n", "IQ== 0\n!! 1\n", "IQ== 0\nIg==\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"test.tiktoken: not a tokenizer"):
            tokenizer.load(path, pattern=PATTERN)


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    "changed",
    [
        {"mergeable_ranks": None},
        {"mergeable_ranks": ""},
        {"mergeable_ranks": ranks_file({**BYTES, b"ab": 255})},
        {"mergeable_ranks": ranks_file({**BYTES, b"ab": 2**32})},
        {"mergeable_ranks": ranks_file({**BYTES, b"": 256})},
        {"mergeable_ranks": ranks_file({b"a": 0})},
        {"mergeable_ranks": "IQ== " + "9" * 5000},
        {"mergeable_ranks": "\ud800 5"},
        {"pattern": 5},
        {"pattern": "("},
        {"pattern": "\ud800"},
        {"name": None},
        {"special_tokens": None},
        {"special_tokens": []},
        {"special_tokens": {"<x>": 97}},
        {"special_tokens": {"<x>": 256, "<y>": 256}},
        {"special_tokens": {"<x>": -1}},
        {"special_tokens": {"<x>": 2**32}},
        {"special_tokens": {"<x>": 1.5}},
        {"special_tokens": {"": 256}},
        {"special_tokens": {"\ud800": 256}},
    ],
    ids=lambda changed: repr(changed)[:60],
)
def test_bad_parts_of_tiktoken(changed: dict[str, Any]) -> None:
    parts = {"name": "x", "pattern": PATTERN, "mergeable_ranks": ranks_file(BYTES), "special_tokens": {}}
    tokenizer.from_json(json.dumps({"format": "bigramx.TiktokenTokenizer", **parts}))
    with pytest.raises(ValueError, match=r"."):
        tokenizer.from_json(json.dumps({"format": "bigramx.TiktokenTokenizer", **parts, **changed}))


def test_an_encoding_that_would_panic() -> None:
    with pytest.raises(ValueError, match="a rank for each of the 256 bytes"):
        tokenizer.adapt(encoding(mergeable_ranks={b"a": 0}))


# -------------------------------------------------------------------------------------------------- transformers


def fast() -> Any:
    made = tokenizer.train_bpe(WORDS * 3, 300)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<|endoftext|>")


def test_fast_tokenizers_of_transformers(tmp_path: Path) -> None:
    theirs = fast()
    theirs(WORDS, truncation=True, max_length=4)  # leaves the truncation in its backend
    made = tokenizer.adapt(theirs)
    assert isinstance(made, HFTokenizer)
    check_tokenizer(made, tmp_path)
    assert made.encode(WORDS).tolist() == theirs.encode(WORDS, add_special_tokens=False)
    theirs.save_pretrained(tmp_path / "folder")
    assert tokenizer.load(tmp_path / "folder" / "tokenizer.json") == made
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.adapt(again) == made
    model = BigramLanguageModel(made.vocab_size)
    model.tokenizer = theirs
    model.save(tmp_path / "model.safetensors")
    assert BigramLanguageModel.load(tmp_path / "model.safetensors").tokenizer == made


def test_slow_tokenizers_of_transformers() -> None:
    class Slow(transformers.PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(TypeError, match="Slow: expected one of transformers' fast tokenizers"):
        tokenizer.adapt(Slow())


# ------------------------------------------------------------------------------------------------------- extras


MADE: dict[str, Callable[[], Any]] = {
    "tokenizers": lambda: tokenizer.train_bpe(WORDS, 280),
    "sentencepiece": lambda: pieces(0),
    "tiktoken": lambda: TiktokenTokenizer(encoding()),
}


@pytest.mark.parametrize("module", MADE)
def test_a_missing_library_names_its_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MADE[module]()
    model = BigramLanguageModel(made.vocab_size)
    model.tokenizer = made
    model.save(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install bigramx\[{module}\]"):
        BigramLanguageModel.load(tmp_path / "model.safetensors")
