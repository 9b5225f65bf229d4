"""Models that scripts have changed: what they compute, learn, generate and evaluate."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import bigramx
from tests.scripts import (
    IDX,
    TARGETS,
    TOKENS,
    Model,
    assert_same,
    fit,
    grads_of,
    is_ours,
    loss_of,
    mean_loss,
    state_of,
)  # fmt: skip
from tests.scripts.treatments import (
    NEEDS_LOGITS,
    TOLERANCES,
    TREATMENTS,
)  # fmt: skip

# What PyTorch says of its own older functions, and of hooks on modules whose inputs are integers.
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore:.*(deprecated|no inputs require gradients)"),
]


def treatments_but(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in TREATMENTS if name not in names])


def seen_in(model: nn.Module) -> list[object]:
    return [module.__dict__.get("seen") for module in model.modules()]


@treatments_but()
def test_forward_and_backward(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = TREATMENTS[name](base)
        logits_alone, no_loss = model(IDX)
        assert no_loss is None
        logits, loss = model(IDX, targets=TARGETS)
        logits.retain_grad()
        logits.register_hook(lambda grad: None if grad is None else 2 * grad)
        loss.backward()
        return logits_alone, logits, loss, logits.grad, grads_of(model), seen_in(model), state_of(model)

    assert_same(compute, **TOLERANCES.get(name, {}))


@treatments_but(*NEEDS_LOGITS)
def test_without_logits(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = TREATMENTS[name](base)
        if type(model).forward is bigramx.BigramLanguageModel.forward:
            logits, loss = model(IDX, TARGETS, return_logits=False)
            assert logits is None
        else:
            loss = loss_of(model)
        loss.backward()
        return loss, grads_of(model), state_of(model)

    assert_same(compute, **TOLERANCES.get(name, {}))


@treatments_but()
def test_training(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model, losses = TREATMENTS[name](base), []
        optimizer = (bigramx.optim.AdamW if is_ours(base) else torch.optim.AdamW)(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, state_of(model)

    assert_same(compute, **TOLERANCES.get(name, {}))


@treatments_but()
def test_generate(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = TREATMENTS[name](base)
        torch.manual_seed(2)
        return model.generate(IDX, max_new_tokens=20), state_of(model)

    assert_same(compute)


@treatments_but()
def test_evaluate(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = TREATMENTS[name](base)
        few, many = TOKENS[:50], TOKENS.repeat(5)  # not counted, and counted
        return [torch.tensor(mean_loss(model, tokens)) for tokens in (few, many)]

    assert_same(compute, **TOLERANCES.get(name, {}))


@treatments_but()
def test_fit(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = TREATMENTS[name](base)
        history = fit(model, TOKENS, max_steps=5, eval_interval=2)
        return torch.tensor(history.losses), torch.tensor(history.train_losses), state_of(model)

    assert_same(compute, **TOLERANCES.get(name, {}))
