"""How scripts take gradients of the loss and of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.scripts import IDX, TARGETS, B, Model, T, V, alike, grads_of, loss_of, state_of

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]


@alike
def test_accumulated_gradients(model: Model) -> object:
    for row in range(B):
        (model(IDX[row : row + 1], TARGETS[row : row + 1])[1] / B).backward()
    return grads_of(model)


@alike
def test_retained_graph(model: Model) -> object:
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = {name: grad.clone() for name, grad in grads_of(model).items() if grad is not None}
    loss.backward()
    return first, grads_of(model)


@alike
def test_scaled_loss(model: Model) -> object:
    (loss_of(model) * 2**16).backward()
    for param in model.parameters():
        if param.grad is not None:
            param.grad /= 2**16
    return grads_of(model)


@alike
def test_grad_scaler(model: Model) -> object:
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    return norm, state_of(model), scaler.get_scale()


@alike
def test_clipped_gradients(model: Model) -> object:
    loss_of(model).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    return norm, grads_of(model)


@alike
def test_gradient_penalty(model: Model) -> object:
    loss = loss_of(model)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + sum(grad.square().sum() for grad in grads)).backward()
    return grads, grads_of(model)


@alike
def test_hessian_vector_product(model: Model) -> object:
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), params, create_graph=True)
    return torch.autograd.grad(grads, params, [torch.cos(param) for param in params])


@alike
def test_third_derivative(model: Model) -> object:
    (param, *_others) = model.parameters()
    value = loss_of(model)
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, param, create_graph=True)
        value = grad.pow(3).sum()
    return torch.autograd.grad(value, param)


@alike
def test_double_backward_through_the_logits(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (loss + grad.norm()).backward()
    return grad, grads_of(model)


@alike
def test_gradient_of_the_logits(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    return torch.autograd.grad(loss, logits)


@alike
def test_batched_gradients(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    params = list(model.parameters())
    (per_loss,) = torch.autograd.grad(loss, params[:1], torch.arange(3.0), retain_graph=True, is_grads_batched=True)
    return per_loss, torch.autograd.grad(loss, logits, torch.arange(3.0), is_grads_batched=True)


@alike
def test_gradient_of_some_inputs(model: Model) -> object:
    (param, *_others) = model.parameters()
    loss_of(model).backward(inputs=[param])
    return grads_of(model)


@alike
def test_hook_on_the_logits(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    seen: list[Tensor] = []
    logits.register_hook(lambda grad: seen.append(grad.clone()))
    logits.register_hook(lambda grad: grad.clamp(min=0))
    loss.backward()
    return seen, grads_of(model)


@alike
def test_logits_in_a_second_loss(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    logits.retain_grad()
    (loss - 0.1 * entropy).backward()
    return logits.grad, grads_of(model)


@alike
def test_logits_alone_backward(model: Model) -> object:
    logits, _loss = model(IDX, TARGETS)
    logits.sin().sum().backward()
    return grads_of(model)


@alike
def test_both_backward_one_after_another(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    loss.backward(retain_graph=True)
    logits.sin().sum().backward()
    return grads_of(model)


@alike
def test_logits_changed_in_place(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    logits /= 2
    logits[:, 0] = 0
    loss.backward(retain_graph=True)
    before = {name: grad.clone() for name, grad in grads_of(model).items() if grad is not None}
    logits.square().sum().backward()
    return logits, before, grads_of(model)


@alike
def test_views_of_the_logits(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    last = logits.view(B, T, -1)[:, -1]
    (loss + last.max(-1).values.sum()).backward()
    return last, grads_of(model)


@alike
def test_loss_changed_in_place(model: Model) -> object:
    loss = loss_of(model)
    loss /= 4
    loss.backward()
    return loss, grads_of(model)


@alike
def test_weight_changed_between(model: Model) -> object:
    """Before the backward pass: the gradient is that of the weight of the forward pass."""
    _logits, loss = model(IDX, TARGETS)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0)
    loss.backward()
    return grads_of(model)


@alike
def test_steps_between_two_backward_passes(model: Model) -> object:
    """The second is of the weight of the forward pass, too; a fused step does not say that it changes the weight."""
    fused, plain = (torch.optim.AdamW(model.parameters(), lr=0.1, fused=is_fused) for is_fused in (True, False))
    logits, loss = model(IDX, TARGETS)
    logits.retain_grad()
    loss.backward(retain_graph=True)
    for optimizer in (fused, plain):
        optimizer.step()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
    return logits.grad, grads_of(model)


@alike
def test_gradient_of_the_logits_after_a_step(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    with torch.no_grad():
        model.token_embedding_table.weight.mul_(3)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    model.token_embedding_table.weight.data.mul_(3)
    return grad, torch.autograd.grad(loss, logits)


@alike
def test_second_derivative_after_logits_change(model: Model) -> object:
    logits, loss = model(IDX, TARGETS)
    logits *= 2
    weight = model.token_embedding_table.weight
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    return grad, torch.autograd.grad(grad.square().sum(), weight)


@alike
def test_two_losses_of_one_model(model: Model) -> object:
    (loss_of(model) + 2 * model(TARGETS, IDX)[1]).backward()
    return grads_of(model)


@alike
def test_tied_to_another_layer(model: Model) -> object:
    head = nn.Linear(V, V, bias=False)
    head.weight = next(model.parameters())
    logits, loss = model(IDX, TARGETS)
    (loss + head(logits).logsumexp(-1).mean()).backward()
    return grads_of(model)


@alike
def test_anomaly(model: Model) -> object:
    with torch.autograd.set_detect_anomaly(True):
        loss_of(model).backward()
    return grads_of(model)


@alike
def test_inference_mode(model: Model) -> object:
    with torch.inference_mode():
        logits, loss = model(IDX, TARGETS)
    return logits.is_inference(), loss.is_inference(), logits.clone(), loss.clone()


@alike
def test_no_grad(model: Model) -> object:
    with torch.no_grad():
        logits, loss = model(IDX, TARGETS)
    return logits.requires_grad, loss.requires_grad, logits, loss


@alike
def test_frozen(model: Model) -> object:
    model.requires_grad_(False)
    logits, loss = model(IDX, TARGETS)
    model.requires_grad_(True)
    loss_of(model).backward()
    return logits.requires_grad, loss.requires_grad, loss, grads_of(model)


@alike
def test_autocast(model: Model) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(IDX, TARGETS)
    loss.backward()
    return logits, loss, grads_of(model)


@alike
def test_checkpointed(model: Model) -> object:
    for use_reentrant in (False, True):
        inputs = (IDX, TARGETS)
        _logits, loss = torch.utils.checkpoint.checkpoint(model, *inputs, use_reentrant=use_reentrant)
        if not use_reentrant:
            loss.backward()
    return loss, grads_of(model)


@alike
def test_multi_grad_hook(model: Model) -> object:
    seen: list[Any] = []
    torch.autograd.graph.register_multi_grad_hook(tuple(model.parameters()), lambda grads: seen.append(grads))
    loss_of(model).backward()
    return seen
