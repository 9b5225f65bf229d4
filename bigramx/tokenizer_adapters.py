"""Tokenizers of other libraries as those of this package; each library is imported when it is needed."""

from __future__ import annotations

import base64
import functools
import heapq
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigramx.decode_stream import ByteStream, ContextStream, DecodeStream
from bigramx.storage import read
from bigramx.tokenizer_base import (
    Serialized,
    check_text,
    from_base64,
    ids_of,
    import_library,
    library_errors,
    not_known,
    parse_object,
    text_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_TOKENS = 2**32  # the libraries' ids have 32 bits
_MOST_BYTES = 2**28  # of all tokens: merges can double their length each time


def _tokens_of(ids: list[int]) -> Tensor:
    """(N) int64 on the CPU, whatever the default device is."""
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


# ------------------------------------------------------------------------------------------------ HF tokenizers

_LETTERS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
WHITESPACE = re.compile(r"(?<=\S)[^\S\x1c-\x1f](?=\S)")  # Python alone has four separators among its \s
_PIECE = 2**18  # characters
_PIECES = 16  # encoded at once, over the library's threads
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# The words into which GPT-4, Llama 3, Qwen and GPT-4o cut a text.
_KNOWN_SPLITS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
)


class HFTokenizer(Serialized):
    """A tokenizer of the library ``tokenizers``: any tokenizer.json.

    ``encode`` adds no special tokens, as it is for corpora; those that the text spells out become tokens. ``decode``
    keeps them. Truncation and padding, which many files have set, are left out: a text is encoded whole.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, of which this takes a copy; an object that has one as its
            ``backend_tokenizer``, as those of ``AutoTokenizer`` do; the path of a tokenizer.json, or its text.

    Raises:
        ValueError: The file is no tokenizer.json; or two texts have the same token.
        TypeError: ``tokenizer`` is nothing of these, or has parts in Python, which cannot be saved.
        OSError: The file cannot be read.
        ImportError: ``tokenizers`` is not installed.
    """

    _NAME = "bigramx.HFTokenizer"

    def __init__(self, tokenizer: object) -> None:
        library = import_library("tokenizers", "tokenizers")
        text = _tokenizer_json(tokenizer)
        with library_errors("tokenizers"):
            self._tokenizer = library.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < len(ids):
            raise ValueError("not a tokenizer: two texts have the same token")
        self._vocab_size = max(ids, default=-1) + 1

    @property
    def vocab_size(self) -> int:
        """The largest token + 1, added tokens included."""
        return self._vocab_size

    @functools.cached_property
    def _pipeline(self) -> dict[str, Any]:
        """The parts of tokenizer.json beside the vocabulary."""
        pipeline: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return {name: pipeline.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens, without special tokens that the text does not spell out.

        Long texts are encoded in pieces, over the library's threads, where the tokenizer cuts texts into words as
        GPT-2, GPT-4, GPT-4o, Llama 3 or Qwen do; else whole, for which the library takes some 100 bytes a token.

        Raises:
            ValueError: The text has a lone surrogate, or something for which the tokenizer has no token.
            TypeError: ``text`` is not a str.
        """
        check_text(text)
        parts, pieces = [_tokens_of([])], pieces_of(text, _cuts(self._pipeline))
        with library_errors("tokenizers"):
            while some := [piece for _, piece in zip(range(_PIECES), pieces, strict=False)]:
                for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False):
                    parts.append(_tokens_of(encoding.ids))  # noqa: PERF401, of many batches
        return torch.cat(parts)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens, a tensor of any shape or a sequence -> text, special tokens included.

        Raises:
            IndexError: A token is out of range; names it and its position.
            TypeError: The tokens are not integers.
        """
        return self._decode(ids_of(tokens, self.vocab_size))

    def _decode(self, tokens: list[int]) -> str:
        with library_errors("tokenizers"):
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def decode_stream(self) -> DecodeStream:
        """By the kind of the decoder; of one that is unknown all text comes at the end."""
        ids = functools.partial(ids_of, vocab_size=self.vocab_size)
        decoder = self._pipeline["decoder"]
        kinds = [step["type"] for step in _steps_of(decoder)]
        if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
            bytes_of = functools.cache(self._bytes_of)
            return ByteStream(lambda tokens: b"".join(map(bytes_of, ids(tokens))))
        return ContextStream(ids, self._decode, _settled_by(decoder, self._is_byte))

    def _bytes_of(self, token: int) -> bytes:
        """What a token of a byte-level tokenizer stands for."""
        text: str = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes(map(_byte_of_character().__getitem__, text))
        except KeyError:  # an added token
            return text.encode()

    def _is_byte(self, token: int) -> bool:
        text = self._tokenizer.id_to_token(token) or ""
        return len(text) == 6 and text.startswith("<0x") and text.endswith(">")

    def to_json(self) -> str:
        """The tokenizer as one line of JSON: tokenizer.json, and its format."""
        with library_errors("tokenizers"):
            text = self._tokenizer.to_str()
        return f'{{"format": "{self._NAME}", "tokenizer": {text}}}'

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes, or a tokenizer.json.

        Raises:
            ValueError: ``text`` is something else.
            ImportError: ``tokenizers`` is not installed.
        """
        content: Any = parse_object(text)
        if "format" in content:
            content = parse_object(text, cls._NAME).get("tokenizer")
        if not isinstance(content, dict):
            raise ValueError("not a tokenizer: expected the content of a tokenizer.json")
        try:
            return cls(json.dumps(content, ensure_ascii=False))
        except RecursionError:
            raise ValueError("not a tokenizer: nested too deeply") from None

    def __repr__(self) -> str:
        return f"HFTokenizer({type(self._tokenizer.model).__name__}, vocab_size={self.vocab_size})"


def _tokenizer_json(tokenizer: Any) -> str:
    """The text of a tokenizer.json, as HFTokenizer takes it."""
    if isinstance(tokenizer, str) and tokenizer.lstrip()[:1] in ("", "{", "["):
        return _checked(tokenizer)
    if isinstance(tokenizer, (str, os.PathLike)):
        return _checked(read(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend = getattr(backend, "_tokenizer", backend)  # of tokenizers.implementations
    if not isinstance(backend, import_library("tokenizers", "tokenizers").Tokenizer):
        raise not_known(tokenizer)
    try:
        text: str = backend.to_str()
    except Exception as error:
        raise TypeError(f"a tokenizer that cannot be saved: {error}") from None
    return text


def _checked(text: str | bytes) -> str:
    """The text of a JSON object, in which no key occurs twice: the library would take the last."""
    parse_object(text)
    text = text if isinstance(text, str) else text.decode()
    check_text(text)
    return text


def _cuts(pipeline: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut without changing its tokens: before one whitespace character between two others.

    None: the words into which the tokenizer cuts a text, or the added tokens, might reach over such a place.
    """
    if any(token["rstrip"] or re.search(r"\s", token["content"]) for token in pipeline["added_tokens"]):
        return None
    words = pipeline["pre_tokenizer"] or {}
    steps = words["pretokenizers"] if words.get("type") == "Sequence" else [words]
    normalizer = pipeline["normalizer"] or {"type": "NFC"}
    if normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        return None
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return WHITESPACE if pipeline["normalizer"] is None else _LETTERS
    first = steps[0]
    is_known = (
        len(steps) == 2
        and not last["use_regex"]
        and first.get("type") == "Split"
        and first["pattern"].get("Regex") in _KNOWN_SPLITS
        and (first["behavior"], first["invert"]) == ("Isolated", False)
    )
    return _LETTERS if is_known else None


def pieces_of(text: str, cuts: re.Pattern[str] | None) -> Iterator[str]:
    """The text in parts of about the same size, cut where ``cuts`` matches."""
    begin = 0
    while cuts is not None and len(text) - begin > _PIECE:
        cut = cuts.search(text, begin + _PIECE)
        if cut is None:
            break
        yield text[begin : cut.start()]
        begin = cut.start()
    if begin < len(text):
        yield text[begin:]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The bytes by the characters that GPT-2 writes them as: itself if it is visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _steps_of(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _settled_by(decoder: dict[str, Any] | None, is_byte: Callable[[int], bool]) -> Callable[[list[int]], int]:
    """How many of the first tokens decode to the same text whatever follows, by the decoder of a tokenizer.json."""
    if decoder is None:  # tokens with spaces between
        return len
    steps = _steps_of(decoder)
    kinds = [step["type"] for step in steps]
    end = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    after = steps[end + 1 :]
    is_known = all(kind in ("Metaspace", "WordPiece", "Replace", "Strip", "ByteFallback") for kind in kinds[:end])
    if kinds[:end] != ["BPEDecoder"] and not is_known:
        return lambda _tokens: 0
    if any(step["type"] != "Strip" or step["stop"] > 0 for step in after):
        return lambda _tokens: 0
    if "ByteFallback" not in kinds:
        return len

    def settled(tokens: list[int]) -> int:
        """A run of bytes that are no characters is replaced as a whole: it waits for its end."""
        count = len(tokens)
        while count > 0 and is_byte(tokens[count - 1]):
            count -= 1
        return count

    return settled


# ------------------------------------------------------------------------------------------------ SentencePiece


class SentencePieceTokenizer(Serialized):
    """A tokenizer of the library ``sentencepiece``.

    ``encode`` adds neither <s> nor </s>, and samples no segmentations; of the special symbols that a text spells out,
    those that the user defined become tokens. ``decode`` leaves out control symbols, as the library does. A text is
    encoded whole: the library may write its first word otherwise than the others.

    Args:
        processor: A ``SentencePieceProcessor``, of whose model this takes a copy, or the bytes of a .model file.

    Raises:
        ValueError: The model is damaged, empty, or something else.
        TypeError: ``processor`` is neither.
        ImportError: ``sentencepiece`` is not installed.
    """

    _NAME = "bigramx.SentencePieceTokenizer"

    def __init__(self, processor: object) -> None:
        library = import_library("sentencepiece", "sentencepiece")
        if isinstance(processor, library.SentencePieceProcessor):
            processor = processor.serialized_model_proto()
        if not isinstance(processor, bytes):
            raise not_known(processor)
        if not processor:
            raise ValueError("not a tokenizer: an empty SentencePiece model")
        with library_errors("sentencepiece"):
            self._processor = library.SentencePieceProcessor(model_proto=processor)
            self._vocab_size: int = self._processor.vocab_size()
        self._model = processor

    @property
    def vocab_size(self) -> int:
        """V, how many pieces there are."""
        return self._vocab_size

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens, without <s> and </s>.

        Raises:
            ValueError: The text has a lone surrogate.
            TypeError: ``text`` is not a str.
        """
        check_text(text)
        with library_errors("sentencepiece"):
            return _tokens_of(self._processor.encode(text, out_type=int))

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens, a tensor of any shape or a sequence -> text.

        Raises:
            IndexError: A token is out of range; names it and its position.
            TypeError: The tokens are not integers.
        """
        return self._decode(ids_of(tokens, self.vocab_size))

    def _decode(self, tokens: list[int]) -> str:
        with library_errors("sentencepiece"):
            text: str = self._processor.decode(tokens)
        return text

    def decode_stream(self) -> DecodeStream:
        """Bytes wait until they make a character."""
        return ContextStream(functools.partial(ids_of, vocab_size=self.vocab_size), self._decode, self._num_settled)

    def _num_settled(self, tokens: list[int]) -> int:
        begin = len(tokens)
        while begin > 0 and self._processor.is_byte(tokens[begin - 1]):
            begin -= 1
        run = bytes(int(self._processor.id_to_piece(token)[3:5], 16) for token in tokens[begin:])  # <0x41>
        try:
            run.decode()
        except UnicodeDecodeError as error:
            return begin + error.start
        return len(tokens)

    def to_json(self) -> str:
        """The tokenizer as one line of JSON, its model in base64."""
        return json.dumps({"format": self._NAME, "model": base64.b64encode(self._model).decode()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
            ImportError: ``sentencepiece`` is not installed.
        """
        return cls(from_base64(text_of(parse_object(text, cls._NAME), "model")))

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer(vocab_size={self.vocab_size})"


# ---------------------------------------------------------------------------------------- tiktoken and minbpe


class _ByteTokenizer(Serialized):
    """Tokens that stand for bytes: the text is UTF-8, what is none replaced."""

    _bytes: dict[int, bytes]

    @property
    def vocab_size(self) -> int:
        """The largest token + 1, special tokens included."""
        return max(self._bytes) + 1

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens, a tensor of any shape or a sequence -> text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            IndexError: A token is out of range; names it and its position.
            TypeError: The tokens are not integers.
        """
        return self._bytes_of(tokens).decode(errors="replace")

    def decode_stream(self) -> DecodeStream:
        """Bytes wait until they make a character."""
        return ByteStream(self._bytes_of)

    def _bytes_of(self, tokens: Tensor | Sequence[int]) -> bytes:
        return b"".join(self._bytes.get(token, b"") for token in ids_of(tokens, self.vocab_size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def check_special_tokens(special_tokens: Mapping[Any, Any], others: Collection[int]) -> None:
    """Raises a ValueError unless these are texts with tokens of their own."""
    for text, token in special_tokens.items():
        if not isinstance(text, str) or not text or type(token) is not int or not 0 <= token < _MOST_TOKENS:
            raise ValueError("not a tokenizer: expected special_tokens to be texts and their tokens")
        check_text(text)
    tokens = set(special_tokens.values())
    if len(tokens) < len(special_tokens) or not tokens.isdisjoint(others):
        raise ValueError("not a tokenizer: expected each special token to have a token of its own")


class TiktokenTokenizer(_ByteTokenizer):
    """A tokenizer of the library ``tiktoken``.

    The special tokens that a text spells out become these tokens, as in the other tokenizers here: tiktoken's
    ``encode(text, allowed_special="all")``.

    Args:
        encoding: A ``tiktoken.Encoding``.

    Raises:
        ValueError: Two texts have the same token, or one of the 256 bytes has none.
        TypeError: ``encoding`` is something else.
        ImportError: ``tiktoken`` is not installed.
    """

    _NAME = "bigramx.TiktokenTokenizer"

    def __init__(self, encoding: Any) -> None:
        if not isinstance(encoding, import_library("tiktoken", "tiktoken").Encoding):
            raise not_known(encoding)
        self._encoding = encoding
        self._ranks, self._special_tokens = encoding._mergeable_ranks, encoding._special_tokens
        check_text(encoding.name)
        _check_ranks(self._ranks)
        check_special_tokens(self._special_tokens, self._ranks.values())
        self._bytes = {rank: piece for piece, rank in self._ranks.items()}
        self._bytes |= {token: text.encode() for text, token in self._special_tokens.items()}

    @classmethod
    def of_parts(
        cls, pattern: str, mergeable_ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], name: str = "custom"
    ) -> Self:
        """The tokenizer of what ``tiktoken.Encoding`` takes.

        Raises:
            ValueError: The pattern is no regular expression, or as in the constructor.
            ImportError: ``tiktoken`` is not installed.
        """
        _check_ranks(mergeable_ranks)
        check_special_tokens(special_tokens, mergeable_ranks.values())
        library = import_library("tiktoken", "tiktoken")
        with library_errors("tiktoken"):
            encoding = library.Encoding(
                name, pat_str=pattern, mergeable_ranks=dict(mergeable_ranks), special_tokens=dict(special_tokens)
            )
        return cls(encoding)

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens.

        Raises:
            ValueError: The text has a lone surrogate.
            TypeError: ``text`` is not a str.
        """
        check_text(text)
        with library_errors("tiktoken"):
            tokens = self._encoding.encode_to_numpy(text, allowed_special="all")
        return torch.from_numpy(tokens.astype("int64"))

    def to_json(self) -> str:
        """The tokenizer as one line of JSON; ``mergeable_ranks`` is the content of a .tiktoken file."""
        ranks = sorted(self._ranks.items(), key=lambda item: item[1])
        return json.dumps(
            {
                "format": self._NAME,
                "name": self._encoding.name,
                "pattern": self._encoding._pat_str,
                "mergeable_ranks": "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks),
                "special_tokens": self._special_tokens,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
            ImportError: ``tiktoken`` is not installed.
        """
        content = parse_object(text, cls._NAME)
        ranks = parse_ranks(text_of(content, "mergeable_ranks").encode())
        special_tokens = content.get("special_tokens")
        if not isinstance(special_tokens, dict):
            raise ValueError("not a tokenizer: expected special_tokens to be texts and their tokens")
        return cls.of_parts(text_of(content, "pattern"), ranks, special_tokens, text_of(content, "name"))


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """The ranks of a .tiktoken file: a line for each, the bytes in base64, and the rank."""
    ranks = {}
    lines = content.splitlines()
    for number, line in enumerate(lines):
        piece, _, rank = line.partition(b" ")
        if not (rank.isdigit() and len(rank) <= 10):
            raise ValueError(f"not a tokenizer: expected base64 and a rank in line {number + 1}")
        ranks[from_base64(piece)] = int(rank)
    if len(ranks) < len(lines):
        raise ValueError("not a tokenizer: the same bytes have two ranks")
    return ranks


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    """Raises a ValueError where tiktoken would panic."""
    if any(type(rank) is not int or not 0 <= rank < _MOST_TOKENS for rank in ranks.values()):
        raise ValueError("not a tokenizer: expected ranks of 32 bits")
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("not a tokenizer: two texts have the same rank")
    if b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("not a tokenizer: expected a rank for each of the 256 bytes, and none for no bytes")


class MinBPETokenizer(_ByteTokenizer):
    """A tokenizer of Karpathy's minbpe: bytes, and the merges that make pairs of tokens a token.

    Encodes as minbpe does, without that library; the special tokens that a text spells out become these tokens.

    Args:
        merges: Pairs of tokens; the k-th becomes token 256 + k.
        pattern: Cuts a text into words, as RegexTokenizer's does; "" for BasicTokenizer, which does not cut.
        special_tokens: Texts and their tokens.

    Raises:
        ValueError: A merge is of tokens that do not exist, or occurs twice; the pattern is no regular expression; or
            two texts have the same token.
        ImportError: There is a pattern, and ``regex`` is not installed.
    """

    _NAME = "bigramx.MinBPETokenizer"

    def __init__(
        self, merges: Sequence[tuple[int, int]], pattern: str = "", special_tokens: Mapping[str, int] | None = None
    ) -> None:
        check_text(pattern)
        self._pattern, self._special_tokens = pattern, dict(special_tokens or {})
        self._merges = {(left, right): 256 + k for k, (left, right) in enumerate(merges)}
        lengths = [1] * 256
        for left, right in self._merges:
            if (
                type(left) is not int
                or type(right) is not int
                or not 0 <= min(left, right) <= max(left, right) < len(lengths)
            ):
                raise ValueError("not a tokenizer: expected merges of tokens that exist")
            lengths.append(lengths[left] + lengths[right])
        if len(self._merges) < len(merges):
            raise ValueError("not a tokenizer: a merge occurs twice")
        if sum(lengths) > _MOST_BYTES:
            raise ValueError(f"not a tokenizer: expected tokens of {_MOST_BYTES:,} bytes in all at most")
        self._bytes = {byte: bytes([byte]) for byte in range(256)}
        for (left, right), token in self._merges.items():
            self._bytes[token] = self._bytes[left] + self._bytes[right]
        check_special_tokens(self._special_tokens, self._bytes)
        self._bytes |= {token: text.encode() for text, token in self._special_tokens.items()}
        self._words = None
        if pattern:
            regex = import_library("regex", "tiktoken")
            with library_errors("regex"):
                self._words = regex.compile(pattern)
        self._encode_word = functools.lru_cache(2**16)(self._merge)

    @classmethod
    def from_minbpe(cls, tokenizer: Any) -> Self:
        """The tokenizer of minbpe's BasicTokenizer or RegexTokenizer.

        Raises:
            TypeError: It is another one: GPT4Tokenizer permutes bytes, and is tiktoken's cl100k_base.
            ValueError: As in the constructor.
        """
        merges = tokenizer.merges
        if hasattr(tokenizer, "byte_shuffle"):
            raise TypeError("minbpe's GPT4Tokenizer permutes bytes: take tiktoken.get_encoding('cl100k_base') instead")
        if list(merges.values()) != list(range(256, 256 + len(merges))):
            raise TypeError("expected minbpe's merges to make the tokens from 256 on, in their order")
        return cls(list(merges), tokenizer.pattern, tokenizer.special_tokens)

    @classmethod
    def from_model(cls, text: str) -> Self:
        """The tokenizer of a .model file that minbpe wrote.

        Raises:
            ValueError: ``text`` is something else.
        """
        lines = text.split("\n")
        try:
            if lines[0] != "minbpe v1":
                raise ValueError("its first line")
            num_special = int(lines[2])
            special = [line.rsplit(" ", 1) for line in lines[3 : 3 + num_special]]
            if num_special < 0 or len(special) != num_special:
                raise ValueError("special tokens")
            special_tokens = {name: int(token) for name, token in special}
            merges = [(int(left), int(right)) for left, right in map(str.split, filter(None, lines[3 + num_special :]))]
        except (ValueError, IndexError) as error:
            raise ValueError(f"not a tokenizer: no model of minbpe ({error})") from None
        if len(special_tokens) < num_special:
            raise ValueError("not a tokenizer: a special token occurs twice")
        return cls(merges, lines[1], special_tokens)

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens.

        Raises:
            ValueError: The text has a lone surrogate.
            TypeError: ``text`` is not a str.
        """
        check_text(text)
        tokens: list[int] = []
        for part in split_at(self._special_tokens, text):
            if part in self._special_tokens:
                tokens.append(self._special_tokens[part])
            elif self._words is None:
                tokens += self._merge(part)
            else:
                for word in self._words.findall(part):
                    tokens += self._encode_word(word)
        return _tokens_of(tokens)

    def _merge(self, word: str) -> list[int]:
        """The tokens of a word: the earliest merge first, everywhere, from left to right."""
        tokens = list(word.encode())
        following, before = list(range(1, len(tokens) + 1)), list(range(-1, len(tokens) - 1))
        heap: list[tuple[int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(tokens) and (merged := self._merges.get((tokens[left], tokens[right]))):
                heapq.heappush(heap, (merged, left))

        for position in range(len(tokens) - 1):
            consider(position, position + 1)
        while heap:
            merged, left = heapq.heappop(heap)
            right = following[left]
            if right == len(tokens) or self._merges.get((tokens[left], tokens[right])) != merged:
                continue  # one of the two is part of another token by now
            tokens[left], tokens[right], following[left] = merged, -1, following[right]
            if following[left] < len(tokens):
                before[following[left]] = left
            consider(before[left], left)
            consider(left, following[left])
        return [token for token in tokens if token >= 0]

    def to_json(self) -> str:
        """The tokenizer as one line of JSON."""
        return json.dumps(
            {
                "format": self._NAME,
                "pattern": self._pattern,
                "merges": list(self._merges),
                "special_tokens": self._special_tokens,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
            ImportError: There is a pattern, and ``regex`` is not installed.
        """
        content = parse_object(text, cls._NAME)
        merges, special_tokens = content.get("merges"), content.get("special_tokens")
        if not isinstance(merges, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in merges):
            raise ValueError("not a tokenizer: expected merges to be pairs of tokens")
        if not isinstance(special_tokens, dict):
            raise ValueError("not a tokenizer: expected special_tokens to be texts and their tokens")
        if not all(type(token) is int for pair in merges for token in pair):
            raise ValueError("not a tokenizer: expected merges of tokens that exist")
        return cls([(left, right) for left, right in merges], text_of(content, "pattern"), special_tokens)


def split_at(special_tokens: Iterable[str], text: str) -> list[str]:
    """The special tokens in a text, and what is between them."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    if not longest_first:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
