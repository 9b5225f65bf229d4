"""The rule of the fused path: it is taken only where it provably equals the plain one.

A kernel reads a table's memory and computes what the plain modules would. Where something stands between them that
PyTorch would run (a hook, an override, a wrapper, a tensor that is not what its memory says), the plain modules run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as modules

# As they were at import: who replaces one of them later wants to see the calls.
_MODULE_CALL = nn.Module.__call__
_EMBEDDING_FORWARD = nn.Embedding.forward


def is_plain_tensor(value: object) -> bool:
    """Whether a kernel may read the tensor's memory: no subclass (DTensor, FakeTensor, a quantised one)."""
    return type(value) is Tensor or type(value) is nn.Parameter


def runs_only(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling ``module`` runs the function ``forward`` and nothing else: no override, no hook, no wrapper."""
    kind = type(module)
    return (
        kind.forward is forward
        and kind.__call__ is _MODULE_CALL
        and "forward" not in module.__dict__
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not (modules._global_forward_pre_hooks or modules._global_forward_hooks)
        and not (modules._global_backward_pre_hooks or modules._global_backward_hooks)
    )


def is_plain(table: nn.Embedding) -> bool:
    """Whether a call of ``table`` gives rows of its weight, and no more; and stands in no program to be exported.

    That may run where this package is not installed.
    """
    return (
        runs_only(table, _EMBEDDING_FORWARD)
        and table.max_norm is None
        and not table.scale_grad_by_freq
        and is_plain_tensor(table._parameters.get("weight"))
        and not (torch.compiler.is_exporting() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
    )
