"""The native steps of fit, against the same steps in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from bigramx import BigramLanguageModel, fit, ops, reference

pytestmark = pytest.mark.cpu_only  # on a GPU, fit takes its steps in Python


class PythonSteps(BigramLanguageModel):
    """Overrides forward, so that fit takes its steps in Python."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, Tensor | None]:
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("vocab_size", [1, 2, 65, 127, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token_dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_native_steps_equal_those_in_python(vocab_size: int, dtype: torch.dtype, token_dtype: torch.dtype) -> None:
    tokens = torch.randint(min(vocab_size, 256), (2000,)).to(token_dtype)
    results = []
    for model_class in (BigramLanguageModel, PythonSteps):
        torch.manual_seed(1)
        model = model_class(vocab_size, dtype=dtype)
        history = fit(model, tokens, batch_size=5, block_size=7, max_steps=200, eval_interval=120, lr=0.05)
        results.append((model.token_embedding_table.weight.detach(), history))
    (native, native_history), (python, python_history) = results
    torch.testing.assert_close(native, python, rtol=1e-5, atol=1e-5)
    assert native_history.losses == pytest.approx(python_history.losses, abs=1e-5)
    assert (native_history.optimizer_state or {})["state"][0]["step"] == 200
    torch.testing.assert_close(native_history.generator_state, python_history.generator_state)
    torch.testing.assert_close(native_history.optimizer_state, python_history.optimizer_state, rtol=1e-4, atol=1e-7)


def test_hooks_and_overridden_forwards_run_at_each_step() -> None:
    tokens = torch.randint(20, (500,))

    def count_calls(prepare: Any) -> int:
        calls: list[int] = []
        model = BigramLanguageModel(20)
        handle = prepare(model, lambda *_: calls.append(1))
        fit(model, tokens, max_steps=7)
        if handle is not None:
            handle.remove()
        return len(calls)

    def override_forward(model: BigramLanguageModel, called: Any) -> None:
        forward = model.forward
        model.forward = lambda *arguments, **options: (called(), forward(*arguments, **options))[1]  # type: ignore

    assert count_calls(override_forward) == 7
    assert count_calls(lambda model, called: model.register_forward_hook(called)) == 7
    assert count_calls(lambda model, called: model.token_embedding_table.weight.register_hook(called)) == 7
    assert count_calls(lambda _model, called: register_optimizer_step_post_hook(called)) == 7


def test_padding_row_stays() -> None:
    model = BigramLanguageModel(20)
    model.token_embedding_table = torch.nn.Embedding(20, 20, padding_idx=3)
    padding_row = torch.full((20,), 0.5)
    with torch.no_grad():
        model.token_embedding_table.weight[3] = padding_row
    fit(model, torch.randint(20, (500,)), max_steps=50, lr=0.1)
    weight = model.token_embedding_table.weight.detach()
    torch.testing.assert_close(weight[3], padding_row * (1 - 0.1 * 0.01) ** 50)  # only weight decay


def test_a_frozen_table_raises_as_backward_does() -> None:
    model = BigramLanguageModel(20)
    model.requires_grad_(False)
    before = model.token_embedding_table.weight.clone()
    with pytest.raises(RuntimeError, match="does not require grad"):
        fit(model, torch.randint(20, (500,)), max_steps=5)
    assert torch.equal(model.token_embedding_table.weight, before)


def test_leaves_no_gradient_and_graphs_notice_the_steps() -> None:
    model = BigramLanguageModel(20)
    weight = model.token_embedding_table.weight
    loss = (weight**2).sum()
    weight.grad = torch.ones_like(weight)
    fit(model, torch.randint(20, (500,)), max_steps=5)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def fit_op(**changes: Any) -> int:
    arguments: dict[str, Any] = {
        "weight": torch.zeros(5, 5),
        "exp_avg": torch.zeros(5, 5),
        "exp_avg_sq": torch.zeros(5, 5),
        "step": torch.zeros(()),
        "losses": torch.zeros(4, dtype=torch.float64),
        "tokens": torch.randint(5, (100,)),
        "batch_size": 2,
        "block_size": 3,
        "padding_idx": -1,
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "max_seconds": 100.0,
    }
    steps: int = ops.fit_(*{**arguments, **changes}.values())
    return steps


@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_equals_its_reference(dtype: torch.dtype, padding_idx: int) -> None:
    tokens, results = torch.randint(7, (300,)), []
    functions: list[Any] = [ops.fit_, reference.fit_]
    for function in functions:
        torch.manual_seed(2)
        tensors = [torch.randn(7, 7, dtype=dtype), *(torch.zeros(7, 7, dtype=dtype) for _ in range(2))]
        step, losses = torch.tensor(3.0), torch.zeros(40, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        taken = function(
            *tensors, step, losses, tokens, 4, 5, padding_idx, 0.05, 0.9, 0.99, 1e-8, 0.1, 100.0, generator
        )
        assert taken == 40
        assert step == 43
        results.append([*tensors, losses, generator.get_state()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    stopped = functions[1](*tensors, step, losses, tokens, 4, 5, -1, 0.05, 0.9, 0.99, 1e-8, 0.1, 0.0)
    assert stopped == 1


def test_a_call_ends_after_the_step_that_exceeds_its_time() -> None:
    losses = torch.full((10,), -1.0, dtype=torch.float64)
    assert fit_op(losses=losses, max_seconds=0.0) == 1
    assert losses[0] > 0
    assert (losses[1:] == -1).all()
    assert fit_op() == 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, RuntimeError, r"'weight' must be square.*\[5, 4\]"),
        ({"weight": torch.zeros(5, 5).half()}, RuntimeError, "param .*got Half"),
        ({"exp_avg": torch.zeros(5)}, RuntimeError, r"exp_avg to have the shape of param, \[5, 5\], got \[5\]"),
        ({"losses": torch.zeros(4)}, RuntimeError, "losses .*got Float"),
        ({"losses": torch.zeros(0, dtype=torch.float64)}, RuntimeError, r"not empty, got shape \[0\]"),
        ({"tokens": torch.zeros(3, 3).long()}, RuntimeError, r"tokens to be 1-D, got shape \[3, 3\]"),
        ({"tokens": torch.full((100,), 5)}, IndexError, "idx holds 5"),
        ({"block_size": 100}, ValueError, "more than block_size = 100 tokens, got 100"),
        ({"step": torch.tensor(-1.0)}, ValueError, "step >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_op(**changes)
