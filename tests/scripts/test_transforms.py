"""The transforms of torch.func, and forward mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.scripts import IDX, TARGETS, Model, alike

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def functional_loss(model: nn.Module) -> Callable[..., Tensor]:
    """The loss as a function of the parameters."""

    def function(params: dict[str, Tensor], idx: Tensor = IDX, targets: Tensor = TARGETS) -> Tensor:
        loss: Tensor = torch.func.functional_call(model, params, (idx, targets))[1]
        return loss

    return function


@alike
def test_functional_call(model: Model) -> object:
    params = {name: (2 * param).requires_grad_() for name, param in params_of(model).items()}
    loss = functional_loss(model)(params)
    return loss, torch.autograd.grad(loss, list(params.values()))


@alike
def test_func_grad(model: Model) -> object:
    grads, loss = torch.func.grad_and_value(functional_loss(model))(params_of(model))
    return grads, loss


@alike
def test_func_vjp(model: Model) -> object:
    vjp: Any
    loss, vjp, *_no_aux = torch.func.vjp(functional_loss(model), params_of(model))
    return loss, vjp(torch.tensor(3.0, dtype=loss.dtype))


@alike
def test_func_jvp(model: Model) -> object:
    params = params_of(model)
    return torch.func.jvp(functional_loss(model), (params,), ({name: p.cos() for name, p in params.items()},))


@alike
def test_func_linearize(model: Model) -> object:
    params = params_of(model)
    loss, linear = torch.func.linearize(functional_loss(model), params)
    return loss, linear({name: param.cos() for name, param in params.items()})


@alike
def test_forward_mode(model: Model) -> object:
    with torch.autograd.forward_ad.dual_level():
        duals = {n: torch.autograd.forward_ad.make_dual(p, p.cos()) for n, p in params_of(model).items()}
        loss = functional_loss(model)(duals)
        return tuple(torch.autograd.forward_ad.unpack_dual(loss))


@alike
def test_per_sample_gradients(model: Model) -> object:
    function = torch.func.vmap(torch.func.grad(functional_loss(model)), in_dims=(None, 0, 0))
    return function(params_of(model), IDX[:, None], TARGETS[:, None])


@alike
def test_per_sample_losses(model: Model) -> object:
    function = torch.func.vmap(functional_loss(model), in_dims=(None, 0, 0))
    return function(params_of(model), IDX[:, None], TARGETS[:, None])


@alike
def test_ensemble(model: Model) -> object:
    models = [copy.deepcopy(model) for _ in range(3)]
    for seed, member in enumerate(models):
        torch.manual_seed(seed)
        for param in member.parameters():
            nn.init.normal_(param)
    params, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(model).to("meta")

    def losses(params: Any, buffers: Any) -> Tensor:
        loss: Tensor = torch.func.functional_call(skeleton, (params, buffers), (IDX, TARGETS))[1]
        return loss

    values = torch.func.vmap(losses)(params, buffers)
    return values, torch.func.grad(lambda p: torch.func.vmap(losses)(p, buffers).sum())(params)


@alike
def test_func_hessian(model: Model) -> object:
    small = IDX[:1, :2], TARGETS[:1, :2]
    return torch.func.hessian(lambda params: functional_loss(model)(params, *small))(params_of(model))


@alike
def test_func_jacobians(model: Model) -> object:
    params = params_of(model)

    def logits(params: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, params, (IDX, TARGETS))

    return torch.func.jacrev(logits)(params), torch.func.jacfwd(logits)(params)


@alike
def test_functional_jacobian(model: Model) -> object:
    (name, value), *_others = params_of(model).items()

    def loss(weight: Tensor) -> Tensor:
        return functional_loss(model)({name: weight})

    return torch.autograd.functional.hvp(loss, value, value.cos()), torch.autograd.functional.jacobian(loss, value)


@alike
def test_make_fx(model: Model) -> object:
    from torch.fx.experimental.proxy_tensor import make_fx

    grad = torch.func.grad(functional_loss(model))
    return make_fx(lambda params: grad(params))(params_of(model))(params_of(model))


@alike
def test_gradcheck(model: Model) -> object:
    model = copy.deepcopy(model).double()
    (name, value), *_others = params_of(model).items()
    value = value.clone().requires_grad_()

    def outputs(weight: Tensor) -> Any:
        return torch.func.functional_call(model, {name: weight}, (IDX[:1, :3], TARGETS[:1, :3]))

    return torch.autograd.gradcheck(outputs, value), torch.autograd.gradgradcheck(outputs, value)
