"""Texts and tokens from files, and the batches that the lecture's script draws."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator

import torch
from torch import Tensor

from bigramx import ops, storage

_INTEGERS = (torch.uint8, torch.uint16, torch.int32, torch.int64)
_CHUNK = 2**18  # tokens that are read at once
_MAX_COUNTS = 2**27  # entries, of 8 bytes: 1 GB


def check_tokens(tokens: Tensor) -> None:
    """Raises a RuntimeError where ``tokens`` is not 1-D, or not uint8, uint16, int32 or int64."""
    if tokens.dim() != 1:
        raise RuntimeError(f"expected tokens to be 1-D, got shape {tuple(tokens.shape)}")
    if tokens.dtype not in _INTEGERS:
        raise RuntimeError(f"expected tokens to be uint8, uint16, int32 or int64, got {tokens.dtype}")


def are_worth_counting(tokens: Tensor, vocab_size: int) -> bool:
    """Whether a table of pair counts, (V, V), is small compared with ``tokens``, (N), and takes 1 GB at most."""
    return 4 * vocab_size**2 <= len(tokens) and vocab_size**2 <= _MAX_COUNTS


def chunks(tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The tokens, a part at a time, and the position of its first: so few that a copy in int64 takes 2 MB."""
    for begin in range(0, len(tokens), _CHUNK):
        yield begin, tokens[begin : begin + _CHUNK].long()


def check_range(tokens: Tensor, vocab_size: int) -> None:
    """Raises an IndexError where a token is out of range: it names the first such and its position."""
    for begin, chunk in chunks(tokens):
        smallest, largest = chunk.aminmax()
        if smallest < 0 or largest >= vocab_size:
            n = int(((chunk < 0) | (chunk >= vocab_size)).nonzero()[0])
            raise IndexError(
                f"tokens holds {int(chunk[n])} at position {begin + n}, expected 0 <= token < {vocab_size}"
            )


def token_range(tokens: Tensor) -> tuple[int, int]:
    """The smallest and the largest of the tokens, (N), N > 0, which are read chunk by chunk."""
    extremes = [[int(token) for token in chunk.aminmax()] for _begin, chunk in chunks(tokens)]
    return min(smallest for smallest, _largest in extremes), max(largest for _smallest, largest in extremes)


def default_text() -> str:
    """The text that ships with CPython: the topics of the language reference, about half a million characters."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a UTF-8 text; a byte order mark is dropped, line ends are kept.

    Raises:
        ValueError: The file is not UTF-8; names the byte and its position.
        OSError: It cannot be read, or is no regular file.
        MemoryError: It does not fit into memory.
    """
    content = storage.read_file(path)
    try:
        return str(content, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{storage.name_of(path)}: expected UTF-8 text, got byte {error.object[error.start]:#04x} "
            f"at position {error.start}"
        ) from None


def read_bin(path: str | os.PathLike[str]) -> Tensor:
    """NanoGPT's ``.bin`` tokens, little-endian uint16, as a memory-mapped (N) uint16 tensor.

    Pages are read on first access; the file is never written. It must not be cut short while the tokens are in use: the
    system would end the process (SIGBUS). One that is replaced, as ``storage.write_with`` does, stays as it was.

    Raises:
        ValueError: The file is empty or of an odd size.
        OSError: It cannot be read, or is no regular file.
    """
    with storage.open_to_read(path) as file:
        status = os.fstat(file.fileno())
        num_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode) or num_bytes == 0 or num_bytes % 2:
            raise ValueError(f"{storage.name_of(path)}: expected a file of uint16 tokens, got {num_bytes} bytes")
        # Private and writable, as tensors are: what is written to them stays in memory.
        pages = mmap.mmap(file.fileno(), num_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=torch.uint16)


def split(tokens: Tensor, train_fraction: float = 0.9) -> tuple[Tensor, Tensor]:
    """The first part of the tokens for training and the rest for validation; views, as in the lecture.

    Raises:
        ValueError: ``train_fraction`` is not between 0 and 1.
    """
    if not 0 <= train_fraction <= 1:
        raise ValueError(f"expected 0 <= train_fraction <= 1, got {train_fraction}")
    n = int(train_fraction * len(tokens))
    return tokens[:n], tokens[n:]


def get_batch(
    tokens: Tensor, batch_size: int, block_size: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random blocks and the token that follows each of theirs, drawn as in the lecture's get_batch.

    Args:
        tokens: (N) uint8, uint16, int32 or int64, N > block_size.
        batch_size: B.
        block_size: T.
        generator: Where the randomness comes from; None: PyTorch's default generator of the CPU, so that the batches
            are the same on every device. A generator on a GPU draws there, anew at each replay of a captured graph.

    Returns:
        idx, targets, (B, T) int64 each, contiguous; ``targets`` is ``idx`` shifted by one token.

    Raises:
        RuntimeError: ``tokens`` is not 1-D, or of another dtype.
        ValueError: A size is not positive, or there are too few tokens for one block.
        TypeError: An argument is of the wrong type.
    """
    idx, targets = ops.get_batch(tokens, batch_size, block_size, generator)
    return idx, targets
