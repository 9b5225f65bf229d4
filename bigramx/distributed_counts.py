"""Pair counts of shards, by one process or by the ranks that torchrun starts: the same counts, bit for bit.

Each rank counts pieces of the shards, one after another, as the ranks get to them. Then every row goes to its owner, in
blocks, so that no rank needs much more memory than for what it has counted and what it will own. Each owner writes its
rows; an index ties them. What is counted is saved from time to time, for a second start to go on from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigramx import data, parts, storage, token_files
from bigramx.counts import BigramCounts
from bigramx.data import Encoder
from bigramx.parts import Part
from bigramx.ranks import Ranks, join

_PIECE_BYTES = 2**26  # of a file of tokens, which is one piece of work
_BLOCK_PAIRS = 2**22  # distinct pairs that each rank receives at once
_SAVE_SHARE = 20  # saving takes at most one of so many seconds
_ADD_INTERVAL = 0.25  # seconds between two reports to the other ranks
_FILE = "counts.safetensors"
_KIND = "counts-partial"


@dataclass(frozen=True)
class CountProgress:
    """How far all ranks together are.

    Attributes:
        stage: "reading", to find the largest token; "counting"; "exchanging"; or "writing".
        num_bytes: How many bytes of the shards are done in this stage.
        total_bytes: How many bytes the shards have.
        num_tokens: How many tokens were counted, or read, since the start.
    """

    stage: str
    num_bytes: int
    total_bytes: int
    num_tokens: int


@dataclass(frozen=True)
class CountResult:
    """What was written; the same on all ranks but for ``rank``.

    Attributes:
        path: The file, or the index of several.
        vocab_size: V.
        eot: The token that ends a document.
        num_pairs: The sum of the counts.
        num_distinct: The number of distinct pairs.
        num_ranks: How many processes counted.
        rank: Which of them this is.
    """

    path: Path
    vocab_size: int
    eot: int | None
    num_pairs: int
    num_distinct: int
    num_ranks: int
    rank: int


def count_shards(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    eot: int | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: Encoder | None = None,
    save_interval: float = 60.0,
    timeout: timedelta | None = None,
    progress: Callable[[CountProgress], object] | None = None,
    report: Callable[[str], object] | None = None,
) -> CountResult:
    """Counts the pairs of shards into one file, or under torchrun into one for each rank and an index.

    ``BigramCounts.load`` reads either. All ranks must see the same folders. A file or an index that is there already is
    replaced when all is written. While it counts, ``<output>.partial`` holds what is counted so far, also where an error
    or an interrupt ends it; the same call, by any number of ranks, goes on from there.

    Args:
        paths: Files, folders and patterns of tokens or texts, as for ``data.read_tokens``.
        output: The file; or a folder, for ``counts.safetensors`` in it.
        vocab_size: V. None: that of the tokenizer; else the largest token + 1, found in one more pass over the shards.
        eot: The token that ends a document, as for ``BigramCounts``.
        dtype: What ``.bin`` files without a header hold, as for ``data.read_tokens``.
        tokenizer: Encodes texts.
        save_interval: Seconds between two savings of what is counted so far.
        timeout: How long a rank waits for the others; None: PyTorch's default, 30 minutes.
        progress: Called on rank 0, about ten times a second. A KeyboardInterrupt ends the job.
        report: Called on rank 0 with a line for the user.

    Raises:
        ValueError: A file is not what it should be or is named twice; or the counts that are on disk are of another
            ``vocab_size`` or ``eot``, ``dtype`` or tokenizer.
        IndexError: A token is out of range; names the shard and the position.
        OSError: A file cannot be read or written.
        RuntimeError: Another rank raised an error, or died; names it.
    """
    with join(timeout) as ranks:
        job = _Job(ranks, _Place.of(output), progress, report)
        return job.run(paths, _Options(vocab_size, eot, dtype, tokenizer), save_interval)


# ------------------------------------------------------------------------------------------------------------- shards


class _Options(NamedTuple):
    """How the shards are to be read and counted."""

    vocab_size: int | None
    eot: int | None
    dtype: torch.dtype | str | None
    tokenizer: Encoder | None

    def open(self, path: str) -> Tensor:
        """The tokens of a shard, (N)."""
        (tokens,) = data.read_tokens(path, tokenizer=self.tokenizer, dtype=self.dtype).shards
        return tokens

    def described(self) -> dict[str, object]:
        """All that counts depend on beside the shards, for a file."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        to_json = getattr(self.tokenizer, "to_json", lambda: repr(self.tokenizer))
        tokenizer = None if self.tokenizer is None else zlib.crc32(to_json().encode())
        return {"vocab_size": self.vocab_size, "eot": self.eot, "dtype": dtype, "tokenizer": tokenizer}


class _Piece(NamedTuple):
    """One of the ``num_pieces`` equal pieces of a shard."""

    path: str
    size: int
    modified: int
    number: int
    num_pieces: int

    @property
    def num_bytes(self) -> int:
        return self.size // self.num_pieces

    def of(self, tokens: Tensor) -> Tensor:
        """The piece of the shard's tokens, and the token after it, with which its last forms a pair."""
        begin, end = (len(tokens) * k // self.num_pieces for k in (self.number, self.number + 1))
        return tokens[begin : end + 1]


def _pieces_of(paths: Sequence[str | os.PathLike[str]]) -> list[_Piece]:
    """The pieces do not depend on the number of ranks, so that another number may go on."""
    pieces = []
    for path in (file for each in paths for file in token_files.files_of(each)):
        status = os.stat(path)
        num_pieces = -(-status.st_size // _PIECE_BYTES) if token_files.are_tokens(path) else 1
        pieces += [_Piece(path, status.st_size, status.st_mtime_ns, k, max(num_pieces, 1)) for k in range(num_pieces)]
    names = [piece.path for piece in pieces if piece.number == 0]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{storage.name_of(twice)}: expected each file once, got it twice")
    if not pieces:
        raise ValueError("expected shards to count, got none")
    return pieces


# -------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Place:
    """Where the counts are to lie.

    Attributes:
        file: The file of one process.
    """

    file: Path

    @classmethod
    def of(cls, output: str | os.PathLike[str]) -> _Place:
        name = os.fsdecode(output)
        is_file = name.endswith(".safetensors") and not os.path.isdir(name)
        return cls(Path(name) if is_file else Path(name, _FILE))

    @property
    def index(self) -> Path:
        return parts.index_path(self.file)

    @property
    def partial(self) -> Path:
        """The folder of what is counted so far."""
        return self.file.with_suffix(".partial")

    def names_of_parts(self, num_parts: int, taken: set[str]) -> list[str]:
        """Of the new parts; not those of the parts that an index names already, which stay until it is replaced."""
        for generation in range(2):
            stem = self.file.stem + generation * "-new"
            names = [f"{stem}-{k:05}-of-{num_parts:05}.safetensors" for k in range(1, num_parts + 1)]
            if taken.isdisjoint(names):
                break
        return names

    def old_parts(self) -> set[str]:
        """The names of the parts of counts that are to be replaced."""
        try:
            return {part.file for part in parts.read_index(self.index)[0]}
        except (OSError, ValueError):
            return set()


class _Partial(NamedTuple):
    """Counts that are on disk: the header of their file."""

    path: Path
    options: dict[str, object]
    pieces: set[_Piece]

    @classmethod
    def of(cls, path: Path) -> _Partial:
        metadata = parts.read_metadata(path)
        try:
            pieces = {_Piece(*piece) for piece in json.loads(metadata["pieces"])}
            return cls(path, json.loads(metadata["options"]), pieces)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{storage.name_of(path)}: damaged, or no counts that bigramx saved") from None

    def load(self) -> BigramCounts:
        tensors, metadata = storage.read_tensors(self.path, _KIND)
        size = int(json.loads(metadata["vocab_size"]))
        crow, col, values = (tensors[name] for name in parts.DTYPES)
        csr = torch.sparse_csr_tensor(crow, col.long(), values, (size, size), check_invariants=True)
        return BigramCounts.from_csr(csr, eot=json.loads(metadata["eot"]))
