"""Text to tokens and back, a character each."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from bigramx.storage import write_text

_FORMAT = "bigramx.CharTokenizer"


class CharTokenizer:
    """Numbers the distinct characters of a text in the order of their code points, as the lecture's script does.

    Args:
        characters: The characters, distinct, in the order of their tokens.

    Raises:
        ValueError: A character occurs twice.
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters
        code_points = _code_points(characters)
        self._code_points = code_points
        # One entry for each code point up to the largest: the token, or -1.
        self._tokens = torch.full((int(code_points.max()) + 1 if len(characters) else 1,), -1, dtype=torch.int64)
        self._tokens[code_points] = torch.arange(len(characters))
        if len(set(characters)) != len(characters):
            twice = next(c for k, c in enumerate(characters) if c in characters[:k])
            raise ValueError(f"expected distinct characters, got {twice!r} twice")

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
        """
        code_points = _code_points(text)
        known = code_points.clamp(max=self._tokens.numel() - 1)
        tokens = self._tokens[known].masked_fill_(known != code_points, -1)
        if tokens.numel() > 0 and int(tokens.min()) < 0:
            position = int((tokens < 0).int().argmax())
            raise ValueError(
                f"unknown character {text[position]!r} at position {position}: "
                f"expected one of the tokenizer's {self.vocab_size} characters"
            )
        return tokens

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """(N) tokens, a tensor or a list -> text.

        Raises:
            IndexError: A token is out of range; names it and its position.
            TypeError: The tokens are not integers.
        """
        tokens = torch.as_tensor(tokens).reshape(-1).cpu()
        if tokens.numel() > 0 and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
            raise TypeError(f"expected tokens to be integers, got {tokens.dtype}")
        tokens = tokens.long()
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if bool(wrong.any()):
            position = int(wrong.int().argmax())
            raise IndexError(
                f"token {int(tokens[position])} at position {position} is out of range: "
                f"expected 0 <= token < {self.vocab_size}"
            )
        code_points = self._code_points[tokens].to(torch.int32)
        raw = ctypes.string_at(code_points.data_ptr(), code_points.nbytes)
        return raw.decode("utf-32-le", errors="surrogatepass")

    def to_json(self) -> str:
        """The tokenizer as one line of JSON."""
        return json.dumps({"format": _FORMAT, "code_points": [ord(character) for character in self.characters]})

    @classmethod
    def from_json(cls, text: str) -> CharTokenizer:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a tokenizer: no valid JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"not a tokenizer: expected the format {_FORMAT!r}")
        try:
            characters = "".join(map(chr, content["code_points"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError("not a tokenizer: expected the code points of its characters") from None
        return cls(characters)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer to a JSON file, whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CharTokenizer:
        """Reads what ``save`` writes.

        Raises:
            ValueError: The file holds something else.
            OSError: It cannot be read.
        """
        with open(path, encoding="utf-8") as file:
            try:
                return cls.from_json(file.read())
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"CharTokenizer({self.characters!r})"


def _code_points(text: str) -> Tensor:
    """Text -> (N) int64 code points. Lone surrogates, which a str may hold, pass."""
    raw = bytearray(text.encode("utf-32-le", errors="surrogatepass"))
    if not raw:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(raw, dtype=torch.int32).long()
