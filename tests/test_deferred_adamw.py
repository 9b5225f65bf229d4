"""The steps that rows miss, and the optimizer that defers them, against AdamW on the dense gradient, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bigramx import BigramLanguageModel, fit, ops, optim, reference
from tests.names import name_of
from tests.tolerances import assert_as_close_as_eager

pytestmark = pytest.mark.cpu_only

INF, NAN = float("inf"), float("nan")
OPTIONS = (1e-2, 0.9, 0.999, 1e-8, 1e-2)  # lr, beta1, beta2, eps, weight_decay


def schedule_of(options: tuple[float, ...], num_steps: int) -> Tensor:
    """A schedule whose learning rate falls."""
    schedule = torch.tensor(options, dtype=torch.float64).repeat(num_steps, 1)
    schedule[:, 0] *= torch.linspace(1, 0.3, num_steps)
    return schedule


def take_steps(
    tables: list[Tensor], schedule: Tensor, first: int, grads: list[Tensor] | None = None, maximize: bool = False
) -> None:
    """The same steps of all elements, one after another; where there are no gradients they are zero."""
    for k, options in enumerate(schedule.tolist()):
        grad = torch.zeros_like(tables[0]) if grads is None else grads[k]
        lr, beta1, beta2, eps, weight_decay = options
        step = torch.tensor(float(first + k))
        ops.adamw_(tables[0], grad, *tables[1:], None, step, lr, beta1, beta2, eps, weight_decay, maximize)


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same numbers, signs of zeros included; NaN where there is NaN."""
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
        numbers = ~other.isnan()
        assert torch.equal(tensor.signbit()[numbers], other.signbit()[numbers])


def special(tensor: Tensor, seed: int) -> Tensor:
    """With zeros of both signs, infinities, NaN and denormals among the numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40, -1e-40, 1e38, 1e-30], dtype=tensor.dtype)
    chosen = torch.randint(len(values), tensor.shape, generator=generator)
    return torch.where(torch.rand(tensor.shape, generator=generator) < 0.2, values[chosen], tensor)


@given(
    seed=st.integers(0, 2**32),
    num_columns=st.sampled_from([1, 2, 15, 16, 17, 65, 67, 127, 300]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    before=st.sampled_from([0, 1, 1000]),
    num_steps=st.sampled_from([1, 2, 7, 40, 300]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.99), (0.4, 0.9), (0.0, 0.0), (0.99, 0.5)]),
    lr=st.sampled_from([1e-2, 1.0, 0.0, -1e-2, 1e-12]),
    eps=st.sampled_from([1e-8, 1e-3, 0.0]),
    weight_decay=st.sampled_from([0.0, 1e-2, 10.0]),
    maximize=st.booleans(),
    state=st.sampled_from(["numbers", "zeros", "small", "special"]),
)
def test_missed_steps_leave_the_bits_of_steps(
    seed: int,
    num_columns: int,
    dtype: torch.dtype,
    before: int,
    num_steps: int,
    betas: tuple[float, float],
    lr: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    state: str,
) -> None:
    torch.manual_seed(seed)
    tables = [torch.randn(5, num_columns, dtype=dtype) for _ in range(3)]
    tables[2].square_()
    if state == "zeros":
        tables[1].zero_()
        tables[2][:3] = 0
    elif state == "small":
        tables[1] *= 1e-20
        tables[2] *= 1e-38
    elif state == "special":
        tables = [special(table, seed + k) for k, table in enumerate(tables)]
        tables[2].abs_()
    expected = [table.clone() for table in tables]
    schedule = schedule_of((lr, *betas, eps, weight_decay), num_steps)
    row_steps = torch.tensor([before, before, before + num_steps // 2, before, before + num_steps])
    for row, steps in enumerate(row_steps.tolist()):
        rows = [table[row] for table in expected]
        take_steps(rows, schedule[steps - before :], steps + 1, maximize=maximize)
    ops.deferred_adamw_(*tables, row_steps, schedule, before + num_steps, None, None, maximize)
    assert_same_bits(tables, expected)
    assert row_steps.tolist() == [before + num_steps] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_reference(dtype: torch.dtype) -> None:
    tables = [torch.randn(6, 67), 1e-2 * torch.randn(6, 67), 1e-4 * torch.rand(6, 67)]
    row_steps, schedule = torch.tensor([3, 1, 0, 4, 2, 0]), schedule_of(OPTIONS, 5)
    rows, grad = torch.tensor([4, 0, 5]), torch.randn(3, 67)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        moved = [table.to(dtype, copy=True) for table in tables]
        steps = row_steps.clone()
        function(*moved, steps, schedule, 5, rows, grad.to(dtype), True)
        assert steps.tolist() == [5, 1, 0, 4, 5, 5]
        function(*moved, steps, schedule, 5)
        assert steps.tolist() == [5] * 6
        return moved

    def op(*arguments: Any) -> None:
        torch.ops.bigramx.deferred_adamw_(*arguments)

    twin: Any = reference.deferred_adamw_
    for actual, eager, exact in zip(run(op, dtype), run(twin, dtype), run(twin, torch.float64), strict=True):
        assert_as_close_as_eager(actual, eager, exact)


def test_threads_and_blocks() -> None:
    """More rows than a block has, some met twice; the same with one thread."""
    torch.manual_seed(3)
    tables = [torch.randn(200, 700), torch.randn(200, 700), torch.rand(200, 700)]
    row_steps, schedule = torch.randint(4, (200,)), schedule_of(OPTIONS, 9)
    rows = torch.randint(200, (500,))
    results = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        moved, steps = [table.clone() for table in tables], row_steps.clone()
        ops.deferred_adamw_(*moved, steps, schedule, 9, rows, None, False)
        torch.set_num_threads(before)
        met = torch.zeros(200, dtype=torch.bool)
        met[rows] = True
        assert (steps[met] == 9).all()
        assert torch.equal(steps[~met], row_steps[~met])
        results.append(moved)
    assert_same_bits(*results)


def call(**changes: Any) -> None:
    arguments = {
        **{name: torch.rand(4, 3) for name in ("param", "exp_avg", "exp_avg_sq")},
        "row_steps": torch.tensor([1, 0, 2, 1]),
        "schedule": schedule_of(OPTIONS, 3),
        "step": 3,
        "rows": torch.tensor([2, 0]),
        "grad": torch.rand(2, 3),
        "maximize": False,
    }
    ops.deferred_adamw_(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"param": torch.rand(4)}, RuntimeError, "'param' must be 2-D"),
        ({"param": torch.rand(4, 3).half()}, RuntimeError, "param .*got Half"),
        ({"exp_avg": torch.rand(4, 3).double()}, RuntimeError, "exp_avg .*got Double"),
        ({"exp_avg_sq": torch.rand(3, 3)}, RuntimeError, r"exp_avg_sq to have the shape of param, \[4, 3\]"),
        ({"exp_avg_sq": torch.rand(3, 4).T}, RuntimeError, "exp_avg_sq to be contiguous"),
        ({"param": torch.rand(4, 3, requires_grad=True)}, RuntimeError, "param requires grad"),
        ({"row_steps": torch.zeros(3).long()}, RuntimeError, r"row_steps to be contiguous and of shape \[4\]"),
        ({"row_steps": torch.zeros(4)}, RuntimeError, "row_steps .*got Float"),
        ({"row_steps": torch.tensor([0, 0, -1, 0])}, ValueError, "row_steps of row 2 to be from 0 to 2, got -1"),
        ({"row_steps": torch.tensor([3, 0, 0, 0])}, ValueError, "row_steps of row 0 to be from 0 to 2, got 3"),
        ({"schedule": schedule_of(OPTIONS, 1)}, ValueError, "row_steps of row 0 to be from 2 to 2, got 1"),
        ({"schedule": torch.zeros(3, 4).double()}, RuntimeError, r"5 columns, got shape \[3, 4\]"),
        ({"schedule": torch.zeros(3, 5)}, RuntimeError, "schedule .*got Float"),
        ({"schedule": torch.zeros(0, 5).double()}, ValueError, "schedule to hold the step of grad"),
        ({"schedule": schedule_of((0.1, 1.0, 0.9, 0, 0), 3)}, ValueError, "0 <= beta1 < 1, got 1"),
        ({"schedule": schedule_of((1e39, 0.9, 0.9, 0, 0), 3)}, RuntimeError, "lr: value cannot be converted"),
        ({"step": 2}, ValueError, "at least the number of steps in schedule, 3, got 2"),
        ({"rows": torch.tensor([2, 4])}, IndexError, "rows holds 4 at position 1, expected 0 <= rows < 4"),
        ({"rows": torch.tensor([-1, 2])}, IndexError, "rows holds -1"),
        ({"rows": torch.tensor([2, 2])}, ValueError, "rows to be distinct, .*got 2 twice"),
        ({"rows": torch.tensor([[2, 1]])}, RuntimeError, r"rows to be 1-D, got shape \[1, 2\]"),
        ({"rows": torch.tensor([2.0, 1.0])}, RuntimeError, "rows .*got Float"),
        ({"grad": torch.rand(3, 3)}, RuntimeError, r"grad to have the shape \[2, 3\], got \[3, 3\]"),
        ({"grad": torch.rand(2, 3).double()}, RuntimeError, "grad .*got Double"),
        ({"rows": None}, RuntimeError, r"grad to have the shape \[4, 3\], got \[2, 3\]"),
    ],
    ids=name_of,
)
def test_bad_arguments_change_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = [value for value in changes.values() if isinstance(value, Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(error, match=message):
        call(**changes)
    assert_same_bits([tensor.detach().double() for tensor in tensors], [tensor.double() for tensor in before])


def test_no_rows() -> None:
    call(rows=torch.empty(0, dtype=torch.int64), grad=torch.empty(0, 3))
    ops.deferred_adamw_(*(torch.empty(0, 3) for _ in range(3)), torch.empty(0).long(), schedule_of(OPTIONS, 2), 2)


# ---------------------------------------------------------------------------------------------- the optimizer


def pairs_of(vocab_size: int, num_steps: int, num_pairs: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Batches that meet frequent tokens often, and others seldom."""
    tokens = (torch.rand(num_steps, 2, num_pairs).pow(4) * vocab_size).long()
    return [(idx, targets) for idx, targets in tokens]


Make = Callable[[BigramLanguageModel], torch.optim.Optimizer]


def trained(
    make: Make,
    batches: list[tuple[Tensor, Tensor]],
    vocab_size: int,
    *,
    dtype: torch.dtype | None = None,
    model_class: type[BigramLanguageModel] = BigramLanguageModel,
    between: Callable[[BigramLanguageModel, torch.optim.Optimizer, int], object] = lambda *_: None,
) -> tuple[BigramLanguageModel, torch.optim.Optimizer, list[float]]:
    torch.manual_seed(5)
    model = model_class(vocab_size, dtype=dtype)
    optimizer = make(model)
    model.token_embedding_table.sparse = isinstance(optimizer, optim.DeferredAdamW)
    losses = []
    for k, (idx, targets) in enumerate(batches):
        loss = model(idx, targets, return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        between(model, optimizer, k)
    return model, optimizer, losses


def dense(model: BigramLanguageModel, **options: Any) -> optim.AdamW:
    return optim.AdamW(model.parameters(), **options)


def assert_same_training(
    batches: list[tuple[Tensor, Tensor]], vocab_size: int, options: Any = None, **rest: Any
) -> None:
    options = options or {}
    results = []
    for make in (partial(optim.DeferredAdamW, **options), partial(dense, **options)):
        model, optimizer, losses = trained(make, batches, vocab_size, **rest)
        state = optimizer.state_dict()
        results.append((losses, state, list(model.state_dict().values())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0, equal_nan=True)
    assert_same_bits(results[0][2], results[1][2])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 2, 65, 67, 127, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_equals_adamw_of_the_dense_gradient(vocab_size: int, dtype: torch.dtype) -> None:
    assert_same_training(pairs_of(vocab_size, 60), vocab_size, {"lr": 0.05}, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 0.5, "lr": 0.1},
        {"betas": (0.0, 0.0)},
        {"betas": (0.4, 0.9), "eps": 1e-3},
        {"eps": 0.0},
        {"maximize": True},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    assert_same_training(pairs_of(65, 60), 65, options)


def test_more_steps_than_rows_may_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.DeferredAdamW, "_MOST", 7)
    assert_same_training(pairs_of(300, 40, 2), 300)


def test_a_scheduler_and_options_that_change() -> None:
    schedulers: dict[int, Any] = {}

    def between(_model: BigramLanguageModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 0:
            schedulers[id(optimizer)] = lr_scheduler.ExponentialLR(optimizer, 0.9)
        else:
            schedulers[id(optimizer)].step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.99 if step % 2 else 0.9)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler comes late, and has seen no step
        assert_same_training(pairs_of(127, 50), 127, {"lr": 0.1}, between=between)


LOOKS: dict[str, Callable[[BigramLanguageModel, torch.optim.Optimizer], Any]] = {
    "attribute": lambda model, _: model.token_embedding_table.weight.detach().clone(),
    "state_dict": lambda model, _: model.state_dict()["token_embedding_table.weight"].clone(),
    "state_dict_of_a_parent": lambda model, _: (
        nn.ModuleList([model]).state_dict()["0.token_embedding_table.weight"].clone()
    ),
    "deepcopy": lambda model, _: copy.deepcopy(model).token_embedding_table.weight.detach(),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)).token_embedding_table.weight.detach(),
    "save": lambda model, _: saved(model),
    "evaluate": lambda model, _: model.evaluate(torch.arange(65).repeat(3)),
    "evaluate_counts": lambda model, _: model.evaluate_counts(torch.ones(65, 65).long()),
    "generate": lambda model, _: model.generate(torch.zeros(1, 1).long(), 30, temperature=0),
    "logits": lambda model, _: model(torch.arange(65)[None])[0].detach(),
    "loss": lambda model, _: model(torch.arange(65), torch.arange(65))[1].item(),
    "int32": lambda model, _: model(torch.arange(65).int())[0].detach(),
    "double": lambda model, _: copy.deepcopy(model).double().state_dict(),
    "optimizer": lambda _, optimizer: copy.deepcopy(optimizer.state_dict()),
    "load": lambda model, _: model.load_state_dict(copy.deepcopy(model.state_dict())),
}


def saved(model: BigramLanguageModel) -> Tensor:
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return BigramLanguageModel.load(file).token_embedding_table.weight.detach()


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_whoever_looks_sees_the_table_of_adamw(look: Callable[..., Any]) -> None:
    seen: dict[type, list[Any]] = {}

    def between(model: BigramLanguageModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step % 9 == 5:
            model.token_embedding_table.requires_grad_()
            with torch.random.fork_rng():
                seen.setdefault(type(optimizer), []).append(look(model, optimizer))

    assert_same_training(pairs_of(65, 40, 3), 65, between=between)
    for actual, expected in zip(*seen.values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_rows_are_deferred_until_they_are_read() -> None:
    """Else nothing above shows anything."""
    torch.manual_seed(5)
    model = BigramLanguageModel(65, sparse=True)
    optimizer = optim.DeferredAdamW(model)
    weight = model._table().weight
    idx, targets = torch.tensor([3, 4, 4]), torch.tensor([1, 2, 3])
    for _ in range(2):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        before = weight.detach().clone()
        optimizer.step()
    assert torch.equal(weight[5], before[5])
    assert not torch.equal(weight[3], before[3])
    model(torch.tensor([5]))
    assert not torch.equal(weight[5], before[5])
    assert torch.equal(weight[6], before[6])
    optimizer.catch_up()
    assert not torch.equal(weight[6], before[6])


class WithBias(BigramLanguageModel):
    """Has another parameter, with a dense gradient."""

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, **options)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True) -> Any:
        logits: Any = super().forward(idx)[0]
        logits = logits + self.bias
        return logits if return_logits else None, None if targets is None else nn.functional.cross_entropy(
            logits, targets
        )


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
def test_compiled() -> None:
    def run(compile_model: bool) -> list[Tensor]:
        torch.compiler.reset()
        torch.manual_seed(5)
        model = BigramLanguageModel(65)
        optimizer = optim.DeferredAdamW(model, lr=1e-2)
        model.token_embedding_table.sparse = True
        forward: Any = torch.compile(model, backend="eager") if compile_model else model
        losses = []
        for idx, targets in pairs_of(65, 12):
            loss = forward(idx, targets)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, saved(model)]

    assert_same_bits(run(True), run(False))


def test_other_parameters_take_all_steps() -> None:
    batches = [(idx, torch.arange(12)) for idx, _ in pairs_of(65, 30)]
    assert_same_training(batches, 65, model_class=WithBias)


def test_steps_that_are_not_deferred_are_those_of_adamw() -> None:
    """Of an option without a kernel, of a dense gradient, and back."""

    def between(model: BigramLanguageModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["foreach"] = 10 <= step < 20 or None
        if isinstance(optimizer, optim.DeferredAdamW):
            model._table().sparse = step % 4 != 0

    assert_same_training(pairs_of(65, 40), 65, between=between)


def test_gradients_of_several_batches_add() -> None:
    results = []
    for make in (optim.DeferredAdamW, dense):
        torch.manual_seed(5)
        model = BigramLanguageModel(65)
        optimizer = make(model)
        model.token_embedding_table.sparse = make is not dense
        for first, second in zip(*[iter(pairs_of(65, 20))] * 2, strict=True):
            optimizer.zero_grad()
            losses = [model(*pairs)[1] for pairs in (first, second)]  # both before either's backward
            for loss in losses:
                (loss / 2).backward()
            optimizer.step(lambda: 0.0)
        results.append([model.token_embedding_table.weight.detach()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)  # the sum of two gradients rounds where they are added


def test_a_step_that_raises_is_not_taken() -> None:
    model = BigramLanguageModel(5, sparse=True)
    optimizer = optim.DeferredAdamW(model)
    model(torch.arange(5), torch.arange(5))[1].backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)
    with pytest.raises((ValueError, ZeroDivisionError)):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = before["param_groups"][0]["betas"]
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_states_are_those_of_torchs_adamw() -> None:
    """Loaded into torch.optim.AdamW and back, and pickled; a step without a gradient is none."""
    batches = pairs_of(65, 30)
    model, optimizer, _ = trained(optim.DeferredAdamW, batches, 65)
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    copied = pickle.loads(pickle.dumps(optimizer))
    torch.testing.assert_close(copied.state_dict()["state"], plain.state_dict()["state"], rtol=0, atol=0)


def test_fit_takes_the_same_steps() -> None:
    results: list[Any] = []
    tokens = torch.randint(65, (2000,))
    for make in (lambda model, _: optim.DeferredAdamW(model), lambda _, params: optim.AdamW(params, lr=1e-3)):
        torch.manual_seed(1)
        model = BigramLanguageModel(65, sparse=True)
        model.token_embedding_table.sparse = len(results) == 0
        evaluated: list[float] = []
        history = fit(
            model,
            tokens,
            max_steps=60,
            eval_interval=25,
            batch_size=4,
            block_size=3,
            optimizer=partial(make, model),
            on_evaluation=lambda history, seen=evaluated: seen.append(history.train_losses[-1]),  # type: ignore[misc]
        )
        results.append((history.losses, evaluated, history.table_checksum))
    assert results[0] == results[1]


def test_models_and_tables_without_deferred_steps() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a bigramx.BigramLanguageModel"):
        optim.DeferredAdamW(BigramLanguageModel(3).parameters())  # type: ignore[arg-type]
    model = BigramLanguageModel(3)
    nn.utils.parametrize.register_parametrization(model.token_embedding_table, "weight", nn.Identity())
    with pytest.raises(NotImplementedError, match=r"not implemented for a table that is a .*; use AdamW"):
        optim.DeferredAdamW(model)


def test_hooks_before_the_table_is_read() -> None:
    model, seen = BigramLanguageModel(5), []
    handle = model.register_table_pre_hook(lambda idx: seen.append(None if idx is None else idx.tolist()))
    assert model.is_fused
    model(torch.tensor([1, 2]))
    model(torch.tensor([3]), torch.tensor([1]))
    assert seen == [[1, 2], [3]]
    model.state_dict()
    assert seen[2:] == [None]
    handle.remove()
    model.state_dict()
    assert len(seen) == 3


def test_a_copy_of_model_and_optimizer_takes_steps_of_the_dense_gradient() -> None:
    """It does not know the model's table."""
    model = BigramLanguageModel(7, sparse=True)
    optimizer = optim.DeferredAdamW(model, lr=0.1)
    copied_model, copied = copy.deepcopy((model, optimizer))
    idx = torch.tensor([[1, 2, 3]])
    for each, its in ((model, optimizer), (copied_model, copied)):
        for _ in range(3):
            its.zero_grad()
            each(idx, idx)[1].backward()
            its.step()
    assert torch.equal(copied_model.token_embedding_table.weight, model.token_embedding_table.weight)


def test_apply_sees_rows_that_are_up_to_date() -> None:
    model = BigramLanguageModel(7, sparse=True)
    optimizer = optim.DeferredAdamW(model, lr=0.1)
    idx, seen = torch.tensor([[1, 2, 3]]), list[Tensor]()
    for _ in range(3):
        optimizer.zero_grad()
        model(idx, idx)[1].backward()
        optimizer.step()
    model.apply(lambda module: seen.append(next(module.parameters()).detach().clone()))
    assert torch.equal(seen[0], model.token_embedding_table.weight)
