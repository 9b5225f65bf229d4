"""What all tokenizers are: the protocol, their files, and the checks of texts and tokens."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx.storage import name_of, read, write_text

if TYPE_CHECKING:
    from typing_extensions import Self

_Made = TypeVar("_Made")


@runtime_checkable
class Tokenizer(Protocol):
    """What a model holds as its tokenizer.

    A class that has these four is one: a model uses it as it is. It is saved where ``from_json`` can read what its
    ``to_json`` writes: see ``register``. With a method ``decode_stream()`` it decodes streams in its own way.
    """

    @property
    def vocab_size(self) -> int:
        """V: greater than every token."""

    def encode(self, text: str) -> Tensor:
        """Text -> (N) int64 tokens."""

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens, a tensor of any shape or a sequence -> text."""

    def to_json(self) -> str:
        """All that the tokenizer is, as a JSON object with its ``"format"``."""


class Serialized:
    """Saved, loaded, compared, copied and pickled by what ``to_json`` writes."""

    def to_json(self) -> str:
        """The tokenizer as one line of JSON."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what ``to_json`` writes.

        Raises:
            ValueError: ``text`` is something else.
            ImportError: The library that it needs is not installed.
        """
        raise NotImplementedError

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
    def load(cls, path: FileLike | IO[str]) -> Self:
        """Reads what ``save`` writes.

        Args:
            path: A path, or a file object, binary or for text, which is read to its end.

        Raises:
            ValueError: The file holds something else.
            OSError: It cannot be read, or is no regular file.
            MemoryError: It does not fit into memory.
        """
        return named(path, lambda: cls.from_json(read(path)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_json, (self.to_json(),)


def named(path: FileLike | IO[str], make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes of a file, which a ValueError names."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from None


def parse_object(text: str | bytes, expected: str | None = None) -> dict[str, Any]:
    """The JSON object of a tokenizer, of the expected format if there is one.

    Raises:
        ValueError: It is none, or a key occurs twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a tokenizer: no valid JSON ({error})") from None
    if not isinstance(content, dict) or (expected is not None and content.get("format") != expected):
        raise ValueError(f"not a tokenizer: expected the format {expected!r}")
    return content


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def text_of(content: Mapping[str, Any], name: str) -> str:
    """An entry that is a str of Unicode text; a ValueError where it is not."""
    value = content.get(name)
    if not isinstance(value, str):
        raise ValueError(f"not a tokenizer: expected {name} to be a text")
    check_text(value)
    return value


def from_base64(text: str | bytes) -> bytes:
    """The bytes that base64 writes; a ValueError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not a tokenizer: expected base64 ({error})") from None


def import_library(module: str, extra: str) -> Any:
    """The module; an ImportError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this tokenizer needs {module}: pip install bigramx[{extra}] ({error})") from error


@contextlib.contextmanager
def library_errors(library: str) -> Iterator[None]:
    """Whatever a library raises for bad content, the panics of those in Rust included, is a ValueError."""
    try:
        yield
    except BaseException as error:
        is_own = type(error).__name__ == "PanicException" or type(error).__module__.startswith(f"{library}.")
        is_usual = isinstance(error, (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError))
        if is_own or is_usual or type(error) is Exception:
            raise ValueError(f"{library}: {error}") from None
        raise


def check_text(text: object) -> None:
    """Raises unless ``text`` is a str that UTF-8 can encode."""
    if not isinstance(text, str):
        raise TypeError(f"expected text to be a str, got {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a lone surrogate {text[error.start]!r} at position {error.start}: expected text that UTF-8 can encode"
        ) from None


def ids_of(tokens: Tensor | Sequence[int], vocab_size: int) -> list[int]:
    """Tokens, a tensor of any shape or a sequence, as a list.

    Raises:
        IndexError: A token is out of range; names it and its position.
        TypeError: The tokens are not integers.
    """
    if not isinstance(tokens, (list, tuple, range)) or not all(type(token) is int for token in tokens):
        tensor = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens, device="cpu")
        if tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise TypeError(f"expected tokens to be integers, got {tensor.dtype}")
        tokens = tensor.flatten().tolist()
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        position, token = next((k, token) for k, token in enumerate(tokens) if not 0 <= token < vocab_size)
        raise IndexError(f"token {token} at position {position} is out of range: expected 0 <= token < {vocab_size}")
    return list(tokens)


def not_known(tokenizer: object) -> TypeError:
    """The error of an object that is no tokenizer."""
    kind = type(tokenizer).__name__
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        return TypeError(f"{kind}: expected one of transformers' fast tokenizers, which have a backend_tokenizer")
    return TypeError(
        f"expected a tokenizer: with encode, decode, vocab_size and to_json, or one of tokenizers, sentencepiece, "
        f"tiktoken or minbpe; got {kind}"
    )
