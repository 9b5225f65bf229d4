"""The files that hold tokens: nanoGPT's and llm.c's .bin, NumPy's .npy, and nanoGPT's vocabulary."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from typing import IO, TypeGuard

import torch

from bigramx import storage
from bigramx.shards import DTYPES, Shard, TokenFile

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_HEADER = 1024  # bytes: 256 numbers of 32 bits; magic number, version, number of tokens, the rest is reserved
_VERSIONS = {20240520: (1, torch.uint16), 20240801: (7, torch.uint32)}  # llm.c's, of GPT-2's and of Llama 3's tokens
_OTHERS = {20240326: "a model", 20240327: "a debugging state", 20240328: "a tokenizer", 20240522: "an evaluation"}
_SIGNATURES = {b"\x93NUMPY": "a NumPy array, expected to be named .npy", b"PK\x03\x04": "a zip archive"}
_SUFFIXES = (".bin", ".npy")


def is_any_path(source: object) -> TypeGuard[AnyPath]:
    """Whether it is a path, and no tokens."""
    return isinstance(source, (str, bytes, os.PathLike))


def are_tokens(path: str) -> bool:
    """Whether a file of this name holds tokens, not text."""
    return path.lower().endswith(_SUFFIXES)


def files_of(path: AnyPath) -> list[str]:
    """The files that a path names: a file, those in a folder and its folders, or those that match a pattern; sorted.

    Of a folder with files of tokens these alone. Files and folders whose names begin with a dot are left out.

    Raises:
        FileNotFoundError: There is none.
    """
    name = os.fsdecode(path)
    if os.path.isdir(name):
        found = list(_walk(name, frozenset()))
        found = [file for file in found if are_tokens(file)] or found
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


def open_tokens(path: AnyPath, dtype: torch.dtype | None = None) -> Shard:
    """The tokens of a .bin or .npy file, memory-mapped.

    Raises:
        ValueError: The file holds something else, or not what its header says, or tokens of another dtype.
        OSError: It cannot be read, or is no regular file.
    """
    with storage.open_to_read(path) as file:  # type: ignore[arg-type]
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file, got a pipe", os.fsdecode(path))
        read = _npy_tokens if os.fsdecode(path).lower().endswith(".npy") else _bin_tokens
        try:
            tokens = read(file, os.fsdecode(path), status.st_size, dtype)
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
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"expected version 1.0 or 2.0 of a NumPy file, got {version[0]}.{version[1]}")
    shape, _order, numpy_dtype = readers[version](file)
    if len(shape) != 1:
        raise ValueError(f"expected tokens to be 1-D, got shape {shape}")
    of_header = getattr(torch, numpy_dtype.name, None) if numpy_dtype.kind in "iu" else None
    if of_header not in DTYPES or numpy_dtype.str.startswith(">"):
        raise ValueError(f"expected uint8, uint16, uint32, int32 or int64, little-endian, got {numpy_dtype.str}")
    offset = file.tell()
    num_bytes = offset + shape[0] * of_header.itemsize
    if num_bytes != size:
        raise ValueError(f"expected the {shape[0]} tokens of its header in {num_bytes} bytes, got {size} bytes")
    _check_dtype(of_header, dtype)
    return TokenFile.of(file, path, of_header, offset, shape[0])


def _check_dtype(of_header: torch.dtype, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != of_header:
        raise ValueError(f"expected {_name(dtype)} tokens, got {_name(of_header)} tokens by its header")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
