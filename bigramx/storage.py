"""Atomic writes of files, and safetensors files with checksums."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

_FORMAT = "bigramx"
_HEADER_CHECKSUM = "crc32"


def write_with(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Lets ``write`` write a temporary file next to ``path``, syncs it, and renames it to ``path``.

    If the process is killed, the old or the new file is there, whole: the rename is atomic and comes after the sync.
    Links are followed, and the file keeps its permissions.
    """
    target = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, _mode_of(target))
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        _sync(target.parent)


def _sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode_of(target: Path) -> int:
    """The permissions of the file, or those that open() would give a new one."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    write_with(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes one safetensors file: the tensors, ``kind``, the metadata, and checksums of all of these."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**metadata, "format": _FORMAT, "kind": kind}
    header |= {f"crc32.{name}": str(checksum(tensor)) for name, tensor in tensors.items()}
    header[_HEADER_CHECKSUM] = _header_checksum(header)
    write_with(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=header))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what ``write_tensors`` wrote: the tensors, in memory of their own, and the metadata.

    Raises:
        ValueError: The file is damaged, cut short, or of another kind.
        OSError: It cannot be read.
    """
    name = os.fspath(path)
    with open(path, "rb"):
        pass  # a missing file raises its usual error
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT or header.get("kind") != kind:
                raise ValueError(f"{name}: not a {kind} that bigramx saved")
            # Cloned: safetensors returns the mapped file, which others may change or truncate.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name}: damaged, cut short, or no safetensors file ({error})") from None
    if header.get(_HEADER_CHECKSUM) != _header_checksum(header):
        raise ValueError(f"{name}: damaged: the checksum of the metadata does not match")
    for key, tensor in tensors.items():
        if header.get(f"crc32.{key}") != str(checksum(tensor)):
            raise ValueError(f"{name}: damaged: the checksum of {key} does not match")
    return tensors, header


def _header_checksum(header: dict[str, str]) -> str:
    entries = sorted(item for item in header.items() if item[0] != _HEADER_CHECKSUM)
    return str(zlib.crc32(json.dumps(entries).encode()))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor, read in place."""
    if tensor.numel() == 0:
        return 0
    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return zlib.crc32(raw)
