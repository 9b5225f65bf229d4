"""A step of AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.device import COPY, Device
from benchmarks.race import OURS, Effort, Race, Reach, Result, faster_than, percent_of
from benchmarks.timing import Function
from bigramx import optim


class EmptyOptimizer(torch.optim.Optimizer):
    """PyTorch's own cost around a step."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def step(effort: Effort, vocab_size: int, reaches: Sequence[Reach]) -> Result:
    """One parameter of V x V, which each step finds where the last one left it, in the cache where it fits."""
    device, moved_bytes = effort.device, 7 * 4 * vocab_size**2  # param and two states read and written, grad read
    race = Race(f"AdamW.step, V={vocab_size}", reaches, bytes_moved=moved_bytes if device.is_gpu else None)
    stepper = make_stepper(device, vocab_size)
    race.add(OURS, stepper(optim.AdamW))
    race.add("torch.optim.AdamW", stepper(torch.optim.AdamW))
    race.add("foreach=True", stepper(partial(torch.optim.AdamW, foreach=True)))
    race.add("fused=True", stepper(partial(torch.optim.AdamW, fused=True)))
    race.add_floor("an empty Optimizer.step", stepper(EmptyOptimizer))
    if device.is_gpu:
        race.add("capturable=True", stepper(partial(torch.optim.AdamW, capturable=device.captures)))
        race.add_copy(device, moved_bytes)
    return race.run(effort)


def captured_step(effort: Effort, vocab_size: int) -> Result:
    """The graph of a step, for which the host does nothing but launch it."""
    device = effort.device
    race = Race(f"AdamW.step, V={vocab_size}, captured", [faster_than("fused=True", 1)])
    stepper = make_stepper(device, vocab_size)

    def captured(optimizer: Callable[..., torch.optim.Optimizer]) -> Function:
        return device.captured(stepper(partial(optimizer, capturable=device.captures)))

    race.add(OURS, captured(optim.AdamW))
    race.add("torch.optim.AdamW", captured(torch.optim.AdamW))
    race.add("fused=True", captured(partial(torch.optim.AdamW, fused=True)))
    return race.run(effort)


def make_stepper(
    device: Device, vocab_size: int
) -> Callable[[Callable[[list[Tensor]], torch.optim.Optimizer]], Function]:
    """Makes a contestant of an optimizer: a step of it on a parameter of its own, which it returns."""
    table, grad = (torch.randn(vocab_size, vocab_size, device=device.name) for _ in range(2))

    def stepper(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Function:
        param = table.clone().requires_grad_()
        param.grad = grad.clone()
        steps = optimizer([param])

        def run() -> object:
            steps.step()
            return param.detach()

        return run

    return stepper


JOBS = [partial(step, vocab_size=65, reaches=[faster_than("torch.optim.AdamW", 5), faster_than("fused=True", 2.5)])]

CUDA_JOBS = [
    partial(step, vocab_size=65, reaches=[faster_than("torch.optim.AdamW", 5), faster_than("fused=True", 2.5)]),
    partial(step, vocab_size=8192, reaches=[percent_of(COPY, 85)]),
    partial(captured_step, vocab_size=65),
]
