"""Files written whole or not at all, and safetensors files with checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import resource
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx import memory

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
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MOST = 2**63 - 1  # what sizes and strides hold
_MOST_DIMS = 64  # as NumPy and PyTorch's own kernels
_MOST_HEADER = 100_000_000  # bytes, the format's own limit
_CHUNK = 2**20  # bytes that are read at once
_TEMPORARY = ".bigramx-"
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
    """What errors call it: the path, or a file object's name, or its type; printable."""
    if is_path(file):
        return printable(os.fsdecode(file))
    name = getattr(file, "name", None)  # a number where the file was opened by its descriptor
    return printable(name) if isinstance(name, str) else type(file).__name__


def printable(text: str) -> str:
    """The text with all that is no visible character escaped: control characters act on terminals and logs."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


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
                with open(path, "wb", opener=_open_to_write) as file:
                    write(file)
    elif isinstance(target, io.RawIOBase):  # one call of its write may write a part alone
        buffered = io.BufferedWriter(target)
        try:
            write(buffered)
        finally:
            buffered.detach()
    else:
        write(target)


def _open_to_write(path: str, flags: int) -> int:
    """A descriptor of a device or a pipe."""
    try:
        handle = _open_at_once(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO and stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(errno.ENXIO, "no process reads from this FIFO", path) from None
        raise
    os.set_blocking(handle, True)
    return handle


def check_writable(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Raises what saving so many bytes would raise, as far as that can be foretold; changes nothing.

    Raises:
        OSError: The file cannot be written, or there is no room for a new one.
    """
    path = os.fsdecode(path)
    with _naming(path):
        status = _status_of(path)
        if not _is_replaceable(path, status):
            open(path, "ab", opener=_open_to_write).close()
            return
        with _temporary(path, status) as file:
            room = os.statvfs(file.fileno())
        free = (room.f_bfree if os.geteuid() == 0 else room.f_bavail) * room.f_frsize
        if room.f_blocks > 0 and free < num_bytes:  # some file systems count no blocks
            raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes to write, {free:,} bytes free", path)
        limit, _most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY and limit < num_bytes:
            raise OSError(errno.EFBIG, f"{num_bytes:,} bytes to write, limited to {limit:,} bytes a file", path)


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
    if _is_open_in_process(path):
        return False  # which would not see another file
    return os.path.basename(path) != "" if status is None else stat.S_ISREG(status.st_mode)


def _is_open_in_process(path: str) -> bool:
    """Whether the path is that of a descriptor, such as /dev/stdout."""
    return os.path.islink(path) and os.path.abspath(path).startswith(("/dev/", "/proc/"))


def _replace(path: str, status: os.stat_result | None, write: Callable[[IO[bytes]], object]) -> None:
    real = os.path.realpath(path)
    with _temporary(path, status) as file:
        write(file)
        _sync(file)
        try:
            if status is not None:
                _inherit(file.name, real, status)
            os.replace(file.name, real)
        except OSError:
            _overwrite(path, file.name)
    _sync_folder(os.path.dirname(real))


@contextlib.contextmanager
def _temporary(path: str, status: os.stat_result | None) -> Iterator[IO[bytes]]:
    """A new file, next to that at ``path`` if possible, which is removed at the end if it still has its name."""
    if status is not None:
        open(path, "ab").close()  # raises where the file is write-protected, which renaming would not mind
    try:
        file = _create(os.path.dirname(os.path.realpath(path)), 0o666 if status is None else 0o600)
    except OSError as error:
        if status is None:
            raise OSError(error.errno, error.strerror, path) from None
        file = _create(tempfile.gettempdir(), 0o600)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # it is synced, or of no use
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def _create(folder: str, mode: int) -> IO[bytes]:
    """A new file with a name that no other has, which is short, however long that of the target is.

    It is locked as long as it is open: one that nobody holds locked was left by a process that was killed.
    """
    _remove_orphans(folder)
    while True:
        path = os.path.join(folder, f"{_TEMPORARY}{secrets.token_hex(8)}.tmp")
        file = open(path, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115, for the caller
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(path):
            return file
        file.close()  # another process removed it before it was locked


def _remove_orphans(folder: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_TEMPORARY) and entry.name.endswith(".tmp"):
                _remove_orphan(entry.path)


def _remove_orphan(path: str) -> None:
    with contextlib.suppress(OSError):  # it is locked, or gone, or another user's
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(handle)


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
    return read_file(source) if is_path(source) else source.read()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.

    Raises:
        OSError: It cannot be read, or is no regular file.
        MemoryError: It does not fit into memory.
    """
    with _opened(path) as file:
        try:
            _check_memory(_size_of(file) or 0)
            return file.read()
        except MemoryError as error:
            raise MemoryError(f"{name_of(path)}: {error}") from None


@contextlib.contextmanager
def _opened(source: FileLike) -> Iterator[IO[bytes]]:
    """A file object, or the file of a path, which errors name."""
    if is_path(source):
        with _naming(os.fsdecode(source)), open_to_read(source) as file:
            yield file
    else:
        yield source


def open_to_read(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file, or a pipe that the process has open, such as /dev/stdin; anything else might never end.

    Raises:
        OSError: It cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115, for the caller
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISFIFO(mode) and _is_open_in_process(os.fsdecode(path)):
        os.set_blocking(file.fileno(), True)
    elif not stat.S_ISREG(mode):
        file.close()
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device"
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}", os.fsdecode(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    """A descriptor; opening a FIFO would otherwise wait for a process at its other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)


def _size_of(file: IO[bytes]) -> int | None:
    """None: it is a pipe."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _check_memory(num_bytes: int) -> None:
    total = memory.total_memory(torch.device("cpu"))
    if total is not None and num_bytes > total:
        raise MemoryError(f"{num_bytes:,} bytes to read, and {total:,} bytes of memory in all")


def write_tensors(target: FileLike, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file: the tensors, ``kind``, the metadata, and checksums of all of these.

    Of tensors that another thread changes meanwhile, a file gets what a copy of them holds.

    Raises:
        RuntimeError: Another thread has changed a tensor, and ``target`` is no file, so what it has been given remains.
    """
    try:
        _write_tensors(target, kind, tensors, metadata)
    except _ChangedError:
        if not (is_path(target) and _is_replaceable(os.fsdecode(target), _status_of(os.fsdecode(target)))):
            raise
        _write_tensors(target, kind, {name: tensor.clone() for name, tensor in tensors.items()}, metadata)


class _ChangedError(RuntimeError):
    """Another thread has changed a tensor while it was written."""


def _write_tensors(target: FileLike, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
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
    if len(header) > _MOST_HEADER:
        raise ValueError(
            f"expected metadata of {_MOST_HEADER:,} bytes at most, the format's limit, got {len(header):,}"
        )
    file.write(len(header).to_bytes(8, "little") + header)
    for name, tensor in ordered:
        if str(_write_bytes(file, tensor)) != metadata[f"crc32.{name}"]:
            raise _ChangedError(f"{name}: expected a tensor that no other thread changes while it is saved")


def _write_bytes(file: IO[bytes], tensor: Tensor) -> int:
    """Writes the elements, and returns the CRC-32 of what it has written."""
    content, crc = _bytes_of(tensor), 0
    for begin in range(0, len(content), _CHUNK):
        chunk = bytes(content[begin : begin + _CHUNK])  # a copy, which nobody changes
        crc = zlib.crc32(chunk, crc)
        file.write(chunk)
    return crc


class Entry(NamedTuple):
    """A tensor as the header of a safetensors file describes it."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    num_bytes: int


def parse_header(content: bytes) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their data, and its metadata, from the JSON of its header.

    Raises:
        ValueError: It is none, or the tensors do not follow one another without holes.
    """
    try:
        header = json.loads(content.decode(), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are no strings")
    entries, position = [], 0
    for (begin, end), entry in sorted((_parse_entry(name, value) for name, value in header.items()), key=_offsets):
        if begin != position:
            raise ValueError(f"{_clipped(entry.name)}: the data begin at {begin}, expected {position}")
        entries.append(entry)
        position = end
    return entries, metadata


def _offsets(parsed: tuple[tuple[int, int], Entry]) -> tuple[int, int]:
    return parsed[0]


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _parse_entry(name: str, value: object) -> tuple[tuple[int, int], Entry]:
    """The offsets of a tensor's data, and what the header says of it."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_clipped(name)}: expected dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{_clipped(name)}: an unknown dtype")
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(shape) <= _MOST_DIMS and len(offsets) == 2):
        raise ValueError(f"{_clipped(name)}: shape or data_offsets are no sizes")
    num_bytes = math.prod(shape) * dtype.itemsize
    # The strides of an empty tensor are products of the sizes that are not 0.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MOST or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{_clipped(name)}: shape and data_offsets disagree")
    return (offsets[0], offsets[1]), Entry(name, dtype, shape, num_bytes)


def _clipped(name: str) -> str:
    """The name of a tensor, which may be as long as a header, for an error."""
    return printable(name[:100])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST for value in values)


def read_tensors(
    source: FileLike, *kinds: str, is_wanted: Callable[[str, str], bool] = lambda _kind, _name: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what ``write_tensors`` wrote: the tensors, in memory of their own, and the metadata.

    A file is opened once, and not mapped: whatever others do to it meanwhile, sound tensors or an error come out. A
    file object is read from where it stands to its end.

    Args:
        source: A path, or a binary file object.
        kinds: Of which one is expected.
        is_wanted: Whether, in a file of this kind, the tensor of this name is returned. The others are only checked.

    Raises:
        ValueError: The file is damaged, cut short, or of another kind.
        TypeError: ``source`` is neither a path nor a binary file object.
        OSError: It cannot be read, or is no regular file.
        MemoryError: The tensors do not fit into memory.
    """
    name = name_of(source)
    with _opened(source) as file:
        size = _size_of(file) if is_path(source) else None
        try:
            return _read_safetensors(file, size, kinds, is_wanted)
        except io.UnsupportedOperation:  # a ValueError as well
            raise
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except MemoryError as error:
            raise MemoryError(f"{name}: {error}") from None


def _read_safetensors(
    file: IO[bytes], size: int | None, kinds: Collection[str], is_wanted: Callable[[str, str], bool]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = _read_header(file, size)
    try:
        entries, metadata = parse_header(content)
    except ValueError as error:
        raise _damaged(error) from None
    num_bytes = 8 + len(content) + sum(entry.num_bytes for entry in entries)
    if size is not None and size != num_bytes:
        raise _damaged(f"expected {num_bytes} bytes, got {size}")
    kind = metadata.get("kind", "")
    if metadata.get("format") != _FORMAT or kind not in kinds:
        raise ValueError(f"not a {' or '.join(kinds)} that bigramx saved")
    if metadata.get(_HEADER_CHECKSUM) != _header_checksum(metadata):
        raise ValueError("damaged: the checksum of the metadata does not match")
    tensors = {entry.name: _allocate(file, entry) for entry in entries if is_wanted(kind, entry.name)}
    for entry in entries:
        tensor = tensors.get(entry.name)
        crc = _fill_from(file, entry.num_bytes, None if tensor is None else _bytes_of(tensor))
        if metadata.get(f"crc32.{entry.name}") != str(crc):
            raise ValueError(f"damaged: the checksum of {_clipped(entry.name)} does not match")
        if tensor is not None and tensor.dtype == torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise ValueError(f"damaged: {_clipped(entry.name)} holds what is neither true nor false")
    if _chunk(file, 1):
        raise _damaged("more bytes follow")
    return tensors, metadata


def _damaged(reason: object) -> ValueError:
    return ValueError(f"damaged, cut short, or no safetensors file ({reason})")


def _read_header(file: IO[bytes], size: int | None) -> bytes:
    length = bytearray(8)
    _fill_from(file, 8, memoryview(length))
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > (_MOST_HEADER if size is None else min(_MOST_HEADER, size - 8)):
        raise _damaged(f"a header of {num_bytes} bytes")
    content = bytearray(num_bytes)
    _fill_from(file, num_bytes, memoryview(content))
    return bytes(content)


def _allocate(file: IO[bytes], entry: Entry) -> Tensor:
    try:
        _check_memory(entry.num_bytes)
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except (MemoryError, RuntimeError):
        _fill_from(file, entry.num_bytes, None)  # raises, if the file does not hold what it promises
        raise MemoryError(f"no memory for {_clipped(entry.name)}, {entry.num_bytes:,} bytes") from None


def _fill_from(file: IO[bytes], num_bytes: int, memory: memoryview | None) -> int:
    """Reads so many bytes into the memory, if there is one; returns their CRC-32."""
    position = crc = 0
    while position < num_bytes:
        chunk = _chunk(file, min(num_bytes - position, _CHUNK))
        if not chunk:
            raise _damaged(f"{num_bytes - position} bytes are missing")
        if memory is not None:
            memory[position : position + len(chunk)] = chunk
        crc = zlib.crc32(chunk, crc)
        position += len(chunk)
    return crc


def _chunk(file: IO[bytes], most: int) -> bytes:
    """At most so many bytes; none at the end."""
    chunk = file.read(most)
    if chunk is None:
        raise BlockingIOError(errno.EAGAIN, "expected a file object that waits for its data")
    if not isinstance(chunk, (bytes, bytearray)):
        raise TypeError(f"expected a binary file object, got one that reads {type(chunk).__name__}")
    if len(chunk) > most:
        raise ValueError(f"expected {most} bytes at most from read({most}), got {len(chunk)}")
    return chunk


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
