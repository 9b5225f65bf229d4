"""Tensors that few programs pass, for the fuzzer: each made by one expression, which a report of a fault can repeat.

A function takes a tensor, and returns one of the same values unless it says otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS, _READ_ONLY = 0, 1  # PROT_NONE, PROT_READ
_GUARD = 8  # elements


class OwnTensor(Tensor):
    """A subclass of Tensor that changes nothing."""


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    """All bits set: NaN where the dtype has one, else -1 or the largest."""
    size = torch.Size(shape)
    return torch.full((size.numel() * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype).view(size)


# ------------------------------------------------------------------------------------------------------- memory


def guarded(tensor: Tensor) -> Tensor:
    """Within a larger storage, between elements of garbage that nothing may read or write."""
    buffer = garbage(tensor.numel() + 2 * _GUARD, dtype=tensor.dtype)
    return buffer[_GUARD:-_GUARD].view(tensor.shape).copy_(tensor)


def fenced(tensor: Tensor) -> Tensor:
    """At the end of a page; to touch the byte behind it is a segmentation fault."""
    num_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    _protect(memory, num_pages * mmap.PAGESIZE, mmap.PAGESIZE, _NO_ACCESS)
    return _in_buffer(memory, num_pages * mmap.PAGESIZE - tensor.nbytes, tensor)


def read_only(tensor: Tensor) -> Tensor:
    """In memory that may not be written to, as a mapped file is."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 1))
    inside = _in_buffer(memory, 0, tensor)
    _protect(memory, 0, len(memory), _READ_ONLY)
    return inside


def unaligned(tensor: Tensor) -> Tensor:
    """At an odd address."""
    return _in_buffer(bytearray(tensor.nbytes + 1), 1, tensor)


def freed(tensor: Tensor) -> Tensor:
    """Has its shape, but no memory any more."""
    return shrunk(tensor, 0)


def shrunk(tensor: Tensor, nbytes: int) -> Tensor:
    """Has its shape, but less memory than that."""
    own = tensor.clone()
    own.untyped_storage().resize_(nbytes)
    return own


def _in_buffer(buffer: Any, offset: int, tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor.clone()
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _protect(memory: mmap.mmap, offset: int, nbytes: int, access: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


# ------------------------------------------------------------------------------------------------------ strides


def strided(tensor: Tensor) -> Tensor:
    """Every other element of its last dimension, between garbage."""
    *sizes, last = tensor.shape
    return garbage(*sizes, 2 * last, dtype=tensor.dtype)[..., ::2].copy_(tensor)


def column_major(tensor: Tensor) -> Tensor:
    """Its first dimension is the one of stride 1."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(tensor: Tensor) -> Tensor:
    """Its first row over and over, by stride 0."""
    return tensor[:1].expand_as(tensor)


def overlapping(tensor: Tensor) -> Tensor:
    """Elements that share memory: each stride is 1."""
    return tensor.as_strided(tensor.shape, (1,) * tensor.dim())


def huge(tensor: Tensor, *sizes: int) -> Tensor:
    """Its first element in each place of these sizes."""
    return tensor.flatten()[0].expand(sizes)


# -------------------------------------------------------------------------------------------------------- kinds


def negated(tensor: Tensor) -> Tensor:
    """Holds -tensor and the negative bit."""
    return torch._neg_view(-tensor)


def conjugated(tensor: Tensor) -> Tensor:
    """Complex, with the conjugate bit."""
    return torch._conj(tensor.to(torch.complex64))


def imaginary(tensor: Tensor) -> Tensor:
    """Every other real number of a conjugate, and so with the negative bit."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of another dtype; garbage where nothing converts to it."""
    try:
        return tensor.to(dtype)
    except (RuntimeError, NotImplementedError):
        return garbage(*tensor.shape, dtype=dtype)


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor])


def zero_tensor(tensor: Tensor) -> Tensor:
    """Zeros without memory."""
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def own(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OwnTensor)


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def parameter(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor)


def computed(tensor: Tensor) -> Tensor:
    """Not a leaf of the graph."""
    return tensor.requires_grad_().view_as(tensor)


def with_value(tensor: Tensor, value: float, position: int = 0) -> Tensor:
    """One element is another."""
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[position % tensor.numel()] = value
    return changed


def differentiate(results: Any) -> None:
    """Runs backward, where the first result of a call has a history."""
    loss = results[0] if isinstance(results, tuple) else results
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() > 0 and not loss.is_meta:
        loss.sum().backward()
