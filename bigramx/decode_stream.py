"""Text of tokens that come in parts: what is complete, as soon as it is."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from torch import Tensor

Tokens = Tensor | Sequence[int]
_REPLACED = "\ufffd"


class DecodeStream:
    """Decodes tokens part by part: the texts of all steps, and of ``finish``, are the text of all tokens at once.

    However the tokens are split: a character whose bytes are in several tokens waits for the last of them, and so do
    bytes that later ones may make a character. Made by ``bigramx.tokenizer.decode_stream``.
    """

    def step(self, tokens: Tokens | int) -> str:
        """The text that these tokens complete.

        Args:
            tokens: The next tokens, a tensor of any shape, a sequence, or one.

        Raises:
            IndexError: A token is out of range; the stream is as it was before.
            TypeError: The tokens are not integers; the stream is as it was before.
        """
        return self._step([tokens] if isinstance(tokens, int) else tokens)

    def finish(self) -> str:
        """The text that is left: of characters that were never completed, their replacements."""
        return ""

    def _step(self, tokens: Tokens) -> str:
        raise NotImplementedError


class PlainStream(DecodeStream):
    """Of tokens that are texts by themselves."""

    def __init__(self, decode: Callable[[Tokens], str]) -> None:
        self._decode = decode

    def _step(self, tokens: Tokens) -> str:
        return self._decode(tokens)


class ByteStream(DecodeStream):
    """Of tokens that are bytes of UTF-8.

    Args:
        to_bytes: Tokens -> their bytes.
    """

    def __init__(self, to_bytes: Callable[[Tokens], bytes]) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _step(self, tokens: Tokens) -> str:
        return self._decoder.decode(self._to_bytes(tokens))

    def finish(self) -> str:
        """The text that is left: of characters that were never completed, their replacements."""
        return self._decoder.decode(b"", final=True)


class ContextStream(DecodeStream):
    """Of tokens whose text depends on whether any text came before: spaces at the start are left out, for example.

    Args:
        ids: Checks tokens, and makes them a list.
        decode: A list of tokens -> text.
        num_settled: How many of the first tokens of a list decode to the same text whatever follows.
    """

    def __init__(
        self,
        ids: Callable[[Tokens], list[int]],
        decode: Callable[[list[int]], str],
        num_settled: Callable[[list[int]], int],
    ) -> None:
        self._ids, self._decode, self._num_settled = ids, decode, num_settled
        self._context: list[int] = []  # tokens before: all of them until they have a text, then the last that has
        self._waiting: list[int] = []

    def _step(self, tokens: Tokens) -> str:
        waiting = self._waiting + self._ids(tokens)
        count = self._num_settled(waiting)
        text = self._following(waiting[:count])
        self._waiting = waiting[count:]
        return text

    def finish(self) -> str:
        """The text that is left: of characters that were never completed, their replacements."""
        waiting, self._waiting = self._waiting, []
        return self._following(waiting)

    def _following(self, tokens: list[int]) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + tokens)[len(before) :]
        if self._decode(tokens[-1:]):
            self._context = tokens[-1:]
        elif not before:
            self._context = self._context + tokens
        return text


class RereadingStream(DecodeStream):
    """Of any tokenizer: decodes all tokens so far at each step.

    Args:
        decode: Tokens -> text.
    """

    def __init__(self, decode: Callable[[Tokens], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._num_written = 0

    def _step(self, tokens: Tokens) -> str:
        more = tokens.flatten().tolist() if isinstance(tokens, Tensor) else list(tokens)
        text = self._decode(self._tokens + more).rstrip(_REPLACED)[self._num_written :]
        self._tokens += more
        self._num_written += len(text)
        return text

    def finish(self) -> str:
        """The text that is left: of characters that were never completed, their replacements."""
        text = self._decode(self._tokens)[self._num_written :]
        self._num_written += len(text)
        return text
