"""functional.adamw_ and optim.AdamW against torch.optim.AdamW."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigramx import BigramLanguageModel, functional, ops, optim, reference
from bigramx.data import get_batch
from tests.devices import IN_SIMT, graph_nodes, on_device, skip_if_long
from tests.names import name_of
from tests.tolerances import assert_as_close_as_eager

pytestmark = pytest.mark.usefixtures("device")

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([0, 1, 7, 16, 65 * 65, 100_003]),
    offsets=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4]), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    step=st.sampled_from([1, 2, 1000]),
    beta1=st.sampled_from([0.9, 0.9, 0.4, 0.0]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
def test_equals_reference(
    seed: int,
    size: int,
    offsets: list[int],
    dtype: torch.dtype,
    step: int,
    beta1: float,
    amsgrad: bool,
    maximize: bool,
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
            **{**HYPERPARAMETERS, "beta1": beta1},
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


WRITTEN = ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


def arguments_of_a_step() -> dict[str, Any]:
    tensors = {name: torch.rand(4, 5) for name in (*WRITTEN, "grad")}
    return {**tensors, "step": torch.tensor(1.0), **HYPERPARAMETERS}


@pytest.mark.parametrize("other", [*WRITTEN, "grad", "step"])
@pytest.mark.parametrize("written", WRITTEN)
def test_tensors_that_overlap(written: str, other: str) -> None:
    """As an operation of PyTorch whose result is written over another of its arguments."""
    if written == other:
        return
    call = arguments_of_a_step()
    memory = torch.rand(30)
    call[written] = memory[:20].view(4, 5)
    call[other] = memory[19:20] if other == "step" else memory[10:].view(4, 5)
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"some elements of \w+ and the written-to tensor \w+ refer to a single"):
        functional.adamw_(**call)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("written", WRITTEN)
def test_a_tensor_that_overlaps_itself(written: str) -> None:
    call = arguments_of_a_step()
    call[written] = torch.rand(5).expand(4, 5)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor") as raised:
        call[written].add_(1)
    with pytest.raises(RuntimeError, match=f"{written}: {str(raised.value)[:80]}"):
        functional.adamw_(**call)


@pytest.mark.parametrize("written", WRITTEN)
def test_tensors_that_must_not_change(written: str) -> None:
    call = arguments_of_a_step()
    for bad, message in (
        (torch.rand(4, 5, requires_grad=True), f"in-place operation: {written} requires grad"),
        (inferred(torch.rand(4, 5)), f"{written}: Inplace update to inference tensor outside InferenceMode"),
    ):
        with pytest.raises(RuntimeError, match=message):
            functional.adamw_(**{**call, written: bad})
    with torch.no_grad():
        functional.adamw_(**{**call, written: torch.rand(4, 5, requires_grad=True)})
    with torch.inference_mode():
        functional.adamw_(**{**call, written: torch.rand(4, 5)})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"beta1": 1.0}, ValueError),
        ({"beta1": -0.1}, ValueError),
        ({"beta2": float("nan")}, ValueError),
        ({"beta2": 1.5}, ValueError),
        ({"lr": 1e39}, RuntimeError),
    ],
    ids=str,
)
def test_options_that_have_no_step(options: dict[str, float], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        functional.adamw_(**{**arguments_of_a_step(), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": float("nan")},
        {"lr": float("inf"), "weight_decay": 0.0},
        {"lr": -1.0},
        {"eps": float("inf")},
        {"eps": -1e-3},
        {"weight_decay": float("nan")},
    ],
    ids=str,
)
def test_numbers_that_are_not_finite(options: dict[str, float], dtype: torch.dtype) -> None:
    """In each tensor in turn, and as options."""
    size = 40
    for name in (*WRITTEN, "grad"):
        results = []
        for function in (functional.adamw_, reference.adamw_):
            torch.manual_seed(0)
            call = arguments_of_a_step()
            call.update({key: torch.rand(size, dtype=dtype) for key in (*WRITTEN, "grad")})
            call[name][::3] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).repeat(4)[:14].to(dtype)
            function(**{**call, **options})
            results.append([call[key] for key in WRITTEN])
        torch.testing.assert_close(*results, equal_nan=True)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 2048, 8192, 8193])
def test_steps_of_any_size_are_counted(size: int, dtype: torch.dtype) -> None:
    """A GPU counts the step in the kernel of up to 8192 elements (2048 of float64), before the kernel of more."""
    first = torch.randn(size, dtype=dtype)
    params = [torch.nn.Parameter(first.clone()) for _ in range(2)]
    for param, optimizer_class in zip(params, (optim.AdamW, torch.optim.AdamW), strict=True):
        optimizer = optimizer_class([param], lr=0.1)
        for _ in range(3):
            param.grad = param.detach().sin()
            optimizer.step()
        assert optimizer.state[param]["step"] == 3
    torch.testing.assert_close(*params)


@pytest.mark.skipif(not IN_SIMT, reason="the GPU emulator counts what a CUDA graph would have")
def test_nodes_of_a_training_step() -> None:
    """The batch, the loss with its gradient and the logits, its scale, the update; torch fills the loss's gradient."""
    model = BigramLanguageModel(65)
    optimizer = optim.AdamW(model.parameters())
    tokens = torch.randint(65, (500,))

    def step() -> None:
        idx, targets = get_batch(tokens, 32, 8)
        optimizer.zero_grad()
        _logits, loss = model(idx, targets)
        loss.backward()
        optimizer.step()

    step()
    num_nodes, names = graph_nodes(step)
    without_kernels = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "to", "detach")}
    assert num_nodes == 4
    assert set(names) - without_kernels == {"aten::ones_like", "aten::fill_"}


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


# ------------------------------------------------------------------------------ where the kernel may not be taken

Change = Callable[[torch.optim.AdamW], object]


def param_of(optimizer: torch.optim.Optimizer) -> Tensor:
    param: Tensor = optimizer.param_groups[0]["params"][0]
    return param


def state(**changed: Callable[[dict[str, Any]], object]) -> Change:
    """Changes entries of the parameter's state."""

    def change(optimizer: torch.optim.AdamW) -> None:
        entries = optimizer.state[param_of(optimizer)]
        entries.update({name: make(entries) for name, make in changed.items()})

    return change


def options(**changed: object) -> Change:
    return lambda optimizer: optimizer.param_groups[0].update(changed)


def attributes(**changed: object) -> Change:
    return lambda optimizer: vars(optimizer).update(changed)


def grad(make: Callable[[Tensor], Tensor]) -> Change:
    """Sets another gradient, made from the parameter."""

    def change(optimizer: torch.optim.AdamW) -> None:
        param = param_of(optimizer)
        param.grad_dtype = None  # any
        param.grad = make(param.detach())

    return change


def data(make: Callable[[Tensor], Tensor]) -> Change:
    """Puts other values into the parameter, and into its gradient."""

    def change(optimizer: torch.optim.AdamW) -> None:
        param = param_of(optimizer)
        assert param.grad is not None
        param.data, param.grad.data = make(param.data), make(param.grad.data)

    return change


def both(first: Change, second: Change) -> Change:
    return lambda optimizer: (first(optimizer), second(optimizer))


def inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def without(name: str) -> Change:
    return lambda optimizer: optimizer.state[param_of(optimizer)].pop(name)


def swap(optimizer: torch.optim.AdamW) -> None:
    """The parameter becomes a subclass; its identity stays."""
    param = param_of(optimizer)
    grad, param.grad = param.grad, None
    assert grad is not None
    torch.utils.swap_tensors(param, torch.nn.Parameter(TwoTensor(param.detach().clone(), param.detach().clone())))
    param.grad = TwoTensor(grad, grad)


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=0)[::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


CHANGES: dict[str, Change] = {
    "exp_avg transposed": state(exp_avg=lambda held: transposed(held["exp_avg"])),
    "exp_avg_sq strided": state(exp_avg_sq=lambda held: strided(held["exp_avg_sq"])),
    "exp_avg in float64": state(exp_avg=lambda held: held["exp_avg"].double()),
    "exp_avg_sq in float64": state(exp_avg_sq=lambda held: held["exp_avg_sq"].double()),
    "exp_avg_sq in bfloat16": state(exp_avg_sq=lambda held: held["exp_avg_sq"].bfloat16()),
    "exp_avg of another shape": state(exp_avg=lambda _: torch.zeros(4, 4)),
    "exp_avg a scalar": state(exp_avg=lambda _: torch.zeros(())),
    "exp_avg_sq of fewer elements": state(exp_avg_sq=lambda _: torch.zeros(5, 1)),
    "exp_avg expanded": state(exp_avg=lambda _: torch.zeros(4).expand(5, 4)),
    "exp_avg on meta": state(exp_avg=lambda _: torch.zeros(5, 4, device="meta")),
    "exp_avg a number": state(exp_avg=lambda _: 0.0),
    "exp_avg missing": without("exp_avg"),
    "exp_avg a Parameter": state(exp_avg=lambda held: torch.nn.Parameter(held["exp_avg"])),
    "exp_avg an inference tensor": state(exp_avg=lambda held: inferred(held["exp_avg"])),
    "exp_avg a subclass": state(exp_avg=lambda held: TwoTensor(held["exp_avg"], held["exp_avg"].clone())),
    "exp_avg in use elsewhere": state(exp_avg_sq=lambda held: held["exp_avg"].abs_()),
    "exp_avg a lazy copy": state(exp_avg_sq=lambda held: torch._lazy_clone(held["exp_avg"].abs_())),
    "state of another optimizer": lambda optimizer: optimizer.state.update(
        {param_of(optimizer): {"step": torch.tensor(1.0), "square_avg": torch.zeros(5, 4)}}
    ),
    "step an integer tensor": state(step=lambda _: torch.tensor(3)),
    "step a number": state(step=lambda _: 3),
    "step of shape (1)": state(step=lambda _: torch.ones(1)),
    "step of shape (2)": state(step=lambda _: torch.ones(2)),
    "step in float16": state(step=lambda _: torch.tensor(2047.0).half()),
    "step in float64": state(step=lambda _: torch.tensor(3.0).double()),
    "step on meta": state(step=lambda _: torch.ones((), device="meta")),
    "step missing": without("step"),
    "step -1": state(step=lambda _: torch.tensor(-1.0)),
    "step -0.5": state(step=lambda _: torch.tensor(-0.5)),
    "step NaN": state(step=lambda _: torch.tensor(float("nan"))),
    "step infinite": state(step=lambda _: torch.tensor(float("inf"))),
    "amsgrad from now on": options(amsgrad=True),
    "betas zero, large exp_avg": both(options(betas=(0.0, 0.0)), state(exp_avg=lambda held: held["exp_avg"].mul_(1e9))),
    "betas small": options(betas=(0.1, 0.3)),
    "betas a list": options(betas=[0.8, 0.9]),
    "beta1 one": options(betas=(1.0, 0.9)),
    "beta2 above one": options(betas=(0.9, 1.1)),
    "betas tensors": options(betas=(torch.tensor(0.9), torch.tensor(0.99))),
    "lr an int": options(lr=1),
    "lr a NumPy number": options(lr=numpy.float32(0.1)),
    "lr a tensor": options(lr=torch.tensor(0.1)),
    "lr None": options(lr=None),
    "lr text": options(lr="0.1"),
    "lr too large for float32": options(lr=1e39),
    "lr NaN": options(lr=float("nan")),
    "lr negative": options(lr=-0.1),
    "eps infinite": options(eps=float("inf")),
    "weight_decay NaN": options(weight_decay=float("nan")),
    "lr infinite": options(lr=float("inf"), weight_decay=0.0),
    "weight_decay None": options(weight_decay=None),
    "maximize text": options(maximize="yes"),
    "decay coupled": options(decoupled_weight_decay=False),
    "foreach from now on": options(foreach=True),
    "fused from now on": options(fused=True),
    "found_inf": attributes(found_inf=torch.tensor(0.0)),
    "grad_scale": attributes(grad_scale=torch.tensor(2.0)),
    "found_inf and fused": both(options(fused=True), attributes(found_inf=torch.tensor(1.0))),
    "grad transposed": grad(lambda _: transposed(torch.randn(5, 4))),
    "grad expanded": grad(lambda _: torch.randn(4).expand(5, 4)),
    "grad the parameter": grad(lambda param: param),
    "grad the parameter's memory": grad(lambda param: param.view(4, 5).t()),
    "grad the state": lambda optimizer: setattr(
        param_of(optimizer), "grad", optimizer.state[param_of(optimizer)]["exp_avg"]
    ),
    "grad with a history": grad(lambda _: torch.randn(5, 4).requires_grad_() * 2),
    "grad negated lazily": grad(lambda _: torch.randn(5, 4, dtype=torch.cfloat).conj().imag),
    "grad zero lazily": grad(lambda _: torch._efficientzerotensor(5, 4)),
    "grad a negative view": grad(lambda _: torch._neg_view(torch.randn(5, 4))),
    "exp_avg a negative view": state(exp_avg=lambda held: torch._neg_view(-held["exp_avg"])),
    "exp_avg_sq a negative view": state(exp_avg_sq=lambda held: torch._neg_view(-held["exp_avg_sq"])),
    "step a negative view": state(step=lambda held: torch._neg_view(-held["step"])),
    "largest a negative view": both(
        options(amsgrad=True), state(max_exp_avg_sq=lambda held: torch._neg_view(-held["exp_avg_sq"]))
    ),
    "largest NaN": both(
        options(amsgrad=True),
        state(max_exp_avg_sq=lambda held: held["exp_avg_sq"].clone().fill_diagonal_(float("nan"))),
    ),
    "grad sparse": grad(lambda _: torch.eye(5, 4).to_sparse()),
    "grad a subclass": grad(lambda _: TwoTensor(torch.randn(5, 4), torch.randn(5, 4))),
    "grad an inference tensor": grad(inferred),
    "grad in bfloat16": grad(Tensor.bfloat16),
    "grad in float64": grad(Tensor.double),
    "grad huge": grad(lambda param: param * 3e19),
    "grad NaN": grad(lambda param: param.clone().fill_diagonal_(float("nan"))),
    "param a negative view": data(lambda tensor: torch._neg_view(-tensor)),
    "param transposed": data(transposed),
    "param strided": data(strided),
    "param expanded": data(lambda param: param[:1].expand(5, 4)),
    "param in float64": data(Tensor.double),
    "param in bfloat16": data(Tensor.bfloat16),
    "param of fewer elements": data(lambda param: param[:1].clone()),
    "param swapped for a subclass": swap,
}


def outcome(optimizer_class: type[torch.optim.AdamW], change: Change) -> tuple[Any, Any, tuple[object, str]]:
    """The parameters and their states before and after a step that follows a change, and the error of that step."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(3))]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = optimizer_class([{"params": [param]} for param in params], lr=0.1, weight_decay=0.1)
    optimizer.step()
    change(optimizer)

    def tensors() -> Any:
        return [
            value.clone() if isinstance(value, Tensor) else value
            for param in params
            for value in (param.detach(), *optimizer.state[param].values())
        ]

    before = tensors()
    try:
        optimizer.step()
    except Exception as error:
        return before, tensors(), (type(error), str(error))
    return before, tensors(), (None, "")


def assert_close(actual: list[Any], expected: list[Any], rtol: float | None = None, atol: float | None = None) -> None:
    for one, other in zip(actual, expected, strict=True):
        if not isinstance(one, Tensor):
            assert one == other
        elif not one.is_meta:
            torch.testing.assert_close(one, other, equal_nan=True, rtol=rtol, atol=atol)


@pytest.mark.cpu_only
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_torch_accepts_gives_its_result_and_what_it_refuses_its_error(change: Change) -> None:
    """And a step that raises leaves nothing half changed."""
    before, actual, error = outcome(optim.AdamW, change)
    _before, expected, torchs_error = outcome(torch.optim.AdamW, change)
    assert error == torchs_error
    if error[0] is None:
        assert_close(actual, expected)
    else:
        assert_close(actual, before, rtol=0, atol=0)


@pytest.fixture
def kernel_steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that the kernel has updated."""
    params: list[Tensor] = []
    kernel = ops.adamw_step

    def recorded(param: Tensor, *others: Any) -> None:
        params.append(param)
        kernel(param, *others)

    monkeypatch.setattr(ops, "adamw_step", recorded)
    return params


def test_a_special_parameter_does_not_take_the_kernel_from_others(kernel_steps: list[Tensor]) -> None:
    plain = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))]
    special = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))),
        torch.nn.Parameter(transposed(torch.ones(3, 4))),
    ]
    params = [plain[0], *special, plain[1]]
    optimizer = optim.AdamW(params)
    torchs_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    torchs = torch.optim.AdamW(torchs_params)
    for param in (*params, *torchs_params):
        param.grad = torch.ones_like(param)
    optimizer.step()
    torchs.step()
    assert [id(param) for param in kernel_steps] == [id(param) for param in plain]
    for param, torchs_param in zip(params, torchs_params, strict=True):
        torch.testing.assert_close(param, torchs_param)
        assert optimizer.state[param]["step"] == 1


def test_a_parameter_that_raises_leaves_the_others_alone() -> None:
    """Whichever of them comes first."""
    for order in (1, -1):
        plain, sparse = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))
        plain.grad, sparse.grad = torch.ones(3), torch.eye(3).to_sparse()
        optimizer = optim.AdamW([plain, sparse][::order])
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(plain, torch.ones(3))
        assert optimizer.state[plain].get("step", 0) == 0


class DispatchedOps(TorchDispatchMode):
    """Records the names of the ops that are called under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


class CalledFunctions(TorchFunctionMode):
    """Records the names of the functions that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode_class", [DispatchedOps, CalledFunctions])
def test_a_mode_sees_torchs_step(mode_class: type[DispatchedOps | CalledFunctions], kernel_steps: list[Tensor]) -> None:
    seen = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = optimizer_class([param])
        with mode_class() as mode:
            optimizer.step()
        seen.append([name for name in mode.names if "record_function" not in name])
    assert seen[0] == seen[1]
    assert "lerp_" in seen[0]
    assert kernel_steps == []


@pytest.mark.parametrize("context", [lambda: torch.device("cpu"), torch.inference_mode, torch.enable_grad], ids=name_of)
def test_other_contexts_leave_the_kernel(context: Callable[[], Any], kernel_steps: list[Tensor]) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param])
    with context():
        optimizer.step()
    assert len(kernel_steps) == 1


def test_fake_tensors() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = optim.AdamW([param])
        optimizer.step()
        optimizer.step()
    assert isinstance(optimizer.state[param]["exp_avg"], FakeTensor)


@pytest.mark.once
@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore")  # torch's compiler's, about itself
def test_a_compiled_step_is_torchs(kernel_steps: list[Tensor]) -> None:
    params = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = optimizer_class([param])
        step = torch.compile(lambda step=optimizer.step: step(), backend="eager")
        for _ in range(3):
            param.grad = torch.ones(3)
            step()
        params.append(param)
    assert torch.equal(*params)
    assert kernel_steps == []


@pytest.mark.cpu_only
@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.functionalize], ids=name_of)
def test_transforms_see_torchs_step(transform: Any, kernel_steps: list[Tensor]) -> None:
    outcomes = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = optimizer_class([param])

        def loss(factor: Tensor, optimizer: torch.optim.Optimizer = optimizer, param: Tensor = param) -> Tensor:
            optimizer.step()
            return (factor * param).sum()

        try:
            outcomes.append(str(transform(loss)(torch.ones(2) if transform is torch.vmap else torch.ones(()))))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert kernel_steps == []


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore")  # the profiler's, about itself
def test_a_profile_names_the_step_and_the_kernel() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param])
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#AdamW.step") == 1
    assert names.count("bigramx::adamw_") == 1


@pytest.mark.parametrize("fused", [None, True], ids=["ours", "fused"])
def test_grad_scaler(fused: bool | None) -> None:
    """Steps at an infinite gradient are skipped, and do not count."""
    ended = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = optimizer_class([param], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler(param.device.type, init_scale=8.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[param]["step"] == 2
        ended.append(param)
    torch.testing.assert_close(*ended)


def test_schedulers_and_hooks_of_subclasses() -> None:
    """A scheduler replaces the method ``step``; torch wraps that of a subclass, so that hooks run once."""

    class Subclass(optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for optimizer_class in (optim.AdamW, Subclass):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = optimizer_class([param], lr=0.1, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
        calls: list[int] = []
        optimizer.register_step_pre_hook(lambda *given, calls=calls: calls.append(len(given[1])))
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(param.detach(), torch.full((3,), 1 - lr))
        assert calls == [1]


METHODS = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")


@mock.patch.dict(sys.modules)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("owner", [torch.optim.Optimizer, torch.optim.AdamW])
def test_methods_of_torch_that_others_replace(
    method: str, owner: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run, also where torch's own are called without what keeps its compiler out."""
    sys.modules.pop("torch._dynamo", None)
    original, calls = getattr(owner, method), []

    @functools.wraps(original)
    def replaced(*args: Any) -> Any:
        calls.append(method)
        return original.__wrapped__(*args)

    monkeypatch.setattr(owner, method, replaced)
    optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=False)
    assert calls


def test_freed_memory_does_not_fit() -> None:
    """Memory that has been given back, as that of FSDP's flat parameters between their uses."""
    tensors = [torch.ones(3) for _ in range(4)]
    step = torch.ones(())
    assert ops.adamw_fits(*tensors, None, step)
    tensors[2].untyped_storage().resize_(4)
    assert not ops.adamw_fits(*tensors, None, step)


NOT_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "a negative view": lambda tensor: torch._neg_view(-tensor),
    "zero lazily": lambda tensor: torch._efficientzerotensor(tensor.shape),
    "sparse": Tensor.to_sparse,
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "on meta": lambda tensor: tensor.to("meta"),
    "expanded": lambda tensor: torch.zeros(()).expand(tensor.shape or (2,)),
    "freed": lambda tensor: (copy := tensor.clone(), copy.untyped_storage().resize_(0))[0],
    "of 16 bits": Tensor.half,
}


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore")  # of torch, about quantised tensors
@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_the_entry_past_the_dispatcher_refuses_what_does_not_fit(name: str, make: Callable[[Tensor], Tensor]) -> None:
    """Whoever calls it: nothing is changed, and the step is not counted."""
    tensors = {key: torch.rand(4, 5) for key in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    tensors["step"] = torch.tensor(3.0)
    bad = {**tensors, name: make(tensors[name])}
    is_like_the_others = name == "grad" and make is NOT_PLAIN["expanded"]
    assert ops.adamw_fits(*tensors.values())
    assert ops.adamw_fits(*bad.values()) == is_like_the_others
    if is_like_the_others:
        return
    before = [tensor.clone() for tensor in tensors.values()]
    with pytest.raises(RuntimeError, match=f"adamw_: .*({name}|expected plain tensors)"):
        ops.adamw_step(*bad.values(), 0.1, 0.9, 0.99, 1e-8, 0.1, False)
    assert_close(list(tensors.values()), before, rtol=0, atol=0)
