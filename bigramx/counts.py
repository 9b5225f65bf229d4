"""Pair counts of real vocabularies: memory in proportion to the distinct pairs, not to V * V."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx import ops
from bigramx.parts import read_counts
from bigramx.storage import name_of, write_tensors

if TYPE_CHECKING:
    from bigramx.shards import TokenShards

_KIND = "counts"
_PARTS = ("crow_indices", "col_indices", "values")
_INTEGERS = (torch.int32, torch.int64)
_FEW = 2**18  # tokens that are kept until there are more
_CHUNK = 3 * 2**23  # pairs that are counted at once


class BigramCounts:
    """How often each token follows each other token, of a vocabulary whose table (V, V) would not fit into memory.

    Counts are exact, and the same for any order of the shards and any number of threads. They take some 8 to 16 bytes
    for each distinct pair; counting takes 210 MB beside. Several threads may use one object at once.

    An error, or Ctrl-C, leaves the counts as they were before the call.

    Args:
        vocab_size: V, from 1 to 2^31.
        eot: The token that ends a document. A pair whose first token it is is not counted, as it would join two
            documents; a pair whose second token it is is counted. None: all pairs are.

    Attributes:
        vocab_size: V.
        eot: The token that ends a document, or None.

    Raises:
        ValueError: ``vocab_size`` or ``eot`` is out of range.
        TypeError: One of them is no int.
    """

    def __init__(self, vocab_size: int, *, eot: int | None = None) -> None:
        self.vocab_size = _index("vocab_size", vocab_size)
        self.eot = None if eot is None else _index("eot", eot)
        if not 0 < self.vocab_size <= 2**31:
            raise ValueError(f"expected 0 < vocab_size <= 2^31, got {vocab_size}")
        if self.eot is not None and not 0 <= self.eot < self.vocab_size:
            raise ValueError(f"expected eot to be a token, 0 <= eot < {vocab_size}, got {eot}")
        self._counter = ops.PairCounter(self.vocab_size, self.eot)

    @property
    def num_pairs(self) -> int:
        """The sum of the counts."""
        return self._counter.num_pairs()

    @property
    def num_distinct(self) -> int:
        """The number of distinct pairs."""
        return self._counter.num_distinct()

    def update(self, tokens: Tensor | TokenShards, *, progress: Callable[[int], object] | None = None) -> None:
        """Counts all pairs of consecutive tokens.

        Args:
            tokens: (N) uint8, uint16, uint32, int32 or int64: one sequence, which may be memory-mapped; those on a GPU
                are copied. Of ``TokenShards`` each shard is a sequence of its own: no pair of two of them is counted.
            progress: Is called every 0.1 s or so with the number of tokens done since its last call.

        Raises:
            IndexError: A token is out of range; its position is that within the shard, which is named. The shards
                before it have been counted.
            ValueError: The documents of ``tokens`` end with another token.
            RuntimeError: ``tokens`` is not 1-D, or of another dtype.
            TypeError: ``tokens`` is neither a Tensor nor shards.
            OverflowError: The sum of the counts would not be less than 2^63.
            MemoryError: There is not enough memory.
        """
        if isinstance(tokens, Tensor):
            self._update(tokens, progress)
            return
        if not hasattr(tokens, "shards"):
            raise TypeError(f"expected tokens to be a Tensor or TokenShards, got {type(tokens).__name__}")
        if tokens.eot is not None and tokens.eot != self.eot:
            raise ValueError(f"expected tokens whose documents end with {self.eot}, as these counts', got {tokens.eot}")
        for name, shard in zip(tokens.names, tokens.shards, strict=True):
            self._update_by_shard(name, shard, progress)

    def _update_by_shard(self, name: str, shard: Tensor, progress: Callable[[int], object] | None) -> None:
        try:
            self._update(shard, progress)
        except IndexError as error:
            raise IndexError(f"{name}: {error}") from None

    def _update(self, tokens: Tensor, progress: Callable[[int], object] | None) -> None:
        tokens, num_tokens = tokens.cpu(), tokens.numel()
        last = max(num_tokens - 1, 0)
        if num_tokens <= _FEW:
            if progress is not None:
                progress(num_tokens)  # which may raise
            self._counter.update(tokens, 0, last)
            return
        added = ops.PairCounter(self.vocab_size, self.eot)
        for begin in range(0, last, _CHUNK):
            end = min(begin + _CHUNK, last)
            added.update(tokens, begin, end)
            if progress is not None:
                progress(end - begin + (end == last))
        self._counter.merge(added)

    def merge(self, other: BigramCounts) -> None:
        """Adds the counts of another, which keeps its own.

        Raises:
            ValueError: ``vocab_size`` or ``eot`` differ.
            OverflowError: The sum of the counts would not be less than 2^63.
        """
        if (self.vocab_size, self.eot) != (other.vocab_size, other.eot):
            raise ValueError(
                f"expected counts with vocab_size={self.vocab_size} and eot={self.eot}, "
                f"got vocab_size={other.vocab_size} and eot={other.eot}"
            )
        self._counter.merge(other._counter)

    def to_csr(self) -> Tensor:
        """(V, V) int64 counts as torch.sparse_csr: int64 indices, the columns of a row in ascending order.

        It takes 16 bytes for each distinct pair, beside those of this object.

        Raises:
            MemoryError: There is not enough memory.
        """
        return self._counter.csr(0, self.vocab_size, False)

    def rows(self, begin: int, end: int) -> Tensor:
        """The rows from ``begin`` to before ``end`` alone, (end - begin, V), as ``to_csr`` gives all.

        Raises:
            IndexError: There are no such rows.
            TypeError: One of them is no int.
        """
        return self._counter.csr(_index("begin", begin), _index("end", end), False)

    def to_dense(self) -> Tensor:
        """(V, V) int64 counts."""
        return self.to_csr().to_dense()

    @classmethod
    def from_csr(cls, counts: Tensor, *, eot: int | None = None) -> BigramCounts:
        """The counts that a tensor holds.

        Args:
            counts: (V, V) integers: torch.sparse_csr, torch.sparse_coo or dense.
            eot: The token that ends a document: its row is left out.

        Raises:
            ValueError: A count is negative, or indices are not those of a (V, V) tensor, each once, in ascending order.
            RuntimeError: ``counts`` is not square, or does not hold integers.
            NotImplementedError: It has another layout.
            OverflowError: The sum of the counts is not less than 2^63.
        """
        if counts.dim() != 2 or counts.size(0) != counts.size(1):
            raise RuntimeError(f"expected counts to be square, (V, V), got shape {tuple(counts.shape)}")
        if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
            raise RuntimeError(f"expected counts to hold integers, got {counts.dtype}")
        counts = counts.cpu()
        if counts.layout == torch.sparse_csr:
            parts = counts.crow_indices(), counts.col_indices(), counts.values()
        elif counts.layout in (torch.sparse_coo, torch.strided):
            parts = _parts_of_coo(counts.to_sparse_coo().coalesce())
        else:
            raise NotImplementedError(f"not implemented for counts of layout {counts.layout}")
        return cls._of_parts(counts.size(0), eot, *parts)

    @classmethod
    def _of_parts(
        cls, vocab_size: int, eot: int | None, crow_indices: Tensor, col_indices: Tensor, values: Tensor
    ) -> BigramCounts:
        made = cls(vocab_size, eot=eot)
        made._counter.add_csr(crow_indices.long().contiguous(), _as_int64(col_indices), _as_int64(values))
        return made

    def save(self, path: FileLike) -> None:
        """Writes one safetensors file, whole or not at all: 8 bytes for each pair, or 12 where counts exceed 2^31.

        Args:
            path: A path, or a binary file object.

        Raises:
            OSError: The file cannot be written; an old one is unchanged.
            TypeError: ``path`` is neither.
        """
        metadata = {"vocab_size": json.dumps(self.vocab_size), "eot": json.dumps(self.eot)}
        write_tensors(path, _KIND, dict(zip(_PARTS, self._counter.parts(), strict=True)), metadata)

    @classmethod
    def load(cls, path: FileLike) -> BigramCounts:
        """Reads what ``save`` wrote, or ``bigramx count`` in several processes.

        Args:
            path: The path of a file, of the index of several, or of a folder with ``counts.safetensors`` or its index;
                or a binary file object, which is read to its end.

        Raises:
            ValueError: A file is damaged, cut short, or holds something else, such as a part of other counts.
            OSError: It cannot be read, or is no regular file.
            MemoryError: The counts do not fit into memory.
        """
        tensors, metadata = read_counts(path)
        try:
            if tensors.keys() != set(_PARTS) or any(part.dtype not in _INTEGERS for part in tensors.values()):
                raise ValueError(f"expected {', '.join(_PARTS)}, of int32 or int64")
            vocab_size, eot = (json.loads(metadata.get(name, "[]")) for name in ("vocab_size", "eot"))
            if type(vocab_size) is not int or type(eot) not in (int, type(None)):
                raise ValueError("expected vocab_size, an int, and eot, an int or null")
            if (tensors["values"] <= 0).any():
                raise ValueError("expected counts > 0")
            return cls._of_parts(vocab_size, eot, *(tensors[name] for name in _PARTS))
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"{name_of(path)}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return self._counter.equals(other._counter) if isinstance(other, BigramCounts) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # counts change

    def __reduce__(self) -> tuple[object, ...]:
        return self._of_parts, (self.vocab_size, self.eot, *self._counter.parts())

    def __repr__(self) -> str:
        eot = "" if self.eot is None else f", eot={self.eot}"
        return f"{type(self).__name__}({self.vocab_size}{eot}): {self.num_pairs:,} pairs"


def count_csr(tokens: Tensor, vocab_size: int) -> Tensor:
    """``functional.count_bigrams`` with ``layout=torch.sparse_csr``."""
    counts = BigramCounts(vocab_size)
    counts.update(tokens)
    return counts._counter.csr(0, counts.vocab_size, True).to(tokens.device)


def _index(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]  # which is what is found out
    except TypeError:
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__}") from None


def _parts_of_coo(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a CSR tensor; of a coalesced COO tensor (V, V)."""
    rows, columns = counts.indices()
    ends = torch.bincount(rows, minlength=counts.size(0)).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)), columns, counts.values()


def _as_int64(integers: Tensor) -> Tensor:
    return (integers if integers.dtype == torch.int32 else integers.long()).contiguous()
