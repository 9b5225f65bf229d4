"""The files that hold tokens: nanoGPT's and llm.c's .bin, NumPy's .npy, and nanoGPT's vocabulary."""

from __future__ import annotations

import codecs
import errno
import glob
import os
import pickletools
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeGuard

import torch

from bigramx import storage
from bigramx.locks import without_warnings
from bigramx.shards import Shard, TokenFile
from bigramx.tokenizer import CharTokenizer

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_HEADER = 1024  # bytes: 256 numbers of 32 bits; magic number, version, number of tokens, the rest is reserved
_VERSIONS = {20240520: (1, torch.uint16), 20240801: (7, torch.uint32)}  # llm.c's, of GPT-2's and of Llama 3's tokens
_OTHERS = {20240326: "a model", 20240327: "a debugging state", 20240328: "a tokenizer", 20240522: "an evaluation"}
_SIGNATURES = {b"\x93NUMPY": "a NumPy array, expected to be named .npy", b"PK\x03\x04": "a zip archive"}
_SUFFIXES = (".bin", ".npy")
_BEGIN = 2**13  # bytes by which text is told from other files
_NPY_DTYPES = {"|u1": torch.uint8, "<u2": torch.uint16, "<u4": torch.uint32, "<i4": torch.int32, "<i8": torch.int64}

_MOST_OPCODES, _MOST_BYTES = 2**21, 2**25  # of a pickled vocabulary: there are fewer characters


def is_any_path(source: object) -> TypeGuard[AnyPath]:
    """Whether it is a path, and no tokens."""
    return isinstance(source, (str, bytes, os.PathLike))


def are_tokens(path: str) -> bool:
    """Whether a file of this name holds tokens, not text."""
    return path.lower().endswith(_SUFFIXES)


def files_of(path: AnyPath) -> list[str]:
    """The files that a path names: a file, those in a folder and its folders, or those that match a pattern; sorted.

    Of a folder with files of tokens these alone, of another what seems to be text. Files and folders whose names begin
    with a dot are left out.

    Raises:
        FileNotFoundError: There is none.

    Warns:
        UserWarning: Files of a folder are no texts.
    """
    name = os.fsdecode(path)
    if os.path.isdir(name):
        files = list(_walk(name, frozenset()))
        found = [file for file in files if are_tokens(file)] or [file for file in files if _seems_text(file)]
        if found and not are_tokens(found[0]) and len(found) < len(files):
            others = sorted(set(files) - set(found))
            warnings.warn(
                f"{storage.printable(name)}: {len(others):,} files that are no UTF-8 text are left out, the first "
                f"{storage.printable(others[0])}",
                stacklevel=2,
            )
    elif not os.path.lexists(name) and glob.has_magic(name):
        found = sorted(file for file in glob.iglob(name, recursive=True) if not os.path.isdir(file))
    else:
        return [name]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no file is there", name)
    return found


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    """The files in a folder and its folders; links are followed, but for those to folders around them."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, above | {real})
        else:
            yield entry.path


def _seems_text(path: str) -> bool:
    """Whether a file begins as UTF-8 text does."""
    with storage.open_to_read(path) as file:
        begin = file.read(_BEGIN)
    try:
        return b"\0" not in begin and codecs.getincrementaldecoder("utf-8")().decode(begin) is not None
    except UnicodeDecodeError:
        return False


def open_tokens(path: AnyPath, dtype: torch.dtype | None = None) -> Shard:
    """The tokens of a .bin or .npy file, memory-mapped.

    Raises:
        ValueError: The file holds something else, or not what its header says, or tokens of another dtype.
        OSError: It cannot be read, or is no regular file.
    """
    return (open_npy if os.fsdecode(path).lower().endswith(".npy") else open_bin)(path, dtype)


def open_bin(path: AnyPath, dtype: torch.dtype | None = None) -> Shard:
    """``open_tokens``, of a file with llm.c's header or none, whatever its name is."""
    return _open(path, dtype, _bin_tokens)


def open_npy(path: AnyPath, dtype: torch.dtype | None = None) -> Shard:
    """``open_tokens``, of a NumPy file."""
    return _open(path, dtype, _npy_tokens)


def _open(
    path: AnyPath, dtype: torch.dtype | None, find: Callable[[IO[bytes], str, int, torch.dtype | None], TokenFile]
) -> Shard:
    with storage.open_to_read(path) as file:  # type: ignore[arg-type]
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file, got a pipe", os.fsdecode(path))
        try:
            tokens = find(file, os.fsdecode(path), status.st_size, dtype)
        except ValueError as error:
            raise ValueError(f"{storage.name_of(path)}: {error}") from None  # type: ignore[arg-type]
        return Shard(tokens.map(file), os.fsdecode(path), tokens)


def _bin_tokens(file: IO[bytes], path: str, size: int, dtype: torch.dtype | None) -> TokenFile:
    begin = file.read(_HEADER)
    for signature, kind in _SIGNATURES.items():
        if begin.startswith(signature):
            raise ValueError(f"expected tokens, got {kind}")
    magic, version, num_tokens, *_reserved = numbers = _int32s(begin.ljust(12, b"\0"))
    if magic not in _VERSIONS:
        if _is_header(numbers, begin):
            kind = _OTHERS.get(magic, "another kind of file")
            raise ValueError(f"expected tokens, got the header of {kind}, magic number {magic}")
        return _headerless(file, path, size, dtype or torch.uint16)
    expected, of_header = _VERSIONS[magic]
    if version != expected:
        raise ValueError(f"expected version {expected} of the magic number {magic}, got {version}")
    num_bytes = _HEADER + num_tokens * of_header.itemsize
    if num_tokens < 0 or num_bytes != size:
        raise ValueError(f"expected the {num_tokens} tokens of its header in {num_bytes} bytes, got {size} bytes")
    _check_dtype(of_header, dtype)
    return TokenFile.of(file, path, of_header, _HEADER, num_tokens)


def _headerless(file: IO[bytes], path: str, size: int, dtype: torch.dtype) -> TokenFile:
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"expected a file of {_name(dtype)} tokens, got {size} bytes")
    return TokenFile.of(file, path, dtype, 0, size // dtype.itemsize)


def _int32s(content: bytes) -> list[int]:
    return [int.from_bytes(content[k : k + 4], "little", signed=True) for k in range(0, len(content) - 3, 4)]


def _is_header(numbers: list[int], begin: bytes) -> bool:
    """Whether a file begins with a header in the manner of llm.c.

    Its magic number is a date, in either byte order; or it is a large number, and the reserved numbers are all 0.
    """
    swapped = int.from_bytes(begin[:4], "big", signed=True)
    if _is_date(numbers[0]) or _is_date(swapped):
        return True
    return len(begin) == _HEADER and abs(numbers[0]) >= 2**16 and not any(numbers[8:])


def _is_date(number: int) -> bool:
    """Of the years in which there may be such files."""
    return 2023 <= number // 10_000 < 2040 and 1 <= number // 100 % 100 <= 12 and 1 <= number % 100 <= 31


def _npy_tokens(file: IO[bytes], path: str, size: int, dtype: torch.dtype | None) -> TokenFile:
    shape, numpy_dtype = _npy_header(file)
    if len(shape) != 1:
        raise ValueError(f"expected tokens to be 1-D, got shape {shape}")
    of_header = _NPY_DTYPES.get(numpy_dtype)
    if of_header is None:
        raise ValueError(f"expected the dtype to be one of {', '.join(_NPY_DTYPES)}, got {numpy_dtype}")
    offset = file.tell()
    num_bytes = offset + shape[0] * of_header.itemsize
    if shape[0] < 0 or num_bytes != size:
        raise ValueError(f"expected the {shape[0]} tokens of its header in {num_bytes} bytes, got {size} bytes")
    if offset % of_header.itemsize:
        raise ValueError(f"expected the tokens to begin at a multiple of {of_header.itemsize} bytes, got {offset}")
    _check_dtype(of_header, dtype)
    return TokenFile.of(file, path, of_header, offset, shape[0])


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], str]:
    """The shape and the dtype of a NumPy file, which is left where its array begins."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with without_warnings():  # it parses Python
            shape, _is_fortran, dtype = readers[npy.read_magic(file)](file)
        return shape, dtype.str
    except Exception as error:
        raise ValueError(f"not a NumPy file of version 1 or 2 ({type(error).__name__})") from None


def _check_dtype(of_header: torch.dtype, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != of_header:
        raise ValueError(f"expected {_name(dtype)} tokens, got {_name(of_header)} tokens by its header")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_meta(path: AnyPath) -> CharTokenizer:
    """The characters of nanoGPT's ``meta.pkl``.

    It is a pickle, which nobody should load from a stranger: unpickling calls whatever the file names. Here its opcodes
    are read one by one, and those that make dicts, lists, tuples, strings and ints are all that is understood.

    Raises:
        ValueError: The file holds something else.
        OSError: It cannot be read, or is no regular file.
    """
    with storage.open_to_read(path) as file:  # type: ignore[arg-type]
        content = file.read(_MOST_BYTES + 1)
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"expected a vocabulary of {_MOST_BYTES} bytes at most")
        return _characters_in(_plain_unpickled(content))
    except ValueError as error:
        raise ValueError(f"{storage.name_of(path)}: {error}") from None  # type: ignore[arg-type]


def _characters_in(meta: object) -> CharTokenizer:
    entries = meta if type(meta) is dict else {}
    itos, stoi = entries.get("itos"), entries.get("stoi")
    if type(itos) is not dict or type(stoi) is not dict:
        raise ValueError("expected a vocabulary of nanoGPT: a dict with stoi and itos")
    characters: list[Any] = [itos.get(token) for token in range(len(itos))]
    if not all(type(character) is str and len(character) == 1 for character in characters):
        raise ValueError("expected itos to have one character for each of the tokens from 0 on")
    tokens = {character: token for token, character in enumerate(characters)}
    if stoi != tokens or not all(type(token) is int for token in stoi.values()) or len(tokens) != len(itos):
        raise ValueError("expected stoi to be the inverse of itos")
    if entries.get("vocab_size", len(itos)) != len(itos):
        raise ValueError("expected vocab_size to be the number of characters")
    return CharTokenizer("".join(characters))


def _plain_unpickled(content: bytes) -> object:
    """What a pickle of dicts, lists, tuples, strings and ints holds."""
    reader = _PlainUnpickler()
    try:
        for count, (opcode, argument, _position) in enumerate(pickletools.genops(content)):
            if count == _MOST_OPCODES:
                raise ValueError(f"expected {_MOST_OPCODES} opcodes at most")
            if reader.step(opcode.name, argument):
                return reader.result()
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a sound pickle ({type(error).__name__})") from None
    raise ValueError("not a sound pickle")


class _PlainUnpickler:
    """A pickle machine without the opcodes that import, call or set state: one stack, its marks and the memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> bool:
        """Does what an opcode says; returns whether it is the last.

        Raises:
            ValueError: It is none of those that are understood.
        """
        if name in ("PROTO", "FRAME"):
            pass
        elif name in ("INT", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
            self._stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            self._stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("DICT", "LIST", "TUPLE"):
            items = self._pop_to(self._marks.pop())
            self._stack.append(self._dict(items) if name == "DICT" else items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._stack.append(tuple(self._pop_to(len(self._stack) - int(name[-1]))))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_to(len(self._stack) - 2 if name == "SETITEM" else self._marks.pop())
            self._top().update(self._dict(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop_to(len(self._stack) - 1 if name == "APPEND" else self._marks.pop())
            self._top().extend(items)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "STOP":
            return True
        else:
            raise ValueError(f"expected a pickle of dicts, strings and ints, got the opcode {name}")
        return False

    def result(self) -> object:
        """What is left, alone, when the last opcode is done."""
        if self._marks or len(self._stack) != 1:
            raise IndexError
        return self._stack[0]

    def _top(self) -> Any:
        self._check_size(len(self._stack) - 1)
        return self._stack[-1]

    def _check_size(self, size: int) -> None:
        """Raises where so few things are left that some below the last mark are taken."""
        if size < (self._marks[-1] if self._marks else 0):
            raise IndexError

    def _pop_to(self, size: int) -> list[Any]:
        """Takes what is on the stack above the first ``size``."""
        self._check_size(size)
        items = self._stack[size:]
        del self._stack[size:]
        return items

    @staticmethod
    def _dict(items: list[Any]) -> dict[Any, Any]:
        """Keys and values by turns. Nested tuples as keys would take exponential time to hash, or all of the stack."""
        if not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError("expected the keys of dicts to be strings or ints")
        return dict(zip(items[::2], items[1::2], strict=True))
