"""AdamW, with the step as one kernel a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from bigramx import ops


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``: its arguments, its state_dict, its results to rounding.

    Dense float32 and float64 parameters on the CPU are stepped by one fused kernel each. Where a parameter is
    something else, or an option asks for another implementation (``foreach``, ``capturable``, ``differentiable``,
    ``fused``, a tensor as ``lr``), torch's own step runs.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters from their gradients; ``closure``, where given, computes the loss anew first.

        Returns:
            What ``closure`` returned.
        """
        if not all(_has_kernel(group) for group in self.param_groups):
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, group)
        return loss

    def _step_param(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=_step_dtype())
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        ops.adamw_(
            param,
            param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if group["amsgrad"] else None,
            state["step"].item(),
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )


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
    special = group["foreach"] or group["capturable"] or group["differentiable"] or group["fused"]
    if special or isinstance(group["lr"], Tensor) or not group.get("decoupled_weight_decay", True):
        return False
    return all(
        param.is_cpu
        and param.is_contiguous()
        and param.dtype in (torch.float32, torch.float64)
        and (param.grad is None or not param.grad.is_sparse)
        for param in group["params"]
    )
