"""functional.adamw_ and optim.AdamW against torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from bigramx import functional, optim, reference
from tests.devices import on_device, skip_if_long
from tests.tolerances import assert_as_close_as_eager

pytestmark = pytest.mark.usefixtures("device")

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([0, 1, 7, 16, 65 * 65, 100_003]),
    offsets=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4]), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    step=st.sampled_from([1, 2, 1000]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
def test_equals_reference(
    seed: int, size: int, offsets: list[int], dtype: torch.dtype, step: int, amsgrad: bool, maximize: bool
) -> None:
    """For any alignment of each tensor."""
    torch.manual_seed(seed)
    tensors = [torch.randn(size), torch.randn(size), torch.randn(size), torch.rand(size), torch.rand(size)]

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        moved = [torch.empty(size + offset, dtype=dtype)[offset:] for offset in offsets]
        param, grad, exp_avg, exp_avg_sq, largest = (
            to.copy_(tensor) for to, tensor in zip(moved, tensors, strict=True)
        )
        largest_or_none = largest if amsgrad else None
        function(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            largest_or_none,
            step=torch.tensor(float(step)),
            maximize=maximize,
            **HYPERPARAMETERS,
        )
        return [param, exp_avg, exp_avg_sq, largest]

    for actual, eager, exact in zip(
        run(functional.adamw_, dtype), run(reference.adamw_, dtype), run(reference.adamw_, torch.float64), strict=True
    ):
        assert_as_close_as_eager(actual, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_elements_than_threads(dtype: torch.dtype) -> None:
    """More than a GPU runs at once, so that its threads loop."""
    size = 2**20 + 3
    skip_if_long(size)
    tensors = [torch.rand(size, dtype=dtype) for _ in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    functional.adamw_(*tensors, step=torch.tensor(3.0), **HYPERPARAMETERS)
    reference.adamw_(*copies, step=torch.tensor(3.0), **HYPERPARAMETERS)
    torch.testing.assert_close(tensors, copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_is_a_tensor_as_in_torch_fused_adamw(dtype: torch.dtype) -> None:
    """It is read, not counted, and may have another dtype than the parameter."""
    tensors = [torch.rand(7, dtype=dtype) for _ in range(4)]
    copies = [[tensor.clone()] for tensor in tensors]
    for number in (1.0, 2.0):
        step = torch.tensor(number)
        functional.adamw_(*tensors, step=step.double(), **HYPERPARAMETERS)
        fused: Any = torch._fused_adamw_
        fused(*copies, [], [step], amsgrad=False, maximize=False, grad_scale=None, found_inf=None, **HYPERPARAMETERS)
        assert step == number
    torch.testing.assert_close(tensors, [copy for (copy,) in copies])


@pytest.mark.cpu_only
def test_a_step_before_the_first() -> None:
    with pytest.raises(ValueError, match="step >= 1, got 0"):
        functional.adamw_(*(torch.ones(3) for _ in range(4)), step=torch.zeros(()), **HYPERPARAMETERS)


PARAM = torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"param": PARAM.half()}, RuntimeError, r"param .*got Half"),
        ({"grad": PARAM.double()}, RuntimeError, r"grad .*Float.*got Double"),
        ({"grad": torch.ones(3)}, RuntimeError, r"grad to have the shape of param, \[4\], got \[3\]"),
        ({"exp_avg": torch.ones(8)[::2]}, RuntimeError, r"exp_avg to be contiguous, got strides \[2\]"),
        ({"exp_avg_sq": PARAM.to("meta")}, RuntimeError, r"same device, got .*'exp_avg_sq': device\(type='meta'\)"),
        ({"step": torch.ones(2)}, RuntimeError, r"step to be one number, got shape \[2\]"),
        ({"step": torch.tensor(1)}, RuntimeError, r"step .*got Long"),
        ({"step": torch.ones((), device="meta")}, RuntimeError, r"step to be on the CPU or on the device of param"),
        ({"step": 1.0}, TypeError, r"'Tensor' for argument 'step'"),
        ({"lr": "x"}, TypeError, r"'float' for argument 'lr'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {name: PARAM.clone() for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    call = {**tensors, "step": torch.tensor(1.0), **HYPERPARAMETERS, **arguments}
    with pytest.raises(error, match=message):
        functional.adamw_(**{name: on_device(value) for name, value in call.items()})


def train(optimizer_class: type[torch.optim.AdamW], steps: int = 20, **options: Any) -> tuple[Tensor, Any]:
    torch.manual_seed(1)
    param = torch.nn.Parameter(torch.randn(33, 7))
    optimizer = optimizer_class([param], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (param - 1).square().sum().backward()
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5},
        {"amsgrad": True, "maximize": True},
        {"foreach": True},
        {"fused": True},
        {"capturable": False, "differentiable": False},
        {"lr": torch.tensor(0.1)},
    ],
    ids=str,
)
def test_optimizer_equals_torchs(options: dict[str, Any]) -> None:
    actual, optimizer = train(optim.AdamW, **options)
    expected, torchs = train(torch.optim.AdamW, **options)
    torch.testing.assert_close(actual, expected)
    state, expected_state = optimizer.state_dict(), torchs.state_dict()
    assert state.keys() == expected_state.keys()
    assert state["param_groups"] == expected_state["param_groups"]
    torch.testing.assert_close(state["state"], expected_state["state"])


def test_state_dicts_are_interchangeable() -> None:
    for first, second in [(optim.AdamW, torch.optim.AdamW), (torch.optim.AdamW, optim.AdamW)]:
        param, optimizer = train(first)
        ended = torch.nn.Parameter(param.clone())
        other = second([ended])
        other.load_state_dict(optimizer.state_dict())
        ended.grad = torch.ones_like(ended)
        other.step()
        assert other.state_dict()["state"][0]["step"] == 21


def test_closure_and_missing_gradients() -> None:
    param, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param, unused])

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert param.max() < 1
    assert torch.equal(unused, torch.ones(3))


def test_a_graph_that_saved_the_parameter_notices_the_step() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optim.AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        functional.adamw_(param, *(torch.ones(4) for _ in range(3)), step=torch.tensor(1.0), **HYPERPARAMETERS)


@pytest.mark.parametrize(
    ("default", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str
)
def test_step_counts_in_float32_or_more_and_hooks_run_once(default: torch.dtype, expected: torch.dtype) -> None:
    calls, params = [], []
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    for foreach in (None, True):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = optim.AdamW([param], foreach=foreach)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        torch.set_default_dtype(default)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert optimizer.state[param]["step"].dtype == expected
        params.append(param)
    assert len(calls) == 2
    torch.testing.assert_close(params[0], params[1])


def test_capturable_parameters_on_the_cpu_raise_as_in_torch() -> None:
    param = torch.nn.Parameter(torch.ones(3, device="cpu"))
    param.grad = torch.ones(3, device="cpu")
    with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be on supported devices"):
        optim.AdamW([param], capturable=True).step()


def test_half_parameters_use_torchs_step() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    for param, optimizer_class in zip(params, (optim.AdamW, torch.optim.AdamW), strict=True):
        param.grad = torch.full_like(param, 0.5)
        optimizer_class([param]).step()
    assert torch.equal(params[0], params[1])


def test_sparse_gradients_raise_as_in_torch() -> None:
    param = torch.nn.Parameter(torch.ones(3, 3))
    param.grad = torch.eye(3).to_sparse(1)
    with pytest.raises(RuntimeError, match="sparse"):
        optim.AdamW([param]).step()


def test_a_step_that_raises_does_not_count() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(4)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="exp_avg to have the shape of param"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert torch.equal(param, before)
