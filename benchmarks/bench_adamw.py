"""A step of AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.comparison import COPY, OURS, Case, Comparison, Result, RunConfig, Target, faster_than, percent_of
from benchmarks.device import Device
from benchmarks.timing import Function
from bigramx import optim


class EmptyOptimizer(torch.optim.Optimizer):
    """PyTorch's own cost around a step."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def step(config: RunConfig, vocab_size: int, targets: Sequence[Target]) -> Result:
    """One parameter (V, V), which each step finds where the previous one left it: in the cache, if it fits."""
    device, moved_bytes = config.device, 7 * 4 * vocab_size**2  # param and two states read and written, grad read
    comparison = Comparison(f"AdamW.step, V={vocab_size}", targets, bytes_moved=moved_bytes if device.is_gpu else None)
    stepper = make_stepper(device, vocab_size)
    comparison.add(OURS, stepper(optim.AdamW))
    comparison.add("torch.optim.AdamW", stepper(torch.optim.AdamW))
    comparison.add("foreach=True", stepper(partial(torch.optim.AdamW, foreach=True)))
    comparison.add("fused=True", stepper(partial(torch.optim.AdamW, fused=True)))
    comparison.add_lower_bound("an empty Optimizer.step", stepper(EmptyOptimizer))
    if device.is_gpu:
        comparison.add("capturable=True", stepper(partial(torch.optim.AdamW, capturable=device.name == "cuda")))
        comparison.add_copy(device, moved_bytes)
    return comparison.run(config)


def captured_step(config: RunConfig, vocab_size: int) -> Result:
    """The graph of a step: the host only launches it."""
    device = config.device
    comparison = Comparison(f"AdamW.step, V={vocab_size}, captured", [faster_than("fused=True", 1)])
    stepper = make_stepper(device, vocab_size)

    def captured(optimizer: Callable[..., torch.optim.Optimizer]) -> Function:
        return device.capture(stepper(partial(optimizer, capturable=device.name == "cuda")))

    comparison.add(OURS, captured(optim.AdamW))
    comparison.add("torch.optim.AdamW", captured(torch.optim.AdamW))
    comparison.add("fused=True", captured(partial(torch.optim.AdamW, fused=True)))
    return comparison.run(config)


def make_stepper(
    device: Device, vocab_size: int
) -> Callable[[Callable[[list[Tensor]], torch.optim.Optimizer]], Function]:
    """Turns an optimizer into a function: a step of it on a parameter of its own, which the function returns."""
    table, grad = (torch.randn(vocab_size, vocab_size, device=device.name) for _ in range(2))

    def stepper(make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Function:
        param = table.clone().requires_grad_()
        param.grad = grad.clone()
        optimizer = make_optimizer([param])

        def run() -> object:
            optimizer.step()
            return param.detach()

        return run

    return stepper


SMALL = Case(
    step,
    headline="a step of AdamW, V=65",
    vocab_size=65,
    targets=[faster_than("torch.optim.AdamW", 5), faster_than("fused=True", 2.5)],
)

CASES = [SMALL]

CUDA_CASES = [
    SMALL,
    Case(step, vocab_size=8192, targets=[percent_of(COPY, 85)]),
    Case(captured_step, vocab_size=65),
]
