"""Text to tokens and back, one token per character."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import IO

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx.ops import Alphabet
from bigramx.storage import name_of, read, write_text

_FORMAT = "bigramx.CharTokenizer"


class CharTokenizer:
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

    def to_json(self) -> str:
        """The tokenizer as one line of JSON."""
        return json.dumps({"format": _FORMAT, "code_points": [ord(character) for character in self.characters]})

    @classmethod
    def from_json(cls, text: str | bytes) -> CharTokenizer:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a tokenizer: no valid JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"not a tokenizer: expected the format {_FORMAT!r}")
        points = content.get("code_points")
        if not isinstance(points, list) or not all(type(p) is int and 0 <= p <= sys.maxunicode for p in points):
            raise ValueError("not a tokenizer: expected the code points of its characters")
        return cls("".join(map(chr, points)))

    def save(self, path: FileLike | IO[str]) -> None:
        """Writes the tokenizer as JSON, in UTF-8, whole or not at all.

        Args:
            path: A path, or a file object, binary or for text.

        Raises:
            OSError: The file cannot be written; an old one is unchanged.
            TypeError: ``path`` is neither.
        """
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: FileLike | IO[str]) -> CharTokenizer:
        """Reads what ``save`` writes.

        Args:
            path: A path, or a file object, binary or for text, which is read to its end.

        Raises:
            ValueError: The file holds something else.
            OSError: It cannot be read, or is no regular file.
            MemoryError: It does not fit into memory.
        """
        try:
            return cls.from_json(read(path))
        except ValueError as error:
            raise ValueError(f"{name_of(path)}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __reduce__(self) -> tuple[type[CharTokenizer], tuple[str]]:
        return type(self), (self.characters,)  # copied and pickled as its characters, from which the rest is built

    def __repr__(self) -> str:
        return f"CharTokenizer({self.characters!r})"
