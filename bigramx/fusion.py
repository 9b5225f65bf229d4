"""The rule of the fused path: it is taken only where it provably equals the plain one.

A kernel reads a table's memory and computes what the plain modules would. Where something stands between them that
PyTorch would run (a hook, an override, a patch, a mode, a tensor that is not what its memory says), the plain modules
run. The model asks at every step, so an answer takes less than a microsecond.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_Function = TypeVar("_Function", bound=Callable[..., Any])

# As they were at import: who replaces one of them later wants to see the calls.
_MODULE_CALL = nn.Module.__call__
_EMBEDDING_FORWARD = nn.Embedding.forward
_EMBEDDING, _CROSS_ENTROPY = F.embedding, F.cross_entropy
_SOFTMAX, _MULTINOMIAL = F.softmax, torch.multinomial
_GETATTR, _GETATTRIBUTE = nn.Module.__getattr__, nn.Module.__getattribute__

_num_function_modes = torch._C._len_torch_function_stack
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing

_PLAIN = (Tensor, nn.Parameter)


def is_plain_tensor(value: object) -> bool:
    """Whether a kernel may read the tensor's memory: no subclass (DTensor, FakeTensor, a quantised one)."""
    return type(value) in _PLAIN


def any_dtensor(*values: object) -> bool:
    """Whether one of the values is a DTensor. Imports nothing, which takes long: where there is one, its module is."""
    kind = loaded("torch.distributed.tensor", "DTensor")
    if kind is not None:
        for value in values:
            if type(value) not in _PLAIN and isinstance(value, kind):
                return True
    return False


def loaded(module: str, name: str) -> Any:
    """What a module has of this name; None if it has not been imported, or a thread that imports it is not so far."""
    return getattr(sys.modules.get(module), name, None)


def is_of(module: str, name: str, value: object) -> bool:
    """Whether it is an object of a class, without importing its module."""
    kind = loaded(module, name)
    return kind is not None and isinstance(value, kind)


def runs_only(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling ``module`` runs the function ``forward`` and nothing else: no override, no hook, no wrapper."""
    kind = type(module)
    return (
        kind.forward is forward
        and kind.__call__ is _MODULE_CALL
        and hasattr(module, "forward")  # a program of torch.compile sees later if it changes, not what a dict lacks
        and "forward" not in module.__dict__
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not (modules._global_forward_pre_hooks or modules._global_forward_hooks)
        and not (modules._global_backward_pre_hooks or modules._global_backward_hooks)
    )


def is_observed() -> bool:
    """Whether PyTorch's functions are patched, or recorded, or a mode sees, and may change, what they do.

    A recorded program (torch.export, ONNX, TorchScript) may run where this package is not installed.
    """
    if F.embedding is not _EMBEDDING or F.cross_entropy is not _CROSS_ENTROPY:
        return True
    if torch.compiler.is_dynamo_compiling():
        # is_exporting() is always true here in torch 2.11; the number of modes is not seen to change.
        return torch.compiler._is_exporting_flag or _is_intercepted()
    if _is_tracing() or _num_dispatch_modes() > 0:
        return True
    return _num_function_modes() > 0 and _is_intercepted()


def _is_intercepted() -> bool:
    """Whether there is a mode other than that of a default device."""
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def are_draws_observed() -> bool:
    """Whether the functions by which the lecture's loop draws a token are patched."""
    return F.softmax is not _SOFTMAX or torch.multinomial is not _MULTINOMIAL


def is_registered(module: nn.Module, name: str, lookup: Callable[..., Any] = _GETATTR) -> bool:
    """Whether ``module.name`` is what is registered: its class has no such property, and no lookup but ``lookup``."""
    kind = type(module)
    return (
        name not in module.__dict__
        and getattr(kind, name, None) is None
        and kind.__getattr__ is lookup
        and kind.__getattribute__ is _GETATTRIBUTE
    )


def is_plain(table: nn.Embedding) -> bool:
    """Whether a call of ``table`` gives rows of its weight, and no more."""
    return (
        runs_only(table, _EMBEDDING_FORWARD)
        and ((type(table) is nn.Embedding and "weight" not in table.__dict__) or is_registered(table, "weight"))
        and table._compiled_call_impl is None
        and table.max_norm is None
        and not table.scale_grad_by_freq
        and (is_plain_tensor(weight := table._parameters.get("weight")) or any_dtensor(weight))
        and not is_observed()
    )


def uncompiled(function: _Function) -> _Function:
    """As torch.compiler.disable, which imports the compiler at once: that takes as long as importing PyTorch."""
    if not torch.compiler.is_dynamo_compiling():
        return function
    disabled: _Function = torch.compiler.disable(function)
    return disabled
