"""Files written whole or not at all, and safetensors files with checksums."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor
from torch.types import FileLike

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_FORMAT = "bigramx"
_HEADER_CHECKSUM = "crc32"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS, errno.EPERM, errno.EACCES}


def is_path(file: FileLike | IO[str]) -> TypeIs[str | os.PathLike[str]]:
    """Whether it is a path; otherwise it is a file object.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(file, (str, bytes, os.PathLike)):
        return True
    if hasattr(file, "read") or hasattr(file, "write"):
        return False
    raise TypeError(f"expected a path or a file object, got {type(file).__name__}")


def name_of(file: FileLike | IO[str]) -> str:
    """What errors call it: the path, or a file object's name, or its type."""
    if is_path(file):
        return os.fsdecode(file)
    name = getattr(file, "name", None)  # a number where the file was opened by its descriptor
    return name if isinstance(name, str) else type(file).__name__


def write_with(target: FileLike | IO[str], write: Callable[[IO[Any]], object]) -> None:
    """Lets ``write`` write the content of ``target``, a path or a file object, into the file that it is given.

    A file is replaced: ``write`` fills a temporary file next to it, which is synced and renamed. If the process is
    killed, the old or the new file is there, whole. Symbolic links are followed; the file keeps its permissions and its
    owner, but other hard links keep the old content.

    Where that is refused (a bind mount, a folder that may not be written to, an owner who must stay) the new content,
    complete in the temporary file, is copied over the old one, which is put back if the copying fails.

    Devices, pipes and file objects are written to as they are.

    Raises:
        OSError: The file cannot be written; an old one is unchanged.
        TypeError: ``target`` is neither a path nor a file object.
    """
    if is_path(target):
        path = os.fsdecode(target)
        with _naming(path):
            status = _status_of(path)
            if _is_replaceable(path, status):
                _replace(path, status, write)
            else:
                with open(path, "wb") as file:
                    write(file)
    elif isinstance(target, io.RawIOBase):  # one call of its write may write a part alone
        buffered = io.BufferedWriter(target)
        try:
            write(buffered)
        finally:
            buffered.detach()
    else:
        write(target)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors name the file, as those of write() and fsync() do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


def _status_of(path: str) -> os.stat_result | None:
    """None: there is no such file."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_replaceable(path: str, status: os.stat_result | None) -> bool:
    """Whether the path is that of an ordinary file, or of a new one."""
    if os.path.islink(path) and os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False  # what a process has open, /dev/stdout for one: it would not see another file
    return os.path.basename(path) != "" if status is None else stat.S_ISREG(status.st_mode)


def _replace(path: str, status: os.stat_result | None, write: Callable[[IO[bytes]], object]) -> None:
    real = os.path.realpath(path)
    if status is not None:
        open(path, "ab").close()  # raises where the file is write-protected, which renaming would not mind
    try:
        file = _create(os.path.dirname(real), 0o666 if status is None else 0o600)
    except OSError as error:
        if status is None:
            raise OSError(error.errno, error.strerror, path) from None
        file = _create(tempfile.gettempdir(), 0o600)
    try:
        with file:
            write(file)
            _sync(file)
        try:
            if status is not None:
                _inherit(file.name, real, status)
            os.replace(file.name, real)
        except OSError:
            _overwrite(path, file.name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
    _sync_folder(os.path.dirname(real))


def _create(folder: str, mode: int) -> IO[bytes]:
    """A new file with a name that no other has, which is short, however long that of the target is."""
    path = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    return open(path, "xb", opener=lambda path, flags: os.open(path, flags, mode))


def _inherit(new: str, old: str, status: os.stat_result) -> None:
    """Gives the new file the old one's owner, permissions and extended attributes."""
    created = os.stat(new)
    if (created.st_uid, created.st_gid) != (status.st_uid, status.st_gid):
        os.chown(new, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):  # refused by file systems that have none of these
        shutil.copystat(old, new)
    with contextlib.suppress(OSError):
        os.utime(new)


def _overwrite(path: str, new: str) -> None:
    """Copies the bytes of the new file over those at ``path``; undone where it fails."""
    exists = os.path.exists(path)
    with (
        open(new, "rb") as content,
        tempfile.TemporaryFile() as old,
        open(path, "r+b" if exists else "x+b") as file,
    ):
        shutil.copyfileobj(file, old)
        try:
            _fill(file, content)
        except BaseException:
            if exists:
                _fill(file, old)
            else:
                os.unlink(path)
            raise


def _fill(file: IO[bytes], content: IO[bytes]) -> None:
    file.seek(0)
    content.seek(0)
    shutil.copyfileobj(content, file)
    file.truncate()
    _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:  # the others say that the data did not arrive
            raise


def _sync_folder(folder: str) -> None:
    """Makes the new name last, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(target: FileLike | IO[str], text: str) -> None:
    """Writes UTF-8 text, whole or not at all; a file object may be binary or one for text."""
    write_with(target, lambda file: _write_str(file, text))


def _write_str(file: IO[Any], text: str) -> None:
    try:
        file.write(text.encode())
    except TypeError:
        file.write(text)


def read(source: FileLike | IO[str]) -> bytes | str:
    """The content of a path or a file object; str if it is a file object for text."""
    if is_path(source):
        with open(source, "rb") as file:
            return file.read()
    return source.read()


def write_tensors(target: FileLike, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file: the tensors, ``kind``, the metadata, and checksums of all of these."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**metadata, "format": _FORMAT, "kind": kind}
    header |= {f"crc32.{name}": str(checksum(tensor)) for name, tensor in tensors.items()}
    header[_HEADER_CHECKSUM] = _header_checksum(header)
    write_with(target, lambda file: _write_safetensors(file, tensors, header))


def _write_safetensors(file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """As safetensors.torch.save_file, into any file object, with its errors, and without a copy of the tensors."""
    entries: dict[str, object] = {"__metadata__": metadata}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: expected a dtype that can be saved, got {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for _name, tensor in ordered:
        file.write(_bytes_of(tensor))


def read_tensors(source: FileLike, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what ``write_tensors`` wrote: the tensors, in memory of their own, and the metadata.

    A file object is read from where it stands to its end.

    Raises:
        ValueError: The file is damaged, cut short, or of another kind.
        OSError: It cannot be read.
    """
    name = name_of(source)
    try:
        with _mappable(source) as path, safetensors.safe_open(path, framework="pt") as file:
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


@contextlib.contextmanager
def _mappable(source: FileLike) -> Iterator[str]:
    """The path of a file with the content of the source that safetensors can map: ordinary, with a name in UTF-8."""
    with open(source, "rb") if is_path(source) else contextlib.nullcontext(source) as file:
        path = name_of(source)
        if is_path(source) and path.isprintable() and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "copy")
            with open(path, "wb") as copy:
                shutil.copyfileobj(file, copy)
            yield path


def _header_checksum(header: dict[str, str]) -> str:
    entries = sorted(item for item in header.items() if item[0] != _HEADER_CHECKSUM)
    return str(zlib.crc32(json.dumps(entries).encode()))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor, read in place."""
    return zlib.crc32(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    view: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return view
