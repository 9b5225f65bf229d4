"""A step of AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.race import OURS, Effort, Race, Result, faster_than
from benchmarks.timing import Function
from bigramx import optim


class EmptyOptimizer(torch.optim.Optimizer):
    """PyTorch's own cost around a step."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def step(effort: Effort) -> Result:
    """V = 65: one parameter of 65 x 65."""
    race = Race("AdamW.step, V=65", [faster_than("torch.optim.AdamW", 5), faster_than("fused=True", 2.5)])
    table, grad = torch.randn(65, 65), torch.randn(65, 65)

    def stepper(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Function:
        param = table.clone().requires_grad_()
        param.grad = grad.clone()
        steps = optimizer([param])

        def run() -> object:
            steps.step()
            return param.detach()

        return run

    race.add(OURS, stepper(optim.AdamW))
    race.add("torch.optim.AdamW", stepper(torch.optim.AdamW))
    race.add("foreach=True", stepper(partial(torch.optim.AdamW, foreach=True)))
    race.add("fused=True", stepper(partial(torch.optim.AdamW, fused=True)))
    race.add_floor("an empty Optimizer.step", stepper(EmptyOptimizer))
    return race.run(effort)


JOBS = [step]
