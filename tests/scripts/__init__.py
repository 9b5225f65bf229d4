"""What training scripts do to an nn.Embedding and the model around it, done alike to the lecture's class and to ours.

A treatment changes the model; a circumstance surrounds the script; a use is what it does with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import bigramx
from bigramx import reference

V, B, T = 13, 4, 5
Model = Any  # either class, or what a script made of it

_generator = torch.Generator().manual_seed(0)
IDX = torch.randint(V, (B, T), generator=_generator)
TARGETS = torch.randint(V, (B, T), generator=_generator)
TOKENS = torch.randint(V, (200,), generator=_generator)


def is_ours(base: type[Model]) -> bool:
    """Whether this is not the lecture's class."""
    return base is bigramx.BigramLanguageModel


def assert_same(compute: Callable[[type[Model]], object], **tolerances: Any) -> None:
    """What is computed from either class is the same, the generator's state afterwards included."""
    results = []
    for base in (bigramx.BigramLanguageModel, reference.BigramLanguageModel):
        torch.manual_seed(1)
        results.append((compute(base), torch.get_rng_state()))
    assert_equal(*results, **tolerances)


def assert_equal(ours: Any, lectures: Any, **tolerances: Any) -> None:
    """Tensors and numbers up to rounding, anything else exactly, in containers of any depth."""
    if isinstance(lectures, dict):
        assert list(ours) == list(lectures)
        ours, lectures = list(ours.values()), list(lectures.values())
    if isinstance(lectures, list | tuple):
        assert len(ours) == len(lectures)
        for one, other in zip(ours, lectures, strict=True):
            assert_equal(one, other, **tolerances)
    elif isinstance(lectures, Tensor | float):
        torch.testing.assert_close(ours, lectures, equal_nan=True, **tolerances)
    else:
        assert ours == lectures


def alike(use: Callable[[Model], object]) -> Callable[[], None]:
    """A test that a use of a new model gives the same results with either class."""

    def test() -> None:
        assert_same(lambda base: use(base(V)))

    return test


def loss_of(model: Model) -> Tensor:
    """The loss of the batch."""
    _logits, loss = model(IDX, TARGETS)
    assert isinstance(loss, Tensor)
    return loss


def grads_of(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients of the parameters by their names."""
    return {name: None if param.grad is None else param.grad.to_dense() for name, param in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def mean_loss(model: Model, tokens: Tensor) -> float:
    """Of all pairs, each a sequence of one token: by our method, or by a call of the lecture's class."""
    if isinstance(model, bigramx.BigramLanguageModel):
        return model.evaluate(tokens)
    is_training = model.training
    model.eval()
    with torch.no_grad():
        loss: Tensor = model(tokens[:-1, None], tokens[1:, None])[1]
    model.train(is_training)
    return loss.item()


def fit(model: Model, tokens: Tensor, *, max_steps: int, eval_interval: int) -> bigramx.History:
    """Our training loop, or for the lecture's class the lecture's."""
    if isinstance(model, bigramx.BigramLanguageModel):
        return bigramx.fit(
            model, tokens, batch_size=B, block_size=T, max_steps=max_steps, lr=0.1, eval_interval=eval_interval
        )
    history, optimizer = bigramx.History(), torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(max_steps + 1):
        if step % eval_interval == 0 or step == max_steps:
            history.train_losses.append(mean_loss(model, tokens))
        if step < max_steps:
            _logits, loss = model(*reference.get_batch(tokens, B, T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.losses.append(loss.item())
    return history
