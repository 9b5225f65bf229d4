"""Texts and tokens from files, and the batches that the lecture's script draws."""

from __future__ import annotations

import array
import os
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bigramx import memory, ops, storage
from bigramx.locks import without_warnings
from bigramx.shards import DTYPES, Shard, TokenShards, check_shard, checked_fraction
from bigramx.token_files import AnyPath, are_tokens, files_of, is_any_path, open_bin, open_tokens, read_meta
from bigramx.tokenizer import CharTokenizer, Tokenizer, adapt

__all__ = [
    "NanoGPT",
    "TokenShards",
    "default_text",
    "documents",
    "get_batch",
    "read_bin",
    "read_meta",
    "read_nanogpt",
    "read_text",
    "read_tokens",
    "split",
]

_Tokens = TypeVar("_Tokens", Tensor, TokenShards)

_TOP = "paths"  # the name of read_tokens' argument
_CHUNK = 2**18  # tokens that are read at once
_DTYPE_OF_SIZE = {2**8: torch.uint8, 2**16: torch.uint16, 2**31: torch.int32, 2**63: torch.int64}  # of a vocabulary
_MAX_COUNTS = 2**27  # entries, of 8 bytes: 1 GB


def shards_of(tokens: Tensor | TokenShards) -> tuple[Tensor, ...]:
    """The sequences of tokens, (N) each, within which pairs are."""
    return tokens.shards if isinstance(tokens, TokenShards) else (tokens,)


def num_pairs(tokens: Tensor | TokenShards) -> int:
    """How many pairs of a token and the next there are, none of which crosses from one shard or document to another."""
    total, eot = sum(max(0, shard.numel() - 1) for shard in shards_of(tokens)), getattr(tokens, "eot", None)
    if eot is None:
        return total
    return total - sum(int((chunk == eot).sum()) for shard in shards_of(tokens) for _n, chunk in chunks(shard[:-1]))


def check_tokens(tokens: Tensor | TokenShards) -> None:
    """Raises a RuntimeError where ``tokens`` are not 1-D, or not uint8, uint16, uint32, int32 or int64."""
    for shard in shards_of(tokens):
        check_shard(shard)


def are_worth_counting(tokens: Tensor | TokenShards, vocab_size: int) -> bool:
    """Whether a table of pair counts, (V, V), is small compared with ``tokens``, (N), and takes 1 GB at most."""
    return 4 * vocab_size**2 <= len(tokens) and vocab_size**2 <= _MAX_COUNTS


def chunks(tokens: Tensor | TokenShards) -> Iterator[tuple[int, Tensor]]:
    """The tokens, a part at a time, and the position of its first: so few that a copy in int64 takes 2 MB."""
    for begin in range(0, len(tokens), _CHUNK):
        yield begin, tokens[begin : begin + _CHUNK].long()


def check_range(tokens: Tensor | TokenShards, vocab_size: int) -> None:
    """Raises an IndexError where a token is out of range: it names the first such and its position."""
    for begin, chunk in chunks(tokens):
        smallest, largest = chunk.aminmax()
        if smallest < 0 or largest >= vocab_size:
            n = int(((chunk < 0) | (chunk >= vocab_size)).nonzero()[0])
            raise IndexError(
                f"tokens holds {int(chunk[n])} at position {begin + n}, expected 0 <= token < {vocab_size}"
            )


def token_range(tokens: Tensor | TokenShards) -> tuple[int, int]:
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


def read_bin(path: AnyPath, dtype: torch.dtype | str | None = None) -> Tensor:
    """The tokens of one ``.bin`` file, memory-mapped, (N).

    NanoGPT's have no header, and hold uint16; llm.c's and FineWeb's say whether they hold uint16 or uint32. All are
    little-endian. What begins as a file of another kind does is refused: a ``numpy.memmap`` of it is taken as it is.

    Pages are read on first access; the file is never written. It must not be cut short while the tokens are in use: the
    system would end the process (SIGBUS). One that is replaced, as ``storage.write_with`` does, stays as it was.

    Args:
        path: The file.
        dtype: uint8, uint16, uint32, int32 or int64: what it holds. None: what its header says, without one uint16.

    Raises:
        ValueError: The file is empty or of an odd size, or its header is unknown, or disagrees with the file or with
            ``dtype``.
        OSError: It cannot be read, or is no regular file.
    """
    return open_bin(path, _dtype_of(dtype)).tokens


def read_tokens(
    paths: Any, *, tokenizer: Any = None, dtype: torch.dtype | str | None = None, eot: int | None = None
) -> TokenShards:
    """Tokens of files, or of memory, as one lazy sequence of shards.

    Files are memory-mapped, stay on their disk, and must not be cut short meanwhile (see ``read_bin``). A folder stands
    for the files in it and its folders, a pattern (``fineweb_train_*.bin``, ``corpus/**/*.txt``) for those that match,
    both in the order of their names; what is hidden is left out. By its name a file is

    - ``.bin``: tokens, of nanoGPT without a header, or of llm.c and FineWeb with one (see ``read_bin``);
    - ``.npy``: a NumPy array, 1-D;
    - any other: UTF-8 text, which the tokenizer encodes.

    Of a folder that has files of tokens these alone are read; of another what is text, with a warning if there is more.

    Args:
        paths: A path, folder or pattern; or tokens: a Tensor, a NumPy array or memmap, a list of ints, a column of a
            Hugging Face dataset, TokenShards; or a sequence of these. Where there are two dimensions (rows of an array,
            lists in a list) each row is a shard of its own, as is each text of a column.
        tokenizer: Encodes texts, each a shard: anything that ``tokenizer.adapt`` takes.
        dtype: uint8, uint16, uint32, int32 or int64: what ``.bin`` files without a header hold, and the rest must.
        eot: The token that ends a document.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file holds something else, or not what its header says, or tokens of another dtype than ``dtype``;
            or it is a text, and there is no tokenizer.
        TypeError: ``paths`` is something else.
        RuntimeError: A Tensor or an array has more than two dimensions, or holds no integers.
        OSError: A file cannot be read, or is no regular file.
        MemoryError: A text is too large.

    Warns:
        UserWarning: Files of a folder are no texts, and left out.
    """
    reader = _Reader(tokenizer, _dtype_of(dtype))
    return TokenShards.of(reader.shards(paths, _TOP), eot)


class _Reader:
    """Makes shards of what ``read_tokens`` is given."""

    def __init__(self, tokenizer: Any, dtype: torch.dtype | None) -> None:
        self._tokenizer = None if tokenizer is None else adapt(tokenizer)
        self._dtype = dtype

    def shards(self, source: Any, name: str) -> Iterator[Shard]:
        """Those of anything; ``name`` is what errors call it where it has no path."""
        if is_any_path(source):
            yield from map(self._of_file, files_of(source))
        elif isinstance(source, TokenShards):
            yield from source.parts
        elif isinstance(source, Tensor):
            yield from self._rows(source, name)
        elif (column := _arrow_of(source)) is not None:
            yield from self._of_arrow(column, name)
        elif hasattr(source, "__array__"):
            yield from self._of_array(source, name)
        elif isinstance(source, array.array):
            yield from self._rows(_of_buffer(source), name)
        elif isinstance(source, range):
            memory.check_room(8 * len(source), f"{name}, a range,")
            yield self._stored(torch.arange(source.start, source.stop, source.step, device="cpu"), name)
        elif isinstance(source, (Sequence, Iterator)) and not hasattr(source, "read"):
            yield from self._of_items(list(source), name)
        else:
            raise TypeError(f"expected {name} to be a path, tokens or a sequence of these, got {type(source).__name__}")

    def _of_file(self, path: str) -> Shard:
        if are_tokens(path):
            return open_tokens(path, self._dtype)
        if self._tokenizer is None:
            storage.open_to_read(path).close()  # raises if there is none
            raise ValueError(f"{storage.name_of(path)}: expected a tokenizer for a text, or a .bin or .npy file")
        return self._encoded(read_text(path), path, self._tokenizer)

    def _encoded(self, text: str, name: str, tokenizer: Tokenizer) -> Shard:
        printable = storage.printable(name)
        if isinstance(tokenizer, CharTokenizer):
            memory.check_room(8 * len(text), f"{printable}: encoding {len(text):,} characters")
        try:
            tokens = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"{printable}: {error}") from None
        dtype = self._dtype or next(dtype for size, dtype in _DTYPE_OF_SIZE.items() if tokenizer.vocab_size <= size)
        return Shard(_converted(tokens, dtype, name), name, num_bytes=_num_bytes(text))

    def _stored(self, tokens: Tensor, name: str) -> Shard:
        """A shard of tokens, (N) int64, that no one else holds."""
        return Shard(_converted(tokens, self._dtype or torch.int64, name), name)

    def _rows(self, tokens: Tensor, name: str) -> Iterator[Shard]:
        """A shard of the tokens as they are, or one for each of their rows."""
        tokens = _unsigned(tokens, name)
        if tokens.dim() == 2:
            for k, row in enumerate(tokens):
                yield from self._rows(row, f"{name}[{k}]")
            return
        check_shard(tokens)
        if self._dtype not in (None, tokens.dtype):
            raise ValueError(f"expected {name} to hold {_name(self._dtype)} tokens, got {_name(tokens.dtype)}")
        yield Shard(tokens, name)

    def _of_array(self, source: Any, name: str) -> Iterator[Shard]:
        import numpy

        values = numpy.asarray(source)
        if values.dtype == object:  # of rows of different lengths
            yield from self._of_items(list(values), name)
        else:
            yield from self._rows(_tensor_of(values), name)

    def _of_arrow(self, column: Any, name: str) -> Iterator[Shard]:
        """Of integers, or of lists of them, each a shard, in the memory of the column; or of texts to be encoded."""
        first, has_rows = 0, "list" in str(column.type)
        if self._tokenizer is not None and "string" in str(column.type) and not has_rows and column.null_count == 0:
            for k, text in enumerate(column):
                yield self._encoded(text.as_py(), f"{name}[{k}]", self._tokenizer)
            return
        if not has_rows and hasattr(column, "chunks"):  # one sequence, however many chunks it is stored in
            memory.check_room(column.nbytes, f"{name}, {len(column):,} tokens,")
            column = column.combine_chunks()
        for chunk in getattr(column, "chunks", [column]):
            try:
                values = _tensor_of((chunk.flatten() if has_rows else chunk).to_numpy())
            except (ValueError, TypeError, NotImplementedError):
                values = None
            if values is None or chunk.null_count > 0:
                raise TypeError(f"expected {name} to hold integers or lists of them, without nulls, got {chunk.type}")
            if not has_rows:
                yield from self._rows(values, name)
                continue
            values = _unsigned(values, name)
            for k, row in enumerate(values.split(chunk.value_lengths().to_pylist())):
                yield from self._rows(row, f"{name}[{first + k}]")
            first += len(chunk)

    def _of_items(self, items: list[Any], name: str) -> Iterator[Shard]:
        if not items and name == _TOP:
            raise ValueError(f"expected {name} to be paths or tokens, got none")
        kinds: set[type] = set(map(type, items))
        if bool not in kinds and all(issubclass(kind, Integral) for kind in kinds):
            yield self._stored(torch.tensor(items, dtype=torch.int64, device="cpu"), name)
            return
        for k, item in enumerate(items):
            yield from self.shards(item, f"{name}[{k}]")


def _num_bytes(text: str) -> int:
    """Of the text in UTF-8."""
    return sum(len(text[k : k + _CHUNK].encode("utf-8", "surrogatepass")) for k in range(0, len(text), _CHUNK))


def _arrow_of(source: Any) -> Any:
    """The pyarrow array of a column of a Hugging Face dataset, or one itself; None of what is none."""
    kind = type(source).__module__.partition(".")[0]
    if kind == "pyarrow" and hasattr(source, "null_count"):
        return source
    if kind != "datasets" or not hasattr(source, "column_name"):
        return None
    dataset = source.source
    if not hasattr(dataset, "with_format") or dataset.format["type"] == "custom":  # nested, or computed
        return None
    return dataset.with_format("arrow")[:][source.column_name]


def _tensor_of(values: Any) -> Tensor:
    """The tensor of a NumPy array, in its memory."""
    with without_warnings():  # that it must not be written
        return torch.from_numpy(values)


def _of_buffer(source: array.array[Any]) -> Tensor:
    code = source.typecode
    if code not in "bBhHiIlLqQ":
        raise TypeError(f"expected an array of integers, got one of type code {code!r}")
    dtype = getattr(torch, f"{'u' if code.isupper() else ''}int{8 * source.itemsize}")
    return torch.frombuffer(source, dtype=dtype) if source else torch.empty(0, dtype=dtype, device="cpu")


def _unsigned(tokens: Tensor, name: str) -> Tensor:
    """Tokens of the other integer dtypes, in their memory, as of one that tokens have.

    Raises:
        IndexError: One is negative, or of 64 bits.
    """
    dtype = {torch.int8: torch.uint8, torch.int16: torch.uint16, torch.uint64: torch.int64}.get(tokens.dtype)
    if dtype is None:
        return tokens
    for part in tokens.flatten().split(_CHUNK):
        if part.numel() > 0 and (least := int(part.long().min())) < 0:
            value = least if dtype != torch.int64 else least + 2**64
            raise IndexError(f"{name} holds {value}, expected 0 <= token < 2^63")
    return tokens.view(dtype)


def _converted(tokens: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tokens in this dtype.

    Raises:
        ValueError: It does not hold them.
    """
    if tokens.dtype == dtype or tokens.numel() == 0:
        return tokens.to(dtype)
    smallest, largest = token_range(tokens)
    limits = torch.iinfo(dtype)
    if smallest < limits.min or largest > limits.max:
        value = smallest if smallest < limits.min else largest
        raise ValueError(f"{storage.printable(name)}: expected {_name(dtype)} tokens, got {value}")
    return tokens.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that tokens have, of its name as well."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(f"expected dtype to be a torch.dtype or its name, got {dtype!r}")
    if found not in DTYPES:
        raise ValueError(f"expected dtype to be uint8, uint16, uint32, int32 or int64, got {found}")
    return found


class NanoGPT(NamedTuple):
    """What a folder of nanoGPT's holds."""

    train: TokenShards
    val: TokenShards | None  # None: there is no val.bin
    tokenizer: CharTokenizer | None  # None: there is no meta.pkl, as where the tokens are GPT-2's


def read_nanogpt(folder: AnyPath, *, dtype: torch.dtype | str | None = None, eot: int | None = None) -> NanoGPT:
    """A folder that a ``prepare.py`` of nanoGPT's made: ``train.bin``, ``val.bin`` and, of characters, ``meta.pkl``.

    Nothing in the pickle is executed: see ``read_meta``.

    Args:
        folder: Its path.
        dtype: What the files hold; None: uint16, or what their headers say.
        eot: The token that ends a document.

    Raises:
        FileNotFoundError: There is no ``train.bin``.
        ValueError: A file holds something else.
        OSError: One cannot be read, or is no regular file.
    """
    train, val, meta = (os.path.join(os.fsdecode(folder), name) for name in ("train.bin", "val.bin", "meta.pkl"))
    return NanoGPT(
        read_tokens(train, dtype=dtype, eot=eot),
        read_tokens(val, dtype=dtype, eot=eot) if os.path.lexists(val) else None,
        read_meta(meta) if os.path.lexists(meta) else None,
    )


def documents(tokens: Tensor | TokenShards, eot: int | None = None) -> Iterator[Tensor]:
    """The positions where documents begin, (n) int64, in ascending order and a part at a time.

    A document begins where a shard does, and after each ``eot``, which ends the one before it.

    Args:
        tokens: (N) tokens, or TokenShards, whose ``eot`` is taken if none is given.
        eot: The token that ends a document. None: only shards are documents.
    """
    eot = getattr(tokens, "eot", None) if eot is None else eot
    begin = 0
    for shard in shards_of(tokens):
        if shard.numel() > 0:
            yield torch.tensor([begin], device=shard.device)
        if eot is not None:
            for n, chunk in chunks(shard[:-1]):
                begins = (chunk == eot).nonzero()[:, 0] + (begin + n + 1)
                if begins.numel() > 0:
                    yield begins
        begin += shard.numel()


def split(tokens: _Tokens, train_fraction: float | None = None) -> tuple[_Tokens, _Tokens]:
    """The first part of the tokens for training and the rest for validation; views, as in the lecture.

    Args:
        tokens: (N) tokens, or TokenShards.
        train_fraction: How large the first part is. None: 0.9; or, of TokenShards, as their files are named.

    Raises:
        ValueError: ``train_fraction`` is not between 0 and 1.
    """
    if isinstance(tokens, TokenShards):
        return tokens.split(train_fraction)
    n = int(checked_fraction(train_fraction) * len(tokens))
    return tokens[:n], tokens[n:]


def get_batch(
    tokens: Tensor | TokenShards,
    batch_size: int,
    block_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Random blocks and the token that follows each of theirs, drawn as in the lecture's get_batch.

    Args:
        tokens: (N) uint8, uint16, uint32, int32 or int64, N > block_size; or TokenShards, from which the batches are
            those of the concatenated tokens, and a block may be of two shards.
        batch_size: B.
        block_size: T.
        generator: Where the randomness comes from; None: PyTorch's default generator of the CPU, so that the batches
            are the same on every device. A generator on a GPU draws there, anew at each replay of a captured graph,
            which no other can be part of.
        device: Where the batch goes; None: where the tokens are. From tokens in the host's memory, files that are
            mapped included, it goes to a GPU through pinned memory, and the host does not wait for it.

    Returns:
        idx, targets, (B, T) int64 each, contiguous; ``targets`` is ``idx`` shifted by one token.

    Raises:
        RuntimeError: ``tokens`` is not 1-D, or of another dtype; a CUDA graph captures what the CPU draws; or there is
            no such device.
        ValueError: A size is not positive, or there are too few tokens for one block.
        TypeError: An argument is of the wrong type.
    """
    place = None if device is None else torch.device(device)  # first: a wrong one shall draw nothing
    if isinstance(tokens, TokenShards) and len(tokens.shards) == 1:
        (tokens,) = tokens.shards
    if isinstance(tokens, TokenShards):
        idx, targets = _gather_batch(tokens, batch_size, block_size, generator)
    else:
        idx, targets = ops.get_batch(tokens, batch_size, block_size, generator)
    return (idx, targets) if place is None else (_moved(idx, place), _moved(targets, place))


def _gather_batch(
    tokens: TokenShards, batch_size: int, block_size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    # The op's errors, and its results to be filled: it is given as many tokens in no memory.
    stand_in = torch.zeros((), dtype=torch.uint8, device=tokens.device).expand(len(tokens))
    idx, targets = ops.get_batch(stand_in, batch_size, block_size, torch.Generator())
    offsets = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator, device="cpu")
    blocks = torch.stack([tokens[offset : offset + block_size + 1] for offset in offsets.tolist()])
    return idx.copy_(blocks[:, :-1]), targets.copy_(blocks[:, 1:])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device. PyTorch keeps pinned memory for the next, once a copy from it has ended."""
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
