"""Tokens in several shards, most often memory-mapped files, as one sequence that is never copied whole."""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import mmap
import operator
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from bigramx import memory, storage

DTYPES = (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64)
_NOT_RESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 does not name it
_PURPOSES = {"val": {"val", "valid", "validation"}, "test": {"test"}, "train": {"train", "training"}}
_NAMES_SHOWN = 3
_TOKENS_AT_ONCE = 2**14  # that iteration makes tensors of
_FEW = 2**20  # tokens, for which there is always room

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class TokenFile:
    """Where the tokens of a file are, little-endian: what is pickled in their place."""

    path: str
    dtype: torch.dtype
    offset: int  # of the first, in bytes
    num_tokens: int
    size: int  # of the file, in bytes
    modified: int  # when, in nanoseconds

    @classmethod
    def of(cls, file: IO[bytes], path: str | bytes, dtype: torch.dtype, offset: int, num_tokens: int) -> TokenFile:
        """The tokens of an open file."""
        status = os.fstat(file.fileno())
        path = os.path.abspath(os.fsdecode(path))
        return cls(path, dtype, offset, num_tokens, status.st_size, status.st_mtime_ns)

    def open(self) -> Tensor:
        """Maps the tokens again.

        Raises:
            ValueError: The file is not the one that it was.
            OSError: It cannot be read.
        """
        with storage.open_to_read(self.path) as file:
            if self.of(file, self.path, self.dtype, self.offset, self.num_tokens) != self:
                raise ValueError(f"{storage.name_of(self.path)}: the file has changed since its tokens were read")
            return self.map(file)

    def map(self, file: IO[bytes]) -> Tensor:
        """The tokens, (N), in pages of the open file that are read when they are first used.

        What is written to them stays in memory. By mmap.mmap each file would keep a descriptor open, and the system
        would want memory for what might be written to the pages: there are more files than descriptors, and files
        larger than the memory.

        Raises:
            OSError: The system does not map it.
        """
        if self.num_tokens == 0:
            return torch.empty(0, dtype=self.dtype, device="cpu")
        num_bytes = self.offset + self.num_tokens * self.dtype.itemsize
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _NOT_RESERVED
        address = _libc.mmap(None, num_bytes, access, flags, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno() or errno.ENOMEM
            raise OSError(number, os.strerror(number), self.path)
        pages = (ctypes.c_ubyte * num_bytes).from_address(address)
        weakref.finalize(pages, _libc.munmap, address, num_bytes).atexit = False  # tensors may live longer
        tokens = torch.frombuffer(pages, dtype=self.dtype, offset=self.offset, count=self.num_tokens)
        return tokens if sys.byteorder == "little" else _swapped(tokens)


def _swapped(tokens: Tensor) -> Tensor:
    """A copy in the other byte order."""
    return tokens.view(torch.uint8).view(-1, tokens.element_size()).flip(1).flatten().view(tokens.dtype)


class Shard(NamedTuple):
    """Some tokens, (N), and where they come from."""

    tokens: Tensor
    name: str
    file: TokenFile | None = None  # of which they are a part, mapped; None: they are in memory
    num_bytes: int | None = None  # of the text that they stand for; None: not known

    def part(self, begin: int, end: int) -> Shard:
        """A view of some of them."""
        is_whole = end - begin == self.tokens.numel()
        return self if is_whole else self._replace(tokens=self.tokens[begin:end], num_bytes=None)


class TokenShards:
    """Tokens in shards that follow each other: a lazy sequence of all of them.

    Batches are drawn from it as from the concatenated tokens. Pairs are counted and evaluated within each shard: a
    pair of the last token of one and the first of the next would say nothing, and no order of the shards matters. Nor
    is a pair counted whose first token is ``eot``.

    A copy that is pickled, for the workers of a DataLoader, opens the files again: it does not hold their tokens, nor
    what was written to them here.

    Args:
        shards: (N) tokens each: uint8, uint16, uint32, int32 or int64, not all of the same dtype, perhaps.
        names: What errors call them; None: numbers.
        eot: The token that ends a document; None: documents are not told apart.

    Attributes:
        shards: The tokens of each shard, 1-D.
        names: Of each shard, the path of a file.
        dtype: Of what indexing returns: that of the shards, or int64 if they differ.
        eot: The token that ends a document, or None.

    Raises:
        TypeError: A shard is no Tensor, or ``eot`` no int.
        RuntimeError: A shard is not 1-D, or of another dtype.
        ValueError: ``eot`` is negative, or there are not as many names as shards.
    """

    parts: tuple[Shard, ...]
    shards: tuple[Tensor, ...]
    names: tuple[str, ...]
    dtype: torch.dtype
    eot: int | None

    def __init__(self, shards: Iterable[Tensor], *, names: Iterable[str] | None = None, eot: int | None = None) -> None:
        shards = tuple(shards)
        names = tuple(map(str, range(len(shards)))) if names is None else tuple(names)
        if len(names) != len(shards):
            raise ValueError(f"expected as many names as shards, got {len(names)} and {len(shards)}")
        for shard in shards:
            check_shard(shard)
        self._set([Shard(shard, name) for shard, name in zip(shards, names, strict=True)], eot)

    @classmethod
    def of(cls, parts: Iterable[Shard], eot: int | None = None) -> TokenShards:
        """The sequence of shards that know where they come from."""
        made = cls.__new__(cls)
        made._set(parts, eot)
        return made

    def _set(self, parts: Iterable[Shard], eot: int | None) -> None:
        self.eot = None if eot is None else _checked_eot(eot)
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(part.tokens.numel() for part in self.parts))
        self.shards = tuple(part.tokens for part in self.parts)
        self.names = tuple(part.name for part in self.parts)
        dtypes = {shard.dtype for shard in self.shards}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.int64

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def numel(self) -> int:
        """The number of all tokens, N."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """That of the first shard."""
        return self.shards[0].device if self.shards else torch.device("cpu")

    @property
    def num_bytes(self) -> int | None:
        """The bytes of the texts that the tokens stand for; None where they are not known."""
        sizes = [part.num_bytes for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def ranges(self) -> list[range]:
        """The positions of each shard's tokens among all."""
        return [range(begin, end) for begin, end in itertools.pairwise([0, *self._ends])]

    def __getitem__(self, index: int | slice) -> Tensor:
        """A token, (), or the tokens of a slice, (n): a view where they are of one shard, and all shards of one dtype.

        Raises:
            IndexError: There is no such token.
            ValueError: The slice goes backwards.
            MemoryError: A copy does not fit into memory.
        """
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        position = _position(index)
        size = len(self)
        if not -size <= position < size:
            raise IndexError(f"index {position} is out of bounds for dimension 0 with size {size}")
        position %= size
        k = bisect.bisect_right(self._ends, position)
        token: Tensor = self.shards[k][position - self._ends[k]]
        return token.to(self.dtype)

    def _slice(self, begin: int, end: int, step: int) -> Tensor:
        if step < 1:
            raise ValueError("step must be greater than zero")
        views, skipped = [], 0
        for part in self._parts_between(begin, end):
            view = part.tokens if step == 1 else part.tokens[skipped::step]
            skipped = (skipped - part.tokens.numel()) % step
            if view.numel() > 0:
                views.append(view)
        if not views:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        if len(views) == 1:
            return views[0].to(self.dtype)
        num_tokens = sum(view.numel() for view in views)
        if num_tokens > _FEW:  # asking takes longer than copying a few
            memory.check_room(num_tokens * self.dtype.itemsize, f"a copy of {num_tokens:,} tokens")
        return torch.cat([view.to(self.dtype) for view in views])

    def __iter__(self) -> Iterator[Tensor]:
        """The tokens, () each, as a tensor's; ``shards`` are larger parts."""
        for shard in self.shards:
            for chunk in shard.split(_TOKENS_AT_ONCE):
                yield from chunk.to(self.dtype)

    def between(self, begin: int, end: int) -> TokenShards:
        """The tokens at the positions from ``begin`` to ``end``: views, the shards that they are of cut there."""
        return TokenShards.of(self._parts_between(begin, end), self.eot)

    def _parts_between(self, begin: int, end: int) -> Iterator[Shard]:
        """Those with a token in this range, cut to it."""
        for k in range(bisect.bisect_right(self._ends, begin), len(self.parts)):
            start = self._ends[k] - self.shards[k].numel()
            if start >= end:
                return
            if start < self._ends[k]:
                yield self.parts[k].part(max(begin - start, 0), min(end, self._ends[k]) - start)

    def split(self, train_fraction: float | None = None) -> tuple[TokenShards, TokenShards]:
        """The tokens for training, and the rest for validation; views.

        Args:
            train_fraction: The first so many are for training. None: as the names of the files say, if all do
                (``train.bin`` and ``val.bin``, ``fineweb_train_000001.bin`` and ``fineweb_val_000000.bin``; those for
                testing are in neither part); else 0.9.

        Raises:
            ValueError: ``train_fraction`` is not between 0 and 1.
        """
        if train_fraction is None:
            parts: dict[str | None, list[Shard]] = {}
            for part in self.parts:
                parts.setdefault(_purpose_of(part.name), []).append(part)
            if None not in parts and {"train", "val"} <= parts.keys():
                return TokenShards.of(parts["train"], self.eot), TokenShards.of(parts["val"], self.eot)
        n = int(checked_fraction(train_fraction) * len(self))
        return self.between(0, n), self.between(n, len(self))

    def __reduce__(self) -> tuple[object, ...]:
        """Each shard as its range in a file, or in a tensor of all that are in memory: views would be pickled whole."""
        places: list[tuple[Any, range]] = []
        in_memory: dict[Any, list[Tensor]] = {}
        sizes: dict[Any, int] = {}
        for part in self.parts:
            source: Any = part.file
            begin, size = part.tokens.storage_offset(), part.tokens.numel()
            if source is None:
                source = part.tokens.dtype, part.tokens.device
                in_memory.setdefault(source, []).append(part.tokens)
                begin = sizes.get(source, 0)
                sizes[source] = begin + size
            places.append((source, range(begin, begin + size)))
        # As bytes: tensors of uint16 and uint32 cannot be unpickled.
        tensors = {source: torch.cat(tokens).view(torch.uint8) for source, tokens in in_memory.items()}
        return _unpickled, (places, self.names, [part.num_bytes for part in self.parts], tensors, self.eot)

    def __repr__(self) -> str:
        names = [storage.printable(name) for name in self.names[:_NAMES_SHOWN]]
        more = [f"{len(self.names) - _NAMES_SHOWN:,} more"] if len(self.names) > _NAMES_SHOWN else []
        dtype, eot = str(self.dtype).removeprefix("torch."), "" if self.eot is None else f", eot={self.eot}"
        number = f"{len(self.names):,} shard{'' if len(self.names) == 1 else 's'}"
        return f"TokenShards({len(self):,} tokens, {dtype}{eot}, {number}: {', '.join(names + more)})"


def check_shard(tokens: Tensor) -> None:
    """Raises where ``tokens`` are not (N) of a dtype that tokens have.

    Raises:
        TypeError: It is no Tensor.
        RuntimeError: It is not 1-D, or of another dtype.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"expected tokens to be a Tensor or TokenShards, got {type(tokens).__name__}")
    if tokens.dim() != 1:
        raise RuntimeError(f"expected tokens to be 1-D, got shape {tuple(tokens.shape)}")
    if tokens.dtype not in DTYPES:
        raise RuntimeError(f"expected tokens to be uint8, uint16, uint32, int32 or int64, got {tokens.dtype}")


def checked_fraction(train_fraction: float | None) -> float:
    """The fraction, 0.9 in place of None.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    fraction = 0.9 if train_fraction is None else train_fraction
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected 0 <= train_fraction <= 1, got {fraction}")
    return fraction


def _checked_eot(eot: int) -> int:
    if isinstance(eot, bool) or not hasattr(eot, "__index__"):
        raise TypeError(f"expected eot to be an int, got {type(eot).__name__}")
    if operator.index(eot) < 0:
        raise ValueError(f"expected eot >= 0, got {eot}")
    return operator.index(eot)


def _position(index: object) -> int:
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"expected an int or a slice, got {type(index).__name__}")
    return operator.index(index)


def _purpose_of(name: str) -> str | None:
    """What a file is for, if one of the words of its name says so."""
    words = set(re.split("[^a-z]+", os.path.basename(name).lower()))
    return next((purpose for purpose, synonyms in _PURPOSES.items() if words & synonyms), None)


def _unpickled(
    places: list[tuple[Any, range]],
    names: tuple[str, ...],
    num_bytes: list[int | None],
    tensors: dict[Any, Tensor],
    eot: int | None,
) -> TokenShards:
    files = {source for source, _positions in places if isinstance(source, TokenFile)}
    opened = {source: content.view(source[0]) for source, content in tensors.items()}
    opened |= {file: file.open() for file in files}
    shards = (
        Shard(opened[source][positions.start : positions.stop], name, source if source in files else None, size)
        for (source, positions), name, size in zip(places, names, num_bytes, strict=True)
    )
    return TokenShards.of(shards, eot)
