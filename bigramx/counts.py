"""Pair counts of real vocabularies: memory in proportion to the distinct pairs, not to V * V."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx.storage import name_of, read_tensors, write_tensors

if TYPE_CHECKING:
    from bigramx.data import TokenShards

_KIND = "counts"


class BigramCounts:
    """How often each token follows each other token.

    Args:
        vocab_size: V, from 1 to 2^31.
        eot: The token that ends a document. Pairs whose first token it is are not counted, as they would join two
            documents; those whose second token it is are. None: all pairs are counted.
    """

    def __init__(self, vocab_size: int, *, eot: int | None = None) -> None:
        if not 0 < vocab_size <= 2**31:
            raise ValueError(f"expected 0 < vocab_size <= 2^31, got {vocab_size}")
        if eot is not None and not 0 <= eot < vocab_size:
            raise ValueError(f"expected eot, a token below {vocab_size}, or None, got {eot}")
        self.vocab_size = vocab_size
        self.eot = eot
        self._pairs = torch.empty(0, dtype=torch.int64)  # row * V + column, ascending
        self._counts = torch.empty(0, dtype=torch.int64)

    @property
    def num_pairs(self) -> int:
        """The sum of the counts."""
        return int(self._counts.sum())

    @property
    def num_distinct(self) -> int:
        """The number of distinct pairs."""
        return len(self._pairs)

    def update(self, tokens: Tensor | TokenShards, *, progress: Callable[[int], object] | None = None) -> None:
        """Adds the pairs of consecutive tokens; of ``TokenShards`` those of each shard, and none across two."""
        for shard in [tokens] if isinstance(tokens, Tensor) else tokens.shards:
            values = shard.long()
            wrong = ((values < 0) | (values >= self.vocab_size)).nonzero()
            if len(wrong):
                n = int(wrong[0])
                raise IndexError(
                    f"tokens holds {int(values[n])} at position {n}, expected 0 <= token < {self.vocab_size}"
                )
            pairs = values[:-1] * self.vocab_size + values[1:]
            if self.eot is not None:
                pairs = pairs[values[:-1] != self.eot]
            self._add(*pairs.unique(return_counts=True))
            if progress is not None:
                progress(len(shard))

    def merge(self, other: BigramCounts) -> None:
        """Adds the counts of another."""
        if (self.vocab_size, self.eot) != (other.vocab_size, other.eot):
            raise ValueError(
                f"expected counts with vocab_size={self.vocab_size} and eot={self.eot}, "
                f"got vocab_size={other.vocab_size} and eot={other.eot}"
            )
        self._add(other._pairs, other._counts)

    def _add(self, pairs: Tensor, counts: Tensor) -> None:
        merged, places = torch.cat((self._pairs, pairs)).unique(return_inverse=True)
        sums = torch.zeros(len(merged), dtype=torch.int64).index_add_(0, places, torch.cat((self._counts, counts)))
        self._pairs, self._counts = merged, sums

    def to_csr(self) -> Tensor:
        """(V, V) int64 counts as torch.sparse_csr: int64 indices, the columns of a row in ascending order."""
        return self.rows(0, self.vocab_size)

    def rows(self, begin: int, end: int) -> Tensor:
        """The rows from ``begin`` to before ``end`` alone: (end - begin, V)."""
        if not 0 <= begin <= end <= self.vocab_size:
            raise IndexError(f"expected 0 <= begin <= end <= {self.vocab_size}, got {begin} and {end}")
        first, last = torch.searchsorted(self._pairs, torch.tensor([begin, end]) * self.vocab_size).tolist()
        pairs = self._pairs[first:last]
        borders = torch.arange(begin, end + 1) * self.vocab_size
        columns, values = pairs % self.vocab_size, self._counts[first:last].clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(
                torch.searchsorted(pairs, borders),
                columns,
                values,
                (end - begin, self.vocab_size),
                check_invariants=False,
            )

    def to_dense(self) -> Tensor:
        """(V, V) int64 counts."""
        dense = torch.zeros(self.vocab_size**2, dtype=torch.int64)
        return dense.index_copy_(0, self._pairs, self._counts).view(self.vocab_size, self.vocab_size)

    @classmethod
    def from_csr(cls, counts: Tensor, *, eot: int | None = None) -> BigramCounts:
        """The counts that a (V, V) integer tensor holds, sparse (CSR or COO) or dense."""
        if counts.dim() != 2 or counts.size(0) != counts.size(1):
            raise ValueError(f"expected counts to be (V, V), got shape {tuple(counts.shape)}")
        made = cls(counts.size(0), eot=eot)
        coo = counts.cpu().to_sparse_coo().coalesce()
        rows, columns = coo.indices()
        if (coo.values() < 0).any():
            raise ValueError("expected counts >= 0")
        is_counted = coo.values() > 0
        made._add((rows * counts.size(0) + columns)[is_counted], coo.values()[is_counted].long())
        return made

    def save(self, path: FileLike) -> None:
        """Writes one safetensors file, whole or not at all."""
        csr = self.to_csr()
        tensors = {"crow_indices": csr.crow_indices(), "col_indices": csr.col_indices(), "values": csr.values()}
        metadata = {"vocab_size": json.dumps(self.vocab_size), "eot": json.dumps(self.eot)}
        write_tensors(path, _KIND, tensors, metadata)

    @classmethod
    def load(cls, path: FileLike) -> BigramCounts:
        """Reads what ``save`` wrote."""
        tensors, metadata = read_tensors(path, _KIND)
        try:
            size = json.loads(metadata["vocab_size"])
            csr = torch.sparse_csr_tensor(
                tensors["crow_indices"], tensors["col_indices"], tensors["values"], (size, size), check_invariants=True
            )
            return cls.from_csr(csr, eot=json.loads(metadata["eot"]))
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{name_of(path)}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BigramCounts)
            and (self.vocab_size, self.eot) == (other.vocab_size, other.eot)
            and torch.equal(self._pairs, other._pairs)
            and torch.equal(self._counts, other._counts)
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        eot = "" if self.eot is None else f", eot={self.eot}"
        return f"BigramCounts({self.vocab_size}{eot}, num_pairs={self.num_pairs}, num_distinct={self.num_distinct})"
