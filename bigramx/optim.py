"""AdamW with one fused kernel per parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from bigramx import ops

_DTYPES = (torch.float32, torch.float64)
_ONE = torch.ones((), device="cpu")  # adding a tensor takes half as long as adding a number


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``: the same arguments and state_dict, and the same results up to rounding.

    Each dense float32 or float64 parameter on the CPU, or on a GPU if this build has CUDA kernels, is updated by one
    fused kernel. For other parameters, or where an option asks for another implementation
    (``foreach``, ``differentiable``, ``fused``, a tensor as ``lr``), torch's own step runs.

    With ``capturable=True`` the GPU counts the steps, so that a CUDA graph of a step can be replayed.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters from their gradients; ``closure``, if given, recomputes the loss first.

        Returns:
            What ``closure`` returned.
        """
        return (_observed_step if _is_observed(self) else _step)(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or with ``set_to_none=False`` sets them to zero."""
        if not set_to_none or _is_observed(self):
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    step.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it: the wrapper is slower than the step


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks run around a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_observed(optimizer: torch.optim.Optimizer) -> bool:
    return has_hooks(optimizer) or profiler._is_profiler_enabled


def _step(optimizer: torch.optim.AdamW, closure: Callable[[], float] | None) -> float | None:
    for group in optimizer.param_groups:
        if not _has_kernel(group):
            return _torch_step(optimizer, closure)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    grad_mode = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # torch.no_grad() takes as long as half a step
    try:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if (grad := param.grad) is not None:
                    _step_param(param, grad, group, state_of(optimizer, param, group))
    finally:
        torch._C._set_grad_enabled(grad_mode)
    return loss


# With the hooks and the profiler's mark that torch puts around every step.
_observed_step = torch.optim.Optimizer.profile_hook_step(_step)


def state_of(optimizer: torch.optim.Optimizer, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter, created on first use."""
    state: dict[str, Tensor] = optimizer.state[param]
    if not state:
        counts_on = param.device if group["capturable"] else "cpu"
        state["step"] = torch.zeros((), dtype=_step_dtype(), device=counts_on)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
    return state


def _step_param(param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    beta1, beta2 = group["betas"]
    step = state["step"]
    step.add_(_ONE)
    try:
        ops.adamw_(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if group["amsgrad"] else None,
            step,
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )
    except BaseException:
        step.sub_(_ONE)  # a step that was not taken does not count
        raise


def _torch_step(optimizer: torch.optim.AdamW, closure: Callable[[], float] | None) -> float | None:
    step = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        step = inspect.unwrap(
            step, stop=lambda function: not getattr(function, "hooked", False)
        )  # the hooks run around our own step already
    loss: float | None = step(optimizer, closure)
    return loss


def _step_dtype() -> torch.dtype:
    """Wide enough to count: float32, or float64 where that is the default."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _has_kernel(group: dict[str, Any]) -> bool:
    special = group["foreach"] or group["differentiable"] or group["fused"]
    if special or isinstance(group["lr"], Tensor) or not group.get("decoupled_weight_decay", True):
        return False
    for param in group["params"]:
        if not (_may_step(param, group["capturable"]) and param.dtype in _DTYPES and param.is_contiguous()):
            return False
        if (grad := param.grad) is not None and grad.layout is not torch.strided:
            return False
    return True


def _may_step(param: Tensor, capturable: bool) -> bool:
    """Whether a kernel exists, and torch's own step would not raise an error about ``capturable``."""
    if param.is_cpu:
        return not capturable
    return ops.HAS_CUDA_KERNELS and param.is_cuda and (capturable or not torch.cuda.is_current_stream_capturing())
