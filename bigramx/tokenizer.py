"""Text to tokens and back: one token per character, or the tokenizers of other libraries."""

from __future__ import annotations

import json
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx.decode_stream import DecodeStream, PlainStream, RereadingStream
from bigramx.fusion import is_of
from bigramx.ops import Alphabet
from bigramx.storage import read
from bigramx.tokenizer_adapters import (
    WHITESPACE,
    HFTokenizer,
    MinBPETokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    parse_ranks,
    pieces_of,
    split_at,
)
from bigramx.tokenizer_base import Serialized, Tokenizer, check_text, import_library, named, not_known, parse_object

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "END_OF_TEXT",
    "CharTokenizer",
    "DecodeStream",
    "HFTokenizer",
    "MinBPETokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "adapt",
    "decode_stream",
    "deserialize",
    "from_json",
    "load",
    "register",
    "serialize",
    "train_bpe",
]

END_OF_TEXT = "<|endoftext|>"
_FORMAT = "bigramx.CharTokenizer"
_MOST_TRAINED = 2**24


class CharTokenizer(Serialized):
    """Numbers the distinct characters of a text in the order of their code points, as the lecture's script does.

    Args:
        characters: The characters, distinct, in the order of their tokens.

    Raises:
        ValueError: A character occurs twice.
        TypeError: ``characters`` is not a str.
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._alphabet = Alphabet(characters)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in ``text``."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """V, how many characters there are."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens.

        Raises:
            ValueError: A character is not among the tokenizer's; names it and its position.
            TypeError: ``text`` is not a str.
        """
        return self._alphabet.encode(text)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens, a tensor of any shape or a sequence -> text.

        A list or a tuple of ints is read in place, without a tensor.

        Raises:
            IndexError: A token is out of range; names it and its position.
            TypeError: The tokens are not integers.
        """
        if isinstance(tokens, (list, tuple)):  # None if some are not plain ints; a tensor may still hold them
            text = self._alphabet.decode_sequence(tokens)
            if text is not None:
                return text
        tokens = tokens.cpu() if isinstance(tokens, Tensor) else torch.tensor(tokens, device="cpu")
        if tokens.numel() == 0:
            return ""
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"expected tokens to be integers, got {tokens.dtype}")
        return self._alphabet.decode(tokens)

    def decode_stream(self) -> DecodeStream:
        """Each character is complete."""
        return PlainStream(self.decode)

    def to_json(self) -> str:
        """The tokenizer as one line of JSON."""
        return json.dumps({"format": _FORMAT, "code_points": [ord(character) for character in self.characters]})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
        """
        points = parse_object(text, _FORMAT).get("code_points")
        if not isinstance(points, list) or not all(type(p) is int and 0 <= p <= sys.maxunicode for p in points):
            raise ValueError("not a tokenizer: expected the code points of its characters")
        return cls("".join(map(chr, points)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.characters,)  # copied and pickled as its characters, from which the rest is built

    def __repr__(self) -> str:
        return f"CharTokenizer({self.characters!r})"


_READERS: dict[str, Callable[[str], Tokenizer]] = {
    _FORMAT: CharTokenizer.from_json,
    HFTokenizer._NAME: HFTokenizer.from_json,
    SentencePieceTokenizer._NAME: SentencePieceTokenizer.from_json,
    TiktokenTokenizer._NAME: TiktokenTokenizer.from_json,
    MinBPETokenizer._NAME: MinBPETokenizer.from_json,
}


def register(format: str, from_json: Callable[[str], Tokenizer]) -> None:
    """Lets ``from_json``, ``load`` and models read a format of tokenizers.

    Args:
        format: What the ``"format"`` of the JSON is that the tokenizer's ``to_json`` writes.
        from_json: Makes a tokenizer of it, and raises a ValueError where it cannot.
    """
    _READERS[format] = from_json


def from_json(text: str | bytes) -> Tokenizer:
    """The tokenizer whose ``to_json`` wrote the text.

    Raises:
        ValueError: ``text`` is something else, or of a format that is not registered.
        ImportError: The library that the tokenizer needs is not installed.
    """
    text = text if isinstance(text, str) else text.decode()
    name = parse_object(text).get("format")
    reader = _READERS.get(name) if isinstance(name, str) else None
    if reader is None:
        raise ValueError(f"not a tokenizer: expected the format to be one of {', '.join(_READERS)}")
    return reader(text)


def adapt(tokenizer: object) -> Tokenizer:
    """An object as a tokenizer: itself if it is one, or the adapter of one that a library made.

    Args:
        tokenizer: A ``Tokenizer``; a ``tokenizers.Tokenizer``, or an object such as ``AutoTokenizer`` makes, with a
            ``backend_tokenizer``; a ``SentencePieceProcessor``; a ``tiktoken.Encoding``; or one of minbpe's.

    Raises:
        TypeError: It is nothing of these.
        ValueError: The tokenizer is damaged.
    """
    if isinstance(tokenizer, Tokenizer) and not isinstance(tokenizer, type):
        return tokenizer
    if is_of("tokenizers", "Tokenizer", tokenizer) or hasattr(tokenizer, "backend_tokenizer"):
        return HFTokenizer(tokenizer)
    if is_of("tokenizers.implementations", "BaseTokenizer", tokenizer):
        return HFTokenizer(tokenizer)
    if is_of("sentencepiece", "SentencePieceProcessor", tokenizer):
        return SentencePieceTokenizer(tokenizer)
    if is_of("tiktoken", "Encoding", tokenizer):
        return TiktokenTokenizer(tokenizer)
    if all(hasattr(tokenizer, name) for name in ("encode", "decode", "merges", "special_tokens", "pattern")):
        return MinBPETokenizer.from_minbpe(tokenizer)
    raise not_known(tokenizer)


def serialize(tokenizer: object, num_rows: int) -> str:
    """A tokenizer as the text that a model's file holds, which ``deserialize`` can read.

    Args:
        tokenizer: What ``adapt`` takes.
        num_rows: How many tokens the model knows.

    Raises:
        TypeError: It is no tokenizer, or could not be read again.
        ValueError: It has more tokens than the model.
    """
    adapted = adapt(tokenizer)
    _check_size(adapted, num_rows)
    text = adapted.to_json()
    if type(adapted) not in (CharTokenizer, HFTokenizer, SentencePieceTokenizer, TiktokenTokenizer, MinBPETokenizer):
        _check_readable(adapted, text)
    return text


def _check_readable(tokenizer: Tokenizer, text: str) -> None:
    kind = type(tokenizer).__name__
    try:
        again = from_json(text)
    except Exception as error:
        raise TypeError(
            f"a {kind} could not be loaded again ({error}): bigramx.tokenizer.register tells how to read what its "
            "to_json writes"
        ) from None
    if not isinstance(tokenizer, type(again)):
        raise TypeError(f"a {kind} would be loaded as a {type(again).__name__}")


def deserialize(text: str, num_rows: int) -> Tokenizer:
    """What ``serialize`` wrote.

    Raises:
        ValueError: The text is something else, or the tokenizer has more tokens than the model.
        ImportError: The library that the tokenizer needs is not installed.
    """
    tokenizer = from_json(text)
    _check_size(tokenizer, num_rows)
    return tokenizer


def _check_size(tokenizer: Tokenizer, num_rows: int) -> None:
    if tokenizer.vocab_size > num_rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the table {num_rows} rows")


def load(
    path: FileLike | IO[str], *, pattern: str | None = None, special_tokens: Mapping[str, int] | None = None
) -> Tokenizer:
    """Reads a tokenizer, whoever wrote it.

    Args:
        path: A path, or a file object: a tokenizer.json of ``tokenizers``, what ``save`` wrote, a .model of
            SentencePiece or minbpe, or a .tiktoken file.
        pattern: What cuts a text into words: a .tiktoken file lacks it.
        special_tokens: Texts and their tokens: a .tiktoken file lacks them.

    Raises:
        ValueError: The file holds something else; or it is a .tiktoken file, and there is no pattern.
        OSError: It cannot be read, or is no regular file.
        ImportError: The library that it needs is not installed.
    """
    content = read(path)
    content = content.encode() if isinstance(content, str) else content
    return named(path, lambda: _read_any(content, pattern, special_tokens or {}))


def _read_any(content: bytes, pattern: str | None, special_tokens: Mapping[str, int]) -> Tokenizer:
    if content.lstrip()[:1] in (b"", b"{", b"["):
        is_foreign = "format" not in parse_object(content) and "model" in parse_object(content)
        return HFTokenizer.from_json(content) if is_foreign else from_json(content)
    if content.startswith(b"minbpe "):
        return MinBPETokenizer.from_model(content.decode())
    if re.match(rb"[A-Za-z0-9+/]+=* \d+(\n|$)", content):
        if pattern is None:
            raise ValueError("a .tiktoken file lacks the pattern that cuts a text into words: expected pattern=")
        return TiktokenTokenizer.of_parts(pattern, parse_ranks(content), special_tokens)
    if content.startswith(b"\n"):  # the tag of the first piece
        return SentencePieceTokenizer(content)
    raise ValueError("not a tokenizer: no JSON, no .model of SentencePiece or minbpe, no .tiktoken file")


def train_bpe(
    texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    min_frequency: int = 2,
    progress: bool = False,
) -> HFTokenizer:
    """Trains a byte-level BPE, as GPT-2's, by the library ``tokenizers``: the same for the same texts.

    While the library merges, which it does in its own threads, Ctrl-C waits for it.

    Args:
        texts: Texts, as str, and files of UTF-8 text, as ``pathlib.Path``; one, or several, which are read once.
        vocab_size: How many tokens: the special ones, the 256 bytes, and the merges.
        special_tokens: Get the first tokens; the ends of texts are 0. What spells them out is not trained on.
        min_frequency: Pairs that occur more rarely are not merged.
        progress: Whether the library shows how far it is.

    Returns:
        The tokenizer. Its ``vocab_size`` is smaller than asked, with a warning, where the texts have fewer merges.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and the special tokens, or larger than 2^24; a special
            token is empty, or occurs twice; a text has a lone surrogate.
        OSError: A file cannot be read.
        ImportError: ``tokenizers`` is not installed.
    """
    library = import_library("tokenizers", "tokenizers")
    vocab_size, least = operator.index(vocab_size), 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"expected vocab_size >= {least}, for the bytes and the special tokens, got {vocab_size}")
    if vocab_size > _MOST_TRAINED:  # the library allocates memory for all of them
        raise ValueError(f"expected vocab_size <= {_MOST_TRAINED:,}, got {vocab_size}")
    if isinstance(special_tokens, str) or "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"expected special_tokens to be distinct texts, none of them empty, got {special_tokens!r}")
    words = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = words, library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(words.alphabet()),
        min_frequency=min_frequency,
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_pieces_to_train_on(texts, special_tokens), trainer)
    trained = HFTokenizer(tokenizer)
    if trained.vocab_size < vocab_size:
        warnings.warn(
            f"train_bpe: the texts have merges for {trained.vocab_size} tokens, {vocab_size} were asked for",
            stacklevel=2,
        )
    return trained


def _pieces_to_train_on(
    texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], special_tokens: Sequence[str]
) -> Iterator[str]:
    from bigramx import data  # which reads texts by tokenizers

    for text in [texts] if isinstance(texts, (str, os.PathLike)) else texts:
        content = text if isinstance(text, str) else data.read_text(text)
        check_text(content)
        for part in split_at(special_tokens, content):
            if part not in special_tokens:
                yield from pieces_of(part, WHITESPACE)


def decode_stream(tokenizer: Tokenizer) -> DecodeStream:
    """Decodes tokens that come in parts, as in streaming generation; see ``DecodeStream``.

    A tokenizer that has no method ``decode_stream()`` decodes all tokens so far at each step, and is taken to begin
    with the text of the first of them whatever follows, up to characters that are replaced.
    """
    own = getattr(tokenizer, "decode_stream", None)
    stream: DecodeStream = RereadingStream(tokenizer.decode) if own is None else own()
    return stream
