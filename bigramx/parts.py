"""Pair counts in several files: each holds some rows, and an index, as of sharded safetensors, ties them."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.types import FileLike

from bigramx import storage

FILE = "counts.safetensors"  # the name that a folder has it by
_KIND, _PART_KIND = "counts", "counts-part"
NAMES = ("crow_indices", "col_indices", "values")
_DTYPES = {4: torch.int32, 8: torch.int64}  # of counts
_INDEX = ".index.json"
_CHECKSUM = "crc32"
_MOST_INDEX = 100_000_000  # bytes


@dataclass(frozen=True)
class Part:
    """A file that holds the rows from ``begin`` to before ``end``.

    Attributes:
        file: Its name; it lies beside the index.
        begin: Its first row.
        end: The row after its last.
        num_distinct: The number of distinct pairs in it.
        itemsize: The bytes of a count in it, 4 or 8.
        crc32: The checksum of its metadata, which have those of its tensors.
    """

    file: str
    begin: int
    end: int
    num_distinct: int
    itemsize: int
    crc32: str

    @property
    def num_bytes(self) -> int:
        """The size of its tensors."""
        return 8 * (self.end - self.begin + 1) + (4 + self.itemsize) * self.num_distinct


def index_path(path: str | os.PathLike[str]) -> Path:
    """Where the index of counts lies that one process would write to ``path``."""
    return Path(f"{os.fsdecode(path)}{_INDEX}")


def read_counts(source: FileLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of counts, in one file or in parts.

    Args:
        source: A file object; or the path of the file or of the index, or of a folder with ``counts.safetensors`` or
            its index. Where there is an index in the place of the file, the path of the file stands for it.

    Raises:
        ValueError: A file is damaged, or a part is that of other counts. Whether the tensors are those of a CSR tensor
            with sorted columns is not checked.
        OSError: A file cannot be read.
        MemoryError: They do not fit into memory.
    """
    if not storage.is_path(source):
        return storage.read_tensors(source, _KIND)
    path = Path(os.fsdecode(source))
    if path.is_dir():
        path = path / FILE
    if index_path(path).exists() and not path.exists():
        path = index_path(path)
    return _read_parts(path) if path.name.endswith(_INDEX) else storage.read_tensors(path, _KIND)


def write_part(path: str | os.PathLike[str], begin: int, tensors: dict[str, Tensor]) -> Part:
    """Writes some rows: crow_indices (rows + 1) int64, col_indices (n) int32, values (n) int32 or int64."""
    end = begin + len(tensors["crow_indices"]) - 1
    named = {_name(name, begin): tensor for name, tensor in tensors.items()}
    storage.write_tensors(path, _PART_KIND, named, {})
    values = tensors["values"]
    checksum = read_metadata(path)[_CHECKSUM]
    return Part(os.path.basename(path), begin, end, len(values), values.element_size(), checksum)


def _name(name: str, begin: int) -> str:
    """Of a tensor in a part: no two parts have the same, as safetensors' readers of an index expect."""
    return f"{name}.{begin}"


def is_part(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that ``write_part`` wrote."""
    try:
        return read_metadata(path).get("kind") == _PART_KIND
    except (OSError, ValueError):
        return False


def write_index(index: Path, parts: list[Part], metadata: dict[str, str]) -> None:
    """Ties the parts, in the order of their rows.

    Raises:
        FileNotFoundError: A part does not lie in the folder of the index, as this process sees it.
        ValueError: It is another one.
    """
    for part in parts:
        if read_metadata(index.parent / part.file)[_CHECKSUM] != part.crc32:
            raise _foreign(index, part)
    content: dict[str, Any] = {
        "metadata": {
            "total_size": sum(part.num_bytes for part in parts),
            "format": "bigramx",
            "kind": _KIND,
            "counts": metadata,
            "parts": [asdict(part) for part in parts],
        },
        "weight_map": {_name(name, part.begin): part.file for part in parts for name in NAMES},
    }
    content["metadata"][_CHECKSUM] = _checksum_of(content)
    storage.write_text(index, json.dumps(content, indent=2) + "\n")


def _checksum_of(content: dict[str, Any]) -> str:
    metadata = {name: value for name, value in content["metadata"].items() if name != _CHECKSUM}
    return str(zlib.crc32(json.dumps({**content, "metadata": metadata}, sort_keys=True).encode()))


def read_index(index: Path) -> tuple[list[Part], dict[str, str]]:
    """The parts, in the order of their rows, and the metadata of the counts.

    Raises:
        ValueError: It is damaged, or no index of counts.
        OSError: It cannot be read.
    """
    name = storage.name_of(index)
    content = storage.read_file(index)
    try:
        return _parse_index(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{name}: damaged, or not an index of counts that bigramx saved") from None


def _parse_index(content: bytes) -> tuple[list[Part], dict[str, str]]:
    if len(content) > _MOST_INDEX:
        raise ValueError("too long")
    index = json.loads(content)
    if index["metadata"][_CHECKSUM] != _checksum_of(index) or index["metadata"]["kind"] != _KIND:
        raise ValueError("another checksum or kind")
    parts, metadata = [Part(**part) for part in index["metadata"]["parts"]], index["metadata"]["counts"]
    position = 0
    for part in parts:
        sizes = (part.begin, part.end, part.num_distinct)
        if not all(type(size) is int and 0 <= size < 2**63 for size in sizes) or part.begin != position:
            raise ValueError("the rows do not follow one another")
        if not isinstance(part.file, str) or os.path.basename(part.file) != part.file or not part.file:
            raise ValueError("the name of a part is a path")
        position = part.end
        if position < part.begin:
            raise ValueError("a part ends before it begins")
        if part.itemsize not in _DTYPES:
            raise ValueError("another size of counts")
    if len({part.file for part in parts}) < len(parts):
        raise ValueError("a part occurs twice")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("the metadata are no strings")
    return parts, metadata


def _read_parts(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Takes memory for one copy, and for one part."""
    parts, metadata = read_index(index)
    for part in parts:  # before memory is taken for what the index tells
        if os.stat(index.parent / part.file).st_size < part.num_bytes:
            raise _foreign(index, part)
    num_rows, num_distinct = parts[-1].end if parts else 0, sum(part.num_distinct for part in parts)
    crow = torch.zeros(num_rows + 1, dtype=torch.int64, device="cpu")
    col = torch.empty(num_distinct, dtype=torch.int32, device="cpu")
    dtype = _DTYPES[max((part.itemsize for part in parts), default=4)]
    values = torch.empty(num_distinct, dtype=dtype, device="cpu")
    first = 0
    for part in parts:
        of_part = _read_part(index, part)
        last = first + part.num_distinct
        crow[part.begin : part.end + 1] = of_part[0] + first
        col[first:last], values[first:last] = of_part[1:]
        first = last
    return dict(zip(NAMES, (crow, col, values), strict=True)), metadata


def _read_part(index: Path, part: Part) -> list[Tensor]:
    """Its crow_indices, col_indices and values."""
    tensors, metadata = storage.read_tensors(index.parent / part.file, _PART_KIND)
    names = [_name(name, part.begin) for name in NAMES]
    if metadata[_CHECKSUM] != part.crc32 or tensors.keys() != set(names):
        raise _foreign(index, part)
    found = [tensors[name] for name in names]
    dtypes = (torch.int64, torch.int32, _DTYPES[part.itemsize])
    sizes = (part.end - part.begin + 1, part.num_distinct, part.num_distinct)
    expected = [(dtype, (size,)) for dtype, size in zip(dtypes, sizes, strict=True)]
    ends = found[0].flatten()[[0, -1]].tolist()
    if [(each.dtype, tuple(each.shape)) for each in found] != expected or ends != [0, part.num_distinct]:
        raise _foreign(index, part)
    return found


def _foreign(index: Path, part: Part) -> ValueError:
    return ValueError(f"{storage.name_of(index.parent / part.file)}: not the part that {index.name} names")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file of ``storage.write_tensors``, whose tensors are not read.

    Raises:
        ValueError: It is damaged, or no such file.
        OSError: It cannot be read.
    """
    with storage.open_to_read(path) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > _MOST_INDEX:
                raise ValueError(f"a header of {length} bytes")
            return storage.parse_header(file.read(length))[1]
        except ValueError as error:
            raise ValueError(f"{storage.name_of(path)}: damaged, or no safetensors file ({error})") from None
