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
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigramx import data, parts, storage, token_files
from bigramx.counts import BigramCounts
from bigramx.parts import Part
from bigramx.ranks import Ranks, join
from bigramx.tokenizer import Tokenizer, adapt

_PIECE_BYTES = 2**25  # of a file of tokens, which is one piece of work
_BLOCK_PAIRS = 2**22  # distinct pairs that each rank receives at once
_SAVE_SHARE = 20  # saving takes at most one of so many seconds
_INTERVAL = 0.1  # seconds between two reports of progress
_PARTIALS = "rank-[0-9][0-9][0-9][0-9][0-9].safetensors"
_PART = r"{}-\d{{5}}-of-\d{{5}}(\.new)?\.safetensors"
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
    tokenizer: Any = None,
    save_interval: float = 60.0,
    timeout: timedelta | None = None,
    progress: Callable[[CountProgress], object] | None = None,
    report: Callable[[str], object] | None = None,
) -> CountResult:
    """Counts the pairs of shards into one file, or under torchrun into one for each rank and an index.

    ``BigramCounts.load`` reads either. All ranks must see the same folders. A file or an index that is there already is
    replaced when all is written. While it counts, a folder beside it, ``counts.partial``, holds what is counted so far,
    also where an error or an interrupt ends it; the same call, by any number of ranks, goes on from there.

    Args:
        paths: Files, folders and patterns of tokens or texts, as for ``data.read_tokens``.
        output: The file; or a folder, for ``counts.safetensors`` in it.
        vocab_size: V. None: that of the tokenizer; else the largest token + 1, found in one more pass over the shards.
        eot: The token that ends a document, as for ``BigramCounts``.
        dtype: What ``.bin`` files without a header hold, as for ``data.read_tokens``.
        tokenizer: Encodes texts; a Tokenizer, or an object of a library that ``tokenizer.adapt`` takes.
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
        adapted = None if tokenizer is None else adapt(tokenizer)
        return job.run(paths, _Options(vocab_size, eot, dtype, adapted), save_interval)


# ------------------------------------------------------------------------------------------------------------- shards


class _Options(NamedTuple):
    """How the shards are to be read and counted."""

    vocab_size: int | None
    eot: int | None
    dtype: torch.dtype | str | None
    tokenizer: Tokenizer | None

    def open(self, piece: _Piece) -> Tensor:
        """The tokens of the shard that it is a piece of, (N)."""
        size = os.stat(piece.path).st_size
        if size != piece.size:
            name = storage.name_of(piece.path)
            raise ValueError(f"{name}: expected {piece.size} bytes as rank 0 found at the start, got {size} bytes")
        (tokens,) = data.read_tokens(piece.path, tokenizer=self.tokenizer, dtype=self.dtype).shards
        return tokens

    def described(self) -> dict[str, object]:
        """All that counts depend on beside the shards, for a file."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        tokenizer = None if self.tokenizer is None else zlib.crc32(self.tokenizer.to_json().encode())
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
        num_pieces = max(-(-status.st_size // _PIECE_BYTES), 1) if token_files.are_tokens(path) else 1
        pieces += [_Piece(path, status.st_size, status.st_mtime_ns, k, num_pieces) for k in range(num_pieces)]
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
        return cls(Path(name) if is_file else Path(name, parts.FILE))

    @property
    def index(self) -> Path:
        return parts.index_path(self.file)

    @property
    def partial(self) -> Path:
        """The folder of what is counted so far."""
        return self.file.with_suffix(".partial")

    def names_of_parts(self, num_parts: int) -> list[str]:
        """Of the new parts; not those of the parts that an index names already, which stay until it is replaced."""
        taken = self._named_parts()
        for ending in (".safetensors", ".new.safetensors"):
            names = [f"{self.file.stem}-{k:05}-of-{num_parts:05}{ending}" for k in range(1, num_parts + 1)]
            if taken.isdisjoint(names):
                break
        return names

    def clean(self) -> None:
        """Removes what was counted so far, and parts that no index names: of counts before, or of a job that died."""
        named = self._named_parts()
        for path in self.file.parent.iterdir():
            is_part = re.fullmatch(_PART.format(re.escape(self.file.stem)), path.name) is not None
            if is_part and path.name not in named and parts.is_part(path):
                path.unlink(missing_ok=True)
        for path in self.partial.glob(_PARTIALS):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is none, or someone else has put something there
            self.partial.rmdir()

    def _named_parts(self) -> set[str]:
        """The parts that the index names, if there is one."""
        try:
            return {part.file for part in parts.read_index(self.index)[0]}
        except (OSError, ValueError):
            return set()


class _Partial(NamedTuple):
    """Counts that are on disk: the header of their file."""

    path: Path
    options: dict[str, object]
    pieces: set[_Piece]
    crc32: str  # of the header

    @classmethod
    def of(cls, path: Path) -> _Partial:
        metadata = parts.read_metadata(path)
        try:
            options, pieces = json.loads(metadata["options"]), json.loads(metadata["pieces"])
            return cls(path, options, {_Piece(*piece) for piece in pieces}, metadata["crc32"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise _damaged(path) from None

    @classmethod
    def from_json(cls, text: str) -> _Partial:
        path, options, pieces, crc32 = json.loads(text)
        return cls(Path(path), options, {_Piece(*piece) for piece in pieces}, crc32)

    def to_json(self) -> str:
        """For the other ranks, who must not look by themselves: the file may be replaced meanwhile."""
        return json.dumps([str(self.path), self.options, sorted(self.pieces), self.crc32])

    @property
    def rank(self) -> int:
        """Which of its start's ranks wrote it."""
        return int(self.path.stem.rpartition("-")[2])

    def load(self, like: BigramCounts) -> BigramCounts:
        """The counts, of the vocabulary of others.

        Raises:
            ValueError: The file is damaged, or was replaced.
        """
        tensors, metadata = storage.read_tensors(self.path, _KIND)
        if metadata["crc32"] != self.crc32:
            raise ValueError(f"{storage.name_of(self.path)}: another job that counts the same has just replaced it")
        try:
            return BigramCounts._of_parts(like.vocab_size, like.eot, *(tensors[name] for name in parts.NAMES))
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise _damaged(self.path) from None


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{storage.name_of(path)}: damaged, or no counts that bigramx saved")


# ----------------------------------------------------------------------------------------------------------- exchange


class _Rows(NamedTuple):
    """Some rows of counts, as a file has them.

    Attributes:
        begin: The first of them.
        crow: (rows + 1) int64.
        col: (n) int32.
        values: (n) int32 or int64.
    """

    begin: int
    crow: Tensor
    col: Tensor
    values: Tensor

    @classmethod
    def of(cls, counts: BigramCounts) -> _Rows:
        return cls(0, *counts._counter.parts())

    @property
    def end(self) -> int:
        return self.begin + len(self.crow) - 1

    def between(self, begin: int, end: int) -> _Rows:
        """Those of the rows from ``begin`` to before ``end`` that are among these; views."""
        begin, end = (min(max(row, self.begin), self.end) for row in (begin, end))
        crow = self.crow[begin - self.begin : end - self.begin + 1]
        first, last = crow[[0, -1]].tolist()
        return _Rows(begin, crow - first, self.col[first:last], self.values[first:last])

    def tensors(self) -> dict[str, Tensor]:
        """In as few bytes as can be."""
        is_small = len(self.values) == 0 or int(self.values.max()) < 2**31
        values = self.values.int() if is_small else self.values
        return dict(zip(parts.NAMES, (self.crow, self.col, values), strict=True))


def _borders(lengths: Tensor, begin: int, end: int, num_parts: int) -> list[int]:
    """Cuts the rows from ``begin`` to ``end`` into parts of about as many pairs: where each begins, and the end.

    Lengths, (V) int64, has the number of pairs in each row.
    """
    before = torch.zeros(end - begin + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(lengths[begin:end], 0, out=before[1:])
    wanted = int(before[-1]) * torch.arange(1, num_parts, device="cpu") // num_parts
    return [begin, *(torch.searchsorted(before, wanted) + begin).tolist(), end]


def _all_to_all(ranks: Ranks, sent: Sequence[_Rows], begins: Sequence[int]) -> list[_Rows]:
    """Sends rows to each rank; returns what each has sent here, whose first row is known."""
    is_large = any(rows.values.dtype == torch.int64 for rows in sent)
    dtype = torch.int64 if ranks.max(torch.tensor(int(is_large), device="cpu")) > 0 else torch.int32
    sizes = torch.tensor([[len(rows.crow), len(rows.col)] for rows in sent], device="cpu")
    sizes = torch.stack(ranks.all_to_all(list(sizes), [2] * ranks.size))
    num_rows, num_pairs = sizes.T.tolist()
    crows = ranks.all_to_all([rows.crow for rows in sent], num_rows)
    cols = ranks.all_to_all([rows.col for rows in sent], num_pairs)
    values = ranks.all_to_all([rows.values.to(dtype) for rows in sent], num_pairs)
    return [_Rows(*each) for each in zip(begins, crows, cols, values, strict=True)]


def _summed(ranks: Ranks, counts: BigramCounts, progress: Callable[[float], object]) -> _Rows:
    """Sends each row to its owner, who adds up what the ranks have of it; returns the rows of this rank.

    All have about as many to receive. They receive them in as many blocks each. ``progress`` is called with the
    fraction done since its last call.
    """
    rows, vocab_size, eot = _Rows.of(counts), counts.vocab_size, counts.eot
    lengths = ranks.sum(rows.crow.diff())
    owned = list(pairwise(_borders(lengths, 0, vocab_size, ranks.size)))
    most = max(int(lengths[begin:end].sum()) for begin, end in owned)
    num_blocks = max(-(-most // _BLOCK_PAIRS), 1)
    blocks = [list(pairwise(_borders(lengths, begin, end, num_blocks))) for begin, end in owned]
    summed = BigramCounts(vocab_size, eot=eot)
    for k, (begin, end) in enumerate(blocks[ranks.rank]):
        sent = [rows.between(*of_owner[k]) for of_owner in blocks]
        for _begin, crow, col, values in _all_to_all(ranks, sent, [begin] * ranks.size):
            crow = torch.cat([crow.new_zeros(begin), crow, crow[-1].expand(vocab_size - end)])
            summed.merge(BigramCounts._of_parts(vocab_size, eot, crow, col, values))
        progress(1 / num_blocks)
    return _Rows.of(summed).between(*owned[ranks.rank])


def _balanced(ranks: Ranks, rows: _Rows, vocab_size: int) -> _Rows:
    """Sends some rows on, so that all ranks have about as many pairs; whose a row is depends on the counts alone."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    lengths[rows.begin : rows.end] = rows.crow.diff()
    owned = list(pairwise(_borders(ranks.sum(lengths), 0, vocab_size, ranks.size)))
    own = rows.between(*owned[ranks.rank])
    sent = [rows.between(*of_owner) for of_owner in owned]
    sent[ranks.rank] = rows.between(rows.begin, rows.begin)  # those that it keeps are not sent
    received = _all_to_all(ranks, sent, [0] * ranks.size)
    received[ranks.rank] = own
    ends = torch.cat([each.crow.diff() for each in received]).cumsum(0)
    col, values = torch.cat([each.col for each in received]), torch.cat([each.values for each in received])
    return _Rows(owned[ranks.rank][0], torch.cat([ends.new_zeros(1), ends]), col, values)


# ---------------------------------------------------------------------------------------------------------------- job


class _Job:
    """What one rank does."""

    def __init__(
        self,
        ranks: Ranks,
        place: _Place,
        progress: Callable[[CountProgress], object] | None,
        report: Callable[[str], object] | None,
    ) -> None:
        self._ranks, self._place = ranks, place
        self._progress = progress if ranks.rank == 0 else None
        self._report = report if ranks.rank == 0 else None
        self._stage, self._total_bytes = "reading", 0
        self._num_bytes = self._num_tokens = 0  # of which the other ranks do not know yet
        self._next_time = 0.0
        ranks.on_wait = self._advance

    def run(self, paths: Sequence[str | os.PathLike[str]], options: _Options, save_interval: float) -> CountResult:
        """Counts, and writes; see ``count_shards``."""
        pieces = [_Piece(*piece) for piece in self._of_rank_0(lambda: self._start(paths))]
        self._total_bytes = sum(piece.num_bytes for piece in pieces)
        storage.check_writable(self._place.file if self._ranks.size == 1 else self._place.index, 0)
        if options.vocab_size is None:
            vocab_size = options.tokenizer.vocab_size if options.tokenizer else self._largest_token(pieces, options) + 1
            options = options._replace(vocab_size=max(vocab_size, (options.eot or 0) + 1))
        self._enter("counting")
        saved = [_Partial.from_json(text) for text in self._of_rank_0(lambda: self._usable(pieces, options))]
        running = _Running(self._place, self._ranks, options, saved, save_interval)
        pending = sorted(set(pieces).difference(*(each.pieces for each in saved)))
        if self._ranks.rank == 0:
            self._advance(self._total_bytes - sum(piece.num_bytes for piece in pending))
        try:
            self._count(pending, options, running)
            return self._write(running.counts)
        except BaseException:
            with _without_interrupts(), contextlib.suppress(OSError):
                running.save()
            raise

    def _of_rank_0(self, make: Callable[[], object]) -> Any:
        """What rank 0 makes, which JSON can tell, on all ranks."""
        return json.loads(self._ranks.gather(json.dumps(make()) if self._ranks.rank == 0 else "")[0])

    def _start(self, paths: Sequence[str | os.PathLike[str]]) -> list[_Piece]:
        self._place.file.parent.mkdir(parents=True, exist_ok=True)
        return _pieces_of(paths)

    # ------------------------------------------------------------------------------------------------ progress

    def _enter(self, stage: str) -> None:
        self._next_time = 0.0
        self._advance()  # what is left of the stage before
        self._stage, self._next_time = stage, 0.0
        self._advance()

    def _advance(self, num_bytes: int = 0, num_tokens: int = 0) -> None:
        """Tells the other ranks, and the user, what is done; hears of their errors."""
        self._num_bytes += num_bytes
        self._num_tokens += num_tokens
        if (now := time.monotonic()) < self._next_time:
            return
        self._next_time = now + _INTERVAL * max(self._ranks.size / 32, 1)  # the store answers all of them
        self._ranks.check()
        num_bytes = self._ranks.add(f"{self._stage}/bytes", self._num_bytes)
        num_tokens = self._ranks.add(f"{self._stage}/tokens", self._num_tokens)
        self._num_bytes = self._num_tokens = 0
        if self._progress is not None:
            self._progress(CountProgress(self._stage, num_bytes, self._total_bytes, num_tokens))

    def _read(self, pieces: Sequence[_Piece], options: _Options) -> Iterator[tuple[_Piece, Tensor]]:
        """The pieces that this rank gets to, each with the shard that it is of."""
        path, shard = "", torch.empty(0, device="cpu")
        while (k := self._ranks.claim(self._stage)) < len(pieces):
            if pieces[k].path != path:
                path, shard = pieces[k].path, options.open(pieces[k])
            yield pieces[k], shard

    # ------------------------------------------------------------------------------------------------ counting

    def _largest_token(self, pieces: Sequence[_Piece], options: _Options) -> int:
        largest = 0
        for piece, shard in self._read(pieces, options):
            tokens = piece.of(shard)
            if len(tokens) > 0:
                largest = max(largest, data.token_range(tokens)[1])
            self._advance(piece.num_bytes, len(tokens))
        return int(self._ranks.max(torch.tensor(largest, device="cpu")))

    def _usable(self, pieces: Sequence[_Piece], options: _Options) -> list[str]:
        """The counts on disk that are of these shards, as they are now, and of none twice; as JSON."""
        wanted, found = set(pieces), set[_Piece]()
        on_disk = [_Partial.of(path) for path in sorted(self._place.partial.glob(_PARTIALS))]
        usable = []
        for each in sorted(on_disk, key=lambda each: -len(each.pieces)):  # some may be merged in another
            if each.options != options.described():
                raise ValueError(
                    f"{storage.name_of(each.path)}: expected counts with {_shown(options.described())}, got some with "
                    f"{_shown(each.options)}; remove {storage.name_of(self._place.partial)} to count all shards anew"
                )
            if each.pieces <= wanted - found:
                found |= each.pieces
                usable.append(each.to_json())
        if on_disk:
            unit = "shards" if all(piece.num_pieces == 1 for piece in pieces) else "pieces of shards"
            self._tell(f"{len(found)} of {len(pieces)} {unit} taken from {storage.name_of(self._place.partial)}")
        return usable

    def _tell(self, line: str) -> None:
        if self._report is not None:
            self._report(line)

    def _count(self, pieces: Sequence[_Piece], options: _Options, running: _Running) -> None:
        for piece, shard in self._read(pieces, options):
            tokens = piece.of(shard)
            num_done = 0

            def advance(num_tokens: int, piece: _Piece = piece, total: int = max(len(tokens), 1)) -> None:
                nonlocal num_done
                before, num_done = num_done, num_done + num_tokens
                num_bytes = piece.num_bytes * num_done // total - piece.num_bytes * before // total
                self._advance(num_bytes, num_tokens)

            running.begin(piece)
            try:
                running.counts.update(tokens, progress=advance)
            except IndexError:
                with _naming(piece.path):
                    data.check_range(shard, running.counts.vocab_size)
                raise
            running.save_when_due()

    # ------------------------------------------------------------------------------------------------- writing

    def _write(self, counts: BigramCounts) -> CountResult:
        result = self._write_file(counts) if self._ranks.size == 1 else self._write_parts(counts)
        if self._ranks.rank == 0:
            self._place.clean()
        return result

    def _write_file(self, counts: BigramCounts) -> CountResult:
        self._enter("writing")
        counts.save(self._place.file)
        self._place.index.unlink(missing_ok=True)
        return CountResult(
            self._place.file, counts.vocab_size, counts.eot, counts.num_pairs, counts.num_distinct, num_ranks=1, rank=0
        )

    def _write_parts(self, counts: BigramCounts) -> CountResult:
        ranks, place, vocab_size, eot = self._ranks, self._place, counts.vocab_size, counts.eot
        self._enter("exchanging")
        share = self._total_bytes / ranks.size
        rows = _summed(ranks, counts, progress=lambda fraction: self._advance(int(share * fraction)))
        rows = _balanced(ranks, rows, vocab_size)
        self._enter("writing")
        names = self._of_rank_0(lambda: place.names_of_parts(ranks.size))
        part = parts.write_part(place.file.with_name(names[ranks.rank]), rows.begin, rows.tensors())
        written = [Part(**json.loads(text)) for text in ranks.gather(json.dumps(asdict(part)))]
        if ranks.rank == 0:
            parts.write_index(place.index, written, {"vocab_size": json.dumps(vocab_size), "eot": json.dumps(eot)})
            place.file.unlink(missing_ok=True)
        num_pairs, num_distinct = int(ranks.sum(rows.values.sum())), sum(part.num_distinct for part in written)
        return CountResult(place.index, vocab_size, eot, num_pairs, num_distinct, ranks.size, ranks.rank)


class _Running:
    """What a rank has counted, and its file.

    Attributes:
        counts: Of all that this rank has counted, or has taken from disk.
    """

    def __init__(
        self, place: _Place, ranks: Ranks, options: _Options, saved: Sequence[_Partial], interval: float
    ) -> None:
        assert options.vocab_size is not None
        self.counts = BigramCounts(options.vocab_size, eot=options.eot)
        self._path = place.partial / f"rank-{ranks.rank:05}.safetensors"
        self._options, self._interval = options, interval
        self._pieces: set[_Piece] = set()
        self._superseded = []
        for partial in saved:
            if partial.rank % ranks.size == ranks.rank:  # so that no other rank writes a file of this name
                self.counts.merge(partial.load(like=self.counts))
                self._pieces |= partial.pieces
                self._superseded.append(partial.path)
        self._num_saved = len(self._pieces)
        self._piece: _Piece | None = None
        self._num_pairs = 0
        self._next_time = time.monotonic() + interval

    def begin(self, piece: _Piece) -> None:
        """What is added to the counts now is this piece, whole or not at all."""
        self._settle()
        self._num_pairs = self.counts.num_pairs
        self._piece = piece

    def _settle(self) -> None:
        """Tells by the counts whether the piece has been added: an interrupt may come at any moment."""
        if self._piece is not None and self.counts.num_pairs > self._num_pairs:
            self._pieces.add(self._piece)

    def save_when_due(self) -> None:
        """Saves once in each interval, and rarely if that takes long."""
        if time.monotonic() >= self._next_time:
            begin = time.monotonic()
            self.save()
            end = time.monotonic()
            self._next_time = end + max(self._interval, _SAVE_SHARE * (end - begin))

    def save(self) -> None:
        """Writes the counts, if there are new ones, and removes the files that they were taken from."""
        self._settle()
        if len(self._pieces) == self._num_saved:
            return
        self._path.parent.mkdir(exist_ok=True)
        metadata = {
            "options": json.dumps(self._options.described()),
            "pieces": json.dumps(sorted(self._pieces)),
        }
        storage.write_tensors(self._path, _KIND, _Rows.of(self.counts).tensors(), metadata)
        for path in self._superseded:
            if path != self._path:
                path.unlink(missing_ok=True)
        self._superseded, self._num_saved = [], len(self._pieces)


def _shown(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignores Ctrl-C: under torchrun each process gets a second one, from torchrun itself."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors tell of which shard they are."""
    try:
        yield
    except IndexError as error:
        raise IndexError(f"{storage.name_of(path)}: {error}") from None
