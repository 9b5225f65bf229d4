"""The memory of tables and their gradients: whether it can suffice, and what is kept of it for the next step.

Refused is what provably cannot fit: more than the device has in all, which for the CPU is RAM and swap, within the
limits of the process's control groups. What other processes hold now may be free when it is needed. Pages that nobody
has written take no memory: of the states of a sparse table's optimizer only the rows that occur are written, so they do
not count.

The memory of a freed gradient on the CPU, dense or the values of a sparse one, is kept for the next gradient of about
its size: fresh memory costs a step of training as much time as the loss itself. Kept is the gradient that was freed
last, and at most one of another size; where memory runs short, the system takes blocks of more than 32 MiB (on Linux).
The limit is a quarter of the memory, unless the environment variable BIGRAMX_GRADIENT_POOL_LIMIT has a number of bytes
(0: nothing is kept) when this package is imported, or :func:`set_gradient_pool_limit` sets another. Nothing is kept by
a process whose address space is limited (``ulimit -v``), or where the system promises no more memory than it has.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import torch

from bigramx import ops

_LIMIT_VARIABLE = "BIGRAMX_GRADIENT_POOL_LIMIT"
_LARGEST_LIMIT = 2**63 - 1


def check_training(
    vocab_size: int,
    *,
    sparse: bool = False,
    has_gradient: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    num_states: int | None = None,
    num_counts: int = 0,
) -> None:
    """Raises a MemoryError where a table (V, V) and what ``fit`` takes to train it cannot fit; allocates nothing.

    Args:
        vocab_size: V.
        sparse: The gradient of the table is sparse.
        has_gradient: There is a gradient of the table; fit's native steps update each row while they have its own.
        device: The device of the table; None: the default device.
        dtype: The dtype of the table; None: the default dtype.
        num_states: The number of tables that the optimizer keeps and writes as a whole; None: two, or none if
            ``sparse``, as the default optimizers do.
        num_counts: The number of tables of pair counts, int64.

    Raises:
        MemoryError: It says what is needed, what there is, and the largest V that fits.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    itemsize = (torch.get_default_dtype() if dtype is None else dtype).itemsize
    total = total_memory(device)
    needs = _needs(itemsize, sparse, has_gradient, num_states, num_counts)
    if total is None or sum(needs.values()) * vocab_size**2 <= total:
        return
    largest = {"": needs}
    if not sparse:
        largest[" with sparse=True"] = _needs(itemsize, True, has_gradient, 0, num_counts)
    if itemsize > 2:
        largest[" with dtype=torch.bfloat16"] = _needs(2, sparse, has_gradient, num_states, num_counts)
    parts = " + ".join(f"{_gigabytes(size * vocab_size**2)} for {what}" for what, size in needs.items() if size)
    fits = ", ".join(f"V = {math.isqrt(total // sum(needs.values())):,}{how}" for how, needs in largest.items())
    raise MemoryError(
        f"training a table with V = {vocab_size:,} takes {parts}, and {device} has {_gigabytes(total)} of memory in "
        f"all; at most {fits} would fit"
    )


def _needs(itemsize: int, sparse: bool, has_gradient: bool, num_states: int | None, num_counts: int) -> dict[str, int]:
    """What is needed for each of the V * V entries, in bytes."""
    if num_states is None:
        num_states = 0 if sparse else 2
    return {
        "the table": itemsize,
        "its gradient": itemsize if has_gradient and not sparse else 0,
        "the optimizer's states": num_states * itemsize,
        "the pair counts": num_counts * 8,
    }


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def total_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """The bytes that a device has in all: for the CPU those of RAM and swap. None where that is not known.

    Args:
        device: The device.
        root: The folder of ``proc`` and ``sys``, which Linux has.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
        return min([1024 * kilobytes["MemTotal"], *_cgroup_limits(root)]) + 1024 * kilobytes["SwapTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of the process's control groups, versions 1 and 2, and of the groups around them."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            if controllers == "":
                folder, name = groups, "memory.max"
            elif controllers == "memory":
                folder, name = groups / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = folder / path.lstrip("/")
            for parent in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    yield int((parent / name).read_text())


def check_room(num_bytes: int, what: str, device: torch.device | str = "cpu") -> None:
    """Raises a MemoryError where a device has less memory than that in all.

    Raises:
        MemoryError: It says what is needed, and what there is.
    """
    total = total_memory(torch.device(device))
    if total is not None and num_bytes > total:
        raise MemoryError(
            f"{what} takes {_gigabytes(num_bytes)}, and {device} has {_gigabytes(total)} of memory in all"
        )


class GradientPoolInfo(NamedTuple):
    """What is kept of the memory of freed gradients."""

    limit: int  # bytes that are kept at most
    held: int  # bytes that are kept now, without those of gradients in use
    hits: int  # gradients that took a kept block, since the package was imported
    misses: int  # gradients that took fresh memory


def gradient_pool_info() -> GradientPoolInfo:
    """Returns what is kept of the memory of freed gradients, and how often it was of use."""
    return GradientPoolInfo(*ops.gradient_pool_info())


def empty_gradient_pool() -> None:
    """Gives the kept memory of freed gradients back to the system; gradients that are freed later are kept again."""
    ops.empty_gradient_pool()


def set_gradient_pool_limit(num_bytes: SupportsIndex) -> None:
    """Gives the kept memory of freed gradients back to the system, and sets how much may be kept from then on.

    Args:
        num_bytes: The number of bytes; 0: nothing is kept.

    Raises:
        TypeError: It is no integer.
        ValueError: It is negative.
    """
    limit = operator.index(num_bytes)
    if limit < 0:
        raise ValueError(f"expected num_bytes >= 0, got {limit}")
    ops.set_gradient_pool_limit(min(limit, _LARGEST_LIMIT))


def _initial_limit(root: Path = Path("/")) -> int:
    """What the environment says, or a quarter of the memory that there is."""
    text = os.environ.get(_LIMIT_VARIABLE, "")
    if text:
        if not re.fullmatch("[0-9]{1,30}", text):
            raise ValueError(f"bigramx: expected {_LIMIT_VARIABLE} to be a number of bytes, got {text!r}")
        return int(text)
    with contextlib.suppress(OSError):
        if (root / "proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return 0
    return (total_memory(torch.device("cpu"), root) or 2**32) // 4


set_gradient_pool_limit(_initial_limit())
