"""Tokenizers of the library `tokenizers`, and minbpe's, as tokenizers of a model."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from bigramx import BigramLanguageModel, tokenizer, tokenizer_adapters
from bigramx.tokenizer import HFTokenizer, MinBPETokenizer
from tests.tokenizer_checks import TEXTS, WORDS, check_stream, check_tokenizer

hf: Any = pytest.importorskip("tokenizers")
ALPHABET = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [WORDS, *TEXTS, "Grüße, 日本 日本語 привет привет " * 5]


def trained(model: Any, trainer: Any, **parts: Any) -> Any:
    made = hf.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(CORPUS, trainer)
    return made


def bpe_options(size: int, **options: Any) -> Any:
    return hf.trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)


def byte_level() -> Any:
    return trained(
        hf.models.BPE(),
        bpe_options(400, initial_alphabet=ALPHABET, special_tokens=["<|endoftext|>", "<s>"]),
        pre_tokenizer=hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=hf.decoders.ByteLevel(),
    )


def byte_level_in_steps() -> Any:
    made = byte_level()
    made.decoder = hf.decoders.Sequence([hf.decoders.ByteLevel(), hf.decoders.Fuse()])
    return made


def with_added_tokens() -> Any:
    made = byte_level()
    made.add_tokens(["日本x", "Ġnot bytes é", hf.AddedToken(" right ", rstrip=True, lstrip=True)])
    made.add_special_tokens(["<|user|>"])
    made.post_processor = hf.processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    made.enable_truncation(3)
    made.enable_padding(length=50)
    return made


def like_gpt4() -> Any:
    split = hf.pre_tokenizers.Split(hf.Regex(GPT4), behavior="isolated")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(
        hf.models.BPE(),
        bpe_options(400, initial_alphabet=ALPHABET),
        normalizer=hf.normalizers.NFC(),
        pre_tokenizer=hf.pre_tokenizers.Sequence([split, byte_level]),
        decoder=hf.decoders.ByteLevel(),
    )


def like_llama() -> Any:
    made = trained(
        hf.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        bpe_options(400, special_tokens=["<unk>", "<s>", *BYTES], limit_alphabet=40),
        normalizer=hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]),
        decoder=hf.decoders.Sequence(
            [
                hf.decoders.Replace("▁", " "),
                hf.decoders.ByteFallback(),
                hf.decoders.Fuse(),
                hf.decoders.Strip(content=" ", left=1, right=0),
            ]
        ),
    )
    # The bytes are ordinary tokens to a text, as in Llama's file.
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:2]
    return hf.Tokenizer.from_str(json.dumps(content))


def metaspace() -> Any:
    return trained(
        hf.models.Unigram(),
        hf.trainers.UnigramTrainer(vocab_size=150, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"),
        pre_tokenizer=hf.pre_tokenizers.Metaspace(),
        decoder=hf.decoders.Metaspace(),
    )


def word_piece() -> Any:
    return trained(
        hf.models.WordPiece(unk_token="[UNK]"),
        hf.trainers.WordPieceTrainer(vocab_size=150, show_progress=False, special_tokens=["[UNK]", "[CLS]"]),
        normalizer=hf.normalizers.BertNormalizer(),
        pre_tokenizer=hf.pre_tokenizers.BertPreTokenizer(),
        decoder=hf.decoders.WordPiece(),
    )


def with_suffixes() -> Any:
    return trained(
        hf.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        bpe_options(200, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
        pre_tokenizer=hf.pre_tokenizers.Whitespace(),
        decoder=hf.decoders.BPEDecoder(),
    )


def words() -> Any:
    return trained(
        hf.models.WordLevel(unk_token="[UNK]"),
        hf.trainers.WordLevelTrainer(vocab_size=50, show_progress=False, special_tokens=["[UNK]"]),
        pre_tokenizer=hf.pre_tokenizers.Whitespace(),
    )


def unknown_decoder() -> Any:
    made = words()
    made.decoder = hf.decoders.CTC(pad_token="[UNK]")
    return made


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAKERS = [
    byte_level,
    byte_level_in_steps,
    with_added_tokens,
    like_gpt4,
    like_llama,
    metaspace,
    word_piece,
    with_suffixes,
    words,
    unknown_decoder,
]
LOSSLESS = [byte_level, with_added_tokens]


@cache
def adapted(make: Callable[[], Any]) -> HFTokenizer:
    made = tokenizer.adapt(make())
    assert isinstance(made, HFTokenizer)
    return made


@pytest.mark.parametrize("make", MAKERS)
def test_what_every_tokenizer_keeps(make: Callable[[], Any], tmp_path: Path) -> None:
    check_tokenizer(adapted(make), tmp_path)


@pytest.mark.parametrize("make", MAKERS)
@given(st.data())
def test_streams_equal_the_whole(make: Callable[[], Any], data: st.DataObject) -> None:
    made = adapted(make)
    tokens = data.draw(st.lists(st.integers(0, made.vocab_size - 1), max_size=20))
    check_stream(made, tokens, data.draw(st.lists(st.integers(0, 20), max_size=5)))


@pytest.mark.parametrize("make", MAKERS)
@given(text=st.text(max_size=20), ends=st.lists(st.integers(0, 30), max_size=5))
def test_streams_of_texts(make: Callable[[], Any], text: str, ends: list[int]) -> None:
    made = adapted(make)
    check_stream(made, made.encode(text).tolist(), ends)


def test_streams_of_bytes() -> None:
    """Every token a byte, in all orders that begin a character and break it off."""
    level = adapted(byte_level)
    of_bytes = {level._bytes_of(token): token for token in range(level.vocab_size)}
    for made, numbers in ((level, [of_bytes[bytes([byte])] for byte in range(256)]), (MinBPETokenizer([]), range(256))):
        tokens = [numbers[byte] for byte in "é日\U0001f600".encode()]
        for cut in range(len(tokens) + 1):
            check_stream(made, tokens[:cut] + tokens[: cut // 2] + tokens[cut:], [*range(30)])
    made = adapted(like_llama)
    stream = tokenizer.decode_stream(made)
    following = made.encode("x").tolist()  # a space and an x
    assert [stream.step(token) for token in (2 + 0xC3, 2 + 0xA9, *following)] == ["", "", "é ", "x"]


def test_a_stream_waits_for_characters_alone() -> None:
    made = adapted(byte_level)
    stream = tokenizer.decode_stream(made)
    tokens = made.encode("the é日\U0001f600.").tolist()
    texts = [stream.step(token) for token in tokens]
    assert "".join(texts) == "the é日\U0001f600."
    assert "\ufffd" not in "".join(texts)
    assert texts[-1] == "."
    steps = tokenizer.decode_stream(adapted(byte_level_in_steps))
    assert [steps.step(token) for token in tokens] == texts
    assert stream.step(torch.tensor([tokens[:1]])) == made.decode(tokens[:1])
    with pytest.raises(IndexError, match="at position 0 is out of range"):
        stream.step(made.vocab_size)
    assert stream.step([]) == stream.finish() == ""


# ------------------------------------------------------------------------------------------------ HFTokenizer


def test_takes_files_texts_and_wrapped_tokenizers(tmp_path: Path) -> None:
    made = byte_level()
    expected = HFTokenizer(made)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    wrapped = SimpleNamespace(backend_tokenizer=made, encode=None, decode=None)
    others = [HFTokenizer(path), HFTokenizer(str(path)), HFTokenizer(made.to_str()), tokenizer.adapt(wrapped)]
    for other in [*others, tokenizer.load(path), HFTokenizer.load(path), HFTokenizer.from_json(path.read_bytes())]:
        assert other == expected
    implementation = hf.ByteLevelBPETokenizer()
    assert tokenizer.adapt(implementation).encode("").tolist() == []


def test_is_a_copy() -> None:
    made = byte_level()
    adapter = HFTokenizer(made)
    made.add_tokens(["the quick"])
    assert adapter.vocab_size == made.get_vocab_size() - 1
    assert adapter.decode(adapter.encode("the quick")) == "the quick"


def test_encodes_whole_texts_without_more_tokens() -> None:
    """As it is for a corpus; what the file says of special tokens, truncation and padding is for batches of a model."""
    made = with_added_tokens()
    assert len(made.encode(WORDS).ids) == 50
    adapter = HFTokenizer(made)
    tokens = adapter.encode(WORDS).tolist()
    assert len(tokens) > 20
    assert adapter.decode(tokens) == WORDS
    assert 1 not in tokens
    assert adapter.encode("<s>a<|user|>").tolist()[::2] == [1, adapter.vocab_size - 1]
    assert adapter.decode(adapter.encode("<s>a<|user|>")) == "<s>a<|user|>"
    assert len(made.encode(WORDS).ids) == 50  # the caller's own is as it was


@pytest.mark.parametrize("make", LOSSLESS)
@given(text=st.text(max_size=30))
def test_decodes_what_it_encodes(make: Callable[[], Any], text: str) -> None:
    assert adapted(make).decode(adapted(make).encode(text)) == text


def test_the_size_is_the_largest_token_and_one() -> None:
    """Not the number of tokens: where there are holes, a table with as many rows would lack some."""
    content = json.loads(byte_level().to_str())
    content["model"]["vocab"]["!"] = 1000
    adapter = HFTokenizer(json.dumps(content))
    assert adapter.vocab_size == 1001
    assert adapter.encode("!").tolist() == [1000]
    assert adapter.decode([999, 1000]) == "!"
    check_stream(adapter, [999, 1000, 998], [1, 2])


PIECEWISE = [byte_level, byte_level_in_steps, like_gpt4]


@pytest.mark.parametrize("make", PIECEWISE)
@settings(max_examples=150)
@given(parts=st.lists(st.sampled_from([*"aB  \n\t'é日1-.\r\u3000\x1c", "'s", "<|endoftext|>"]), max_size=60))
def test_pieces_do_not_change_the_tokens(make: Callable[[], Any], parts: list[str]) -> None:
    adapter, text = adapted(make), "".join(parts)
    whole = adapter._tokenizer.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_adapters, "_PIECE", 3)
        patch.setattr(tokenizer_adapters, "_PIECES", 2)
        assert adapter.encode(text).tolist() == whole


def test_long_texts_are_cut_where_that_is_known_to_be_right() -> None:
    for make in MAKERS:
        cuts = tokenizer_adapters._cuts(adapted(make)._pipeline)
        assert (cuts is not None) == (make in PIECEWISE)
    text = "one two\nthree " * 100_000
    cuts = tokenizer_adapters._cuts(adapted(byte_level)._pipeline)
    pieces = list(tokenizer_adapters.pieces_of(text, cuts))
    assert "".join(pieces) == text
    assert len(pieces) > 4
    assert adapted(byte_level).decode(adapted(byte_level).encode(text)) == text


@pytest.mark.parametrize("character", [chr(code) for code in range(0x21)])
def test_where_python_and_the_library_disagree_on_what_is_whitespace(character: str) -> None:
    """The four separators are whitespace to Python alone: a merge may reach over one."""
    is_whitespace = character.isspace() and character not in "\x1c\x1d\x1e\x1f"
    assert bool(tokenizer_adapters.WHITESPACE.search(f"!{character}!")) == is_whitespace


def test_tokens_are_on_the_cpu_whatever_the_default_device() -> None:
    adapter = adapted(byte_level)
    with torch.device("meta"):
        tokens = adapter.encode("one two")
    assert not tokens.is_meta
    assert adapter.decode(tokens) == "one two"


BYTE_LEVEL_VOCAB = '{"type": "BPE", "vocab": {"a": 0, "b": %s}, "merges": %s}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "5",
        '"a"',
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"model":' + "[" * 500 + "]" * 500 + "}",
        '{"model": 5}',
        '{"model": {"type": "GPT"}}',
        *(
            f'{{"version": "1.0", "model": {BYTE_LEVEL_VOCAB % model}}}'
            for model in (
                ("0", "[]"),  # a token twice
                ("-1", "[]"),
                ("1.5", "[]"),
                ("4294967296", "[]"),
                ("9" * 5000, "[]"),
                ("null", "[]"),
                ("1", '[["a", "c"]]'),
                ("1", '[["a"]]'),
                ("1", "5"),
            )
        ),
        '{"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 5}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}',
    ],
    ids=lambda content: repr(content[:60]),
)
def test_bad_files(tmp_path: Path, content: str) -> None:
    if content[:1] in ("", "{", "["):  # other texts are paths
        with pytest.raises(ValueError, match=r"."):
            HFTokenizer(content)
    path = tmp_path / "tokenizer.json"
    for text in (content, f'{{"format": "bigramx.HFTokenizer", "tokenizer": {content}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer.json: "):
            tokenizer.load(path)


def test_a_panic_of_the_library_is_a_value_error() -> None:
    """It derives from BaseException, which no caller catches."""
    content = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}'
    with pytest.raises(ValueError, match="tokenizers: "):
        HFTokenizer(content)


def test_texts_without_a_token() -> None:
    content = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}'
    with pytest.raises(ValueError, match="UNK"):
        HFTokenizer(content).encode("b")


def test_parts_in_python_cannot_be_saved() -> None:
    made = byte_level()
    made.pre_tokenizer = hf.pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(TypeError, match="cannot be saved"):
        tokenizer.adapt(made)


def test_slow_tokenizers_are_refused() -> None:
    slow = SimpleNamespace(encode=None, decode=None, convert_tokens_to_ids=None)
    with pytest.raises(TypeError, match="expected one of transformers' fast tokenizers"):
        tokenizer.adapt(slow)


def test_a_model_saves_what_the_library_made(tmp_path: Path) -> None:
    made = byte_level()
    model = BigramLanguageModel(HFTokenizer(made).vocab_size)
    model.tokenizer = made
    model.save(tmp_path / "model.safetensors")
    assert model.tokenizer is made
    assert BigramLanguageModel.load(tmp_path / "model.safetensors").tokenizer == HFTokenizer(made)


def test_a_model_draws_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bigramx.plots import plot_table

    made = adapted(words)
    model = BigramLanguageModel(made.vocab_size + 2)
    model.tokenizer = made
    assert plot_table(model).axes[0].get_xticklabels()[0].get_text() == "[UNK]"


# -------------------------------------------------------------------------------------------------- train_bpe


def test_trains(tmp_path: Path) -> None:
    text = " ".join(f"{word} {word}ing" for word in re.findall(r"\w+", WORDS)) * 3 + "<|endoftext|>Ünïcode\n" * 3
    trained = tokenizer.train_bpe(text, 300)
    assert trained.vocab_size == 300
    assert tokenizer.train_bpe(text, 300) == trained  # the same again
    assert trained.encode(tokenizer.END_OF_TEXT).tolist() == [0]
    assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode(text)) < len(text) * 0.6
    assert "<|" not in json.loads(trained._tokenizer.to_str())["model"]["vocab"]
    (tmp_path / "a.txt").write_text(text)
    for texts in (tmp_path / "a.txt", [text], iter([text]), [tmp_path / "a.txt"], ["", text]):
        assert tokenizer.train_bpe(texts, 300) == trained
    check_tokenizer(trained, tmp_path)


def test_pieces_do_not_change_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    text = WORDS * 5
    expected = tokenizer.train_bpe(text, 280)
    monkeypatch.setattr(tokenizer_adapters, "_PIECE", 5)
    assert tokenizer.train_bpe(text, 280) == expected


def test_a_size_too_small_for_the_bytes() -> None:
    with pytest.raises(ValueError, match="expected vocab_size >= 257, for the bytes and the special tokens, got 256"):
        tokenizer.train_bpe(WORDS, 256)
    assert tokenizer.train_bpe(WORDS, 256, special_tokens=()).vocab_size == 256


@pytest.mark.parametrize("size", [2**24 + 1, 2**40, 2**62, 2**64])
def test_a_size_for_which_the_library_would_abort(size: int) -> None:
    with pytest.raises(ValueError, match="expected vocab_size <= 16,777,216, got"):
        tokenizer.train_bpe(WORDS, size)


@pytest.mark.parametrize("special_tokens", [("",), ("<a>", "<a>"), "abc"])
def test_special_tokens_that_are_none(special_tokens: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="special_tokens to be distinct texts"):
        tokenizer.train_bpe(WORDS, 300, special_tokens=special_tokens)


def test_fewer_merges_than_asked() -> None:
    with pytest.warns(UserWarning, match=r"have merges for \d+ tokens, 5000 were asked for"):
        trained = tokenizer.train_bpe(WORDS, 5000)
    assert 257 < trained.vocab_size < 500
    with pytest.warns(UserWarning, match="have merges for 257 tokens"):
        assert tokenizer.train_bpe([], 300).vocab_size == 257


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.train_bpe(["a\ud800"], 300)
    with pytest.raises(FileNotFoundError):
        tokenizer.train_bpe([tmp_path / "none"], 300)
    with pytest.raises(TypeError, match="int"):
        tokenizer.train_bpe([5], 300)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="float"):
        tokenizer.train_bpe(WORDS, 300.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ minbpe


class Basic:
    """minbpe's BasicTokenizer, as far as it counts here."""

    def __init__(self, merges: list[tuple[int, int]], special_tokens: dict[str, int] | None = None) -> None:
        self.merges = {pair: 256 + k for k, pair in enumerate(merges)}
        self.pattern, self.special_tokens = "", special_tokens or {}

    def encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        while len(ids) >= 2:
            pair = min(itertools.pairwise(ids), key=lambda pair: self.merges.get(pair, float("inf")))
            if pair not in self.merges:
                break
            merged, k = [], 0
            while k < len(ids):
                is_pair = tuple(ids[k : k + 2]) == pair
                merged.append(self.merges[pair] if is_pair else ids[k])
                k += 2 if is_pair else 1
            ids = merged
        return ids

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def random_merges(seed: int, letters: str = "abé", count: int = 30) -> list[tuple[int, int]]:
    """Also different pairs of the same bytes."""
    draw = random.Random(seed)
    known, merges = sorted(set(letters.encode())), list[tuple[int, int]]()
    for _ in range(count):
        pair = (draw.choice(known), draw.choice(known))
        if pair not in merges:
            merges.append(pair)
            known.append(256 + len(merges) - 1)
    return merges


@given(seed=st.integers(0, 1000), text=st.text(st.sampled_from("abéx"), max_size=60))
def test_encodes_as_minbpe_does(seed: int, text: str) -> None:
    theirs = Basic(random_merges(seed))
    ours = tokenizer.adapt(theirs)
    assert ours.encode(text).tolist() == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_minbpe(tmp_path: Path) -> None:
    made = tokenizer.adapt(Basic(random_merges(1), {"<|endoftext|>": 300}))
    check_tokenizer(made, tmp_path)
    assert made.vocab_size == 301
    assert made.encode("ab<|endoftext|>").tolist()[-1] == 300
    assert made.decode([300, 299, 97]) == "<|endoftext|>a"  # 299 is no token
    assert repr(made) == "MinBPETokenizer(vocab_size=301)"


@given(st.data())
def test_streams_of_minbpe(data: st.DataObject) -> None:
    made = MinBPETokenizer(random_merges(2, "é日\U0001f600"), special_tokens={"<x>": 400})
    tokens = data.draw(st.lists(st.integers(0, 400), max_size=20))
    check_stream(made, tokens, data.draw(st.lists(st.integers(0, 20), max_size=5)))


def test_minbpe_cuts_words(tmp_path: Path) -> None:
    pytest.importorskip("regex")
    theirs = Basic([(97, 98), (32, 256)], {"<|a b|>": 258})
    theirs.pattern = GPT4
    made = tokenizer.adapt(theirs)
    check_tokenizer(made, tmp_path)
    assert made.encode(" abab<|a b|>ab").tolist() == [257, 256, 258, 256]
    path = tmp_path / "minbpe.model"
    path.write_text(f"minbpe v1\n{GPT4}\n1\n<|a b|> 258\n97 98\n32 256\n")
    assert tokenizer.load(path) == made
    path.write_text("minbpe v1\n(\n0\n")
    with pytest.raises(ValueError, match=r"minbpe.model: regex: "):
        tokenizer.load(path)


def test_patterns_that_are_no_unicode() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        MinBPETokenizer([], "\ud800")
    with pytest.raises(TypeError, match="text to be a str, got int"):
        MinBPETokenizer([], 5)  # type: ignore[arg-type]


def test_minbpe_without_regex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "regex", None)
    assert MinBPETokenizer([]).vocab_size == 256
    with pytest.raises(ImportError, match=r"pip install bigramx\[tiktoken\]"):
        MinBPETokenizer([], "a+")


def test_other_tokenizers_of_minbpe_are_refused() -> None:
    permuted = Basic([])
    permuted.byte_shuffle = {}  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cl100k_base"):
        tokenizer.adapt(permuted)
    other = Basic([])
    other.merges = {(97, 98): 300}
    with pytest.raises(TypeError, match="from 256 on"):
        tokenizer.adapt(other)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"merges": 5, "special_tokens": {}, "pattern": ""},
        {"merges": [], "special_tokens": [], "pattern": ""},
        {"merges": [], "special_tokens": {}, "pattern": None},
        {"merges": [], "special_tokens": {}, "pattern": "\ud800"},
        *(
            {"merges": merges, "special_tokens": {}, "pattern": ""}
            for merges in (
                [[97]], [[97, 98, 99]], [["a", "b"]], [[97, 256]], [[-1, 97]], [[97, 98], [97, 98]], [[97.0, 98]],
                [[True, 97]], [[97, 97], *([256 + k, 256 + k] for k in range(100))],
            )
        ),
        *(
            {"merges": [[97, 98]], "special_tokens": special_tokens, "pattern": ""}
            for special_tokens in (
                {"x": 256}, {"x": 97}, {"x": -1}, {"x": 2**32}, {"x": 300, "y": 300}, {"": 300}, {"x": "300"},
            )
        ),
    ],
    ids=lambda content: repr(content)[:60],
)  # fmt: skip
def test_bad_merges(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not a tokenizer|lone surrogate"):
        tokenizer.from_json(json.dumps({"format": "bigramx.MinBPETokenizer", **content}))


@pytest.mark.parametrize(
    "content",
    [
        "minbpe v2\n\n0\n",
        "minbpe v1",
        "minbpe v1\n\n",
        "minbpe v1\n\nx\n",
        "minbpe v1\n\n-1\n97 98\n",
        "minbpe v1\n\n2\n<a> 256\n",
        "minbpe v1\n\n2\n<a> 256\n<a> 257\n",
        "minbpe v1\n\n1\n256\n",
        "minbpe v1\n\n0\n97\n",
        "minbpe v1\n\n0\n97 98 99\n",
        "minbpe v1\n\n0\n97 x\n",
        "minbpe v1\n\n0\n97 999\n",
    ],
    ids=repr,
)
def test_bad_models_of_minbpe(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.model").write_text(content)
    with pytest.raises(ValueError, match=r"x.model: not a tokenizer"):
        tokenizer.load(tmp_path / "x.model")
