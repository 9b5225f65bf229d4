"""The native steps of fit, against the same steps in Python."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigramx import BigramLanguageModel, History, fit, ops, optim, reference

pytestmark = pytest.mark.cpu_only  # test_graph_steps.py has those on a GPU


class PythonSteps(BigramLanguageModel):
    """Overrides forward, so that fit takes its steps in Python."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, Tensor | None]:
        return super().forward(*arguments, **options)


@pytest.fixture(params=["all", "deferred"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether all rows take each native step, as those of small tables do, or those that the batch meets."""
    monkeypatch.setattr("bigramx.steps._DEFERRED_FROM", 0 if request.param == "deferred" else 2**62)
    return str(request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(("vocab_size", "num_steps"), [(1, 200), (2, 200), (65, 200), (127, 200), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token_dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64])
def test_native_steps_equal_those_in_python(
    vocab_size: int, num_steps: int, dtype: torch.dtype, token_dtype: torch.dtype
) -> None:
    """To the bit: they are those of the same kernels."""
    tokens = torch.randint(min(vocab_size, 256), (2000,)).to(token_dtype)
    results = []
    for model_class in (BigramLanguageModel, PythonSteps):
        torch.manual_seed(1)
        model = model_class(vocab_size, dtype=dtype)
        history = fit(model, tokens, batch_size=5, block_size=7, max_steps=num_steps, eval_interval=30, lr=0.05)
        results.append((model.token_embedding_table.weight.detach(), history))
    (native, native_history), (python, python_history) = results
    assert torch.equal(native, python)
    assert native_history.losses == python_history.losses
    assert native_history.train_losses == pytest.approx(python_history.train_losses, abs=1e-5)
    assert (native_history.optimizer_state or {})["state"][0]["step"] == num_steps
    torch.testing.assert_close(native_history.generator_state, python_history.generator_state)
    torch.testing.assert_close(native_history.optimizer_state, python_history.optimizer_state, rtol=0, atol=0)


def weights_by_threads(vocab_size: int, num_steps: int, tokens: Tensor, **options: Any) -> list[Tensor]:
    results, num_threads = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        model = BigramLanguageModel(vocab_size)
        fit(model, tokens, max_steps=num_steps, **options)
        results.append(weight_of(model).detach())
    torch.set_num_threads(num_threads)
    return results


@pytest.mark.usefixtures("rows")
def test_the_number_of_threads_changes_nothing() -> None:
    tokens = (torch.rand(3000).pow(4) * 1200).long()
    one, two = weights_by_threads(1200, 12, tokens, eval_interval=5)
    assert torch.equal(one, two)


def test_more_steps_than_rows_may_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no batch meets catch up on the way, and at the end."""
    tokens, results = torch.randint(20, (500,)), []
    for smallest in (0, 2**62):
        monkeypatch.setattr("bigramx.steps._DEFERRED_FROM", smallest)
        torch.manual_seed(1)
        model = BigramLanguageModel(70)
        history = fit(model, tokens, max_steps=2500, eval_interval=2500, optimizer=partial(optim.AdamW, lr=0.01))
        results.append((weight_of(model).detach(), history))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].losses == results[1][1].losses


@pytest.mark.once
@pytest.mark.usefixtures("rows")
def test_callbacks_and_handlers_see_whole_tables() -> None:
    """Of all steps that the optimizer has counted: equal to the table of a run of so many steps."""
    tokens = torch.randint(65, (500,))
    seen: list[tuple[int, Tensor]] = []
    optimizers: list[optim.AdamW] = []

    def new() -> BigramLanguageModel:
        torch.manual_seed(1)
        return BigramLanguageModel(65)

    def make(params: Any) -> optim.AdamW:
        optimizers.append(optim.AdamW(params, lr=1e-2))
        return optimizers[-1]

    def look(*_: object) -> None:
        state = optimizers[0].state.get(weight_of(model), {"step": 0})
        seen.append((int(state["step"]), weight_of(model).detach().clone()))

    def on_progress(_history: History) -> bool:
        look()
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        return len(seen) > 12

    model = new()
    before = signal.signal(signal.SIGALRM, look)
    generator = torch.Generator().manual_seed(3)
    try:
        with pytest.raises(EndedError):
            fit(
                model,
                tokens,
                max_steps=10**6,
                eval_interval=4000,
                generator=generator,
                optimizer=make,
                on_evaluation=look,
                on_progress=lambda history: on_progress(history) and raised(EndedError()),
            )
        look()
        assert signal.getsignal(signal.SIGALRM) is look
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    steps = sorted({step for step, _ in seen})
    assert len(steps) > 5
    expected, other, history = {}, new(), None
    generator.manual_seed(3)
    for step in steps:
        history = fit(other, tokens, max_steps=step, eval_interval=10**7, generator=generator, resume=history)
        expected[step] = weight_of(other).detach().clone()
    for step, weight in seen:
        assert torch.equal(weight, expected[step]), step


class EndedError(Exception):
    """Raised by a callback."""


def raised(error: Exception) -> bool:
    raise error


def test_hooks_and_overridden_forwards_run_at_each_step() -> None:
    tokens = torch.randint(20, (500,))

    def count_calls(prepare: Any) -> int:
        calls: list[int] = []
        model = BigramLanguageModel(20)
        handle = prepare(model, lambda *_: calls.append(1) if model.training else None)  # evaluation calls them, too
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


class Doubled(optim.AdamW):
    """A subclass that takes each step twice."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().step(closure)


class OwnTable(nn.Embedding):
    """A table with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OneMore(BigramLanguageModel):
    """A model with another parameter."""

    def __init__(self) -> None:
        super().__init__(20)
        self.bias = nn.Parameter(torch.zeros(20))


class Functions(TorchFunctionMode):
    """A mode that sees the functions of torch that are called."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """A mode that sees the ops that are dispatched."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def native_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps that native calls took."""
    taken: list[int] = []
    fit_ = ops.fit_

    def counted(*arguments: Any) -> int:
        taken.append(fit_(*arguments))
        return taken[-1]

    monkeypatch.setattr(ops, "fit_", counted)
    return taken


def new_model(change: Callable[[BigramLanguageModel], object] | None = None) -> BigramLanguageModel:
    model = BigramLanguageModel(20)
    if change is not None:
        model.__dict__["kept"] = change(model)  # graphs, nodes and handles
    return model


def weight_of(model: BigramLanguageModel) -> Tensor:
    return model.token_embedding_table.weight


def accumulator_of(model: BigramLanguageModel) -> Any:
    return torch.autograd.graph.get_gradient_edge(weight_of(model)).node


def hook_on_accumulator(model: BigramLanguageModel, with_graph: bool) -> object:
    node, graph = accumulator_of(model), weight_of(model).sum() if with_graph else None
    return node, graph, node.register_hook(lambda *_: None)


def removed_hooks(model: BigramLanguageModel) -> object:
    node = accumulator_of(model)
    for handle in (
        node.register_prehook(lambda *_: None),
        weight_of(model).register_hook(lambda gradient: gradient),
        model.register_forward_hook(lambda *_: None),
    ):
        handle.remove()
    return node


def tie(model: BigramLanguageModel) -> None:
    model.head = nn.Linear(20, 20, bias=False)
    model.head.weight = model.token_embedding_table.weight


def replace_table(table: nn.Embedding) -> Callable[[BigramLanguageModel], None]:
    def change(model: BigramLanguageModel) -> None:
        model.token_embedding_table = table

    return change


def parametrized(model: BigramLanguageModel) -> None:
    parametrize.register_parametrization(model.token_embedding_table, "weight", nn.Identity())


SEEN = {
    "forward hook": lambda model: model.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda model: model.register_full_backward_hook(lambda *_: None),
    "table's hook": lambda model: model.token_embedding_table.register_forward_hook(lambda *_: None),
    "table's backward hook": lambda model: model.token_embedding_table.register_full_backward_hook(lambda *_: None),
    "weight's hook": lambda model: weight_of(model).register_hook(lambda gradient: gradient),
    "weight's other hook": lambda model: weight_of(model).register_post_accumulate_grad_hook(lambda _weight: None),
    "accumulator's hook": partial(hook_on_accumulator, with_graph=False),
    "accumulator's hook and a graph": partial(hook_on_accumulator, with_graph=True),
    "parametrization": parametrized,
    "pruning": lambda model: prune.random_unstructured(model.token_embedding_table, "weight", amount=0.5),
    "max_norm": replace_table(nn.Embedding(20, 20, max_norm=1.0)),
    "scale_grad_by_freq": replace_table(nn.Embedding(20, 20, scale_grad_by_freq=True)),
    "own table": replace_table(OwnTable(20, 20)),
    "compiled in place": lambda model: model.compile(backend="eager"),
    "ignored token": lambda model: setattr(model, "ignore_index", 3),
    "class weight": lambda model: setattr(model, "class_weight", torch.rand(20)),
    "label smoothing": lambda model: setattr(model, "label_smoothing", 0.1),
}
UNSEEN = {
    "nothing": None,
    "a graph": lambda model: (weight_of(model).sum(), (weight_of(model) * 2).sum()),
    "an accumulator": accumulator_of,
    "hooks that are removed": removed_hooks,
    "a gradient": lambda model: weight_of(model).sum().backward(),
    "tied": tie,
    "padding_idx": replace_table(nn.Embedding(20, 20, padding_idx=3)),
    "makemore's mark": lambda model: setattr(model, "ignore_index", -1),
    "shared memory": lambda model: model.share_memory(),
    "eval mode": lambda model: model.eval(),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
def test_what_a_step_would_show_is_shown(change: Any, native_steps: list[int]) -> None:
    assert fit(new_model(change), torch.randint(20, (500,)), max_steps=3).step == 3
    assert native_steps == []


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_what_no_step_would_show(change: Any, native_steps: list[int]) -> None:
    fit(new_model(change), torch.randint(20, (500,)), max_steps=3)
    if change in (accumulator_of, removed_hooks) and torch.__version__ < "2.13":
        return  # there PyTorch does not show that a node whose object someone holds has no hooks
    assert sum(native_steps) == 3


def with_step_replaced(params: Any) -> optim.AdamW:
    optimizer = optim.AdamW(params, lr=0.1)
    optimizer.step = optimizer.step  # type: ignore
    return optimizer


OPTIMIZERS = {
    "torch's": torch.optim.AdamW,
    "subclass": Doubled,
    "amsgrad": partial(optim.AdamW, amsgrad=True),
    "maximize": partial(optim.AdamW, maximize=True),
    "foreach": partial(optim.AdamW, foreach=True),
    "tensor": partial(optim.AdamW, lr=torch.tensor(0.1)),
    "groups": lambda params: optim.AdamW([{"params": params}, {"params": [nn.Parameter(torch.ones(2))]}]),
    "other parameters": lambda params: optim.AdamW([*params, nn.Parameter(torch.ones(2))]),
    "step replaced": with_step_replaced,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_whose_steps_are_their_own(optimizer: Any, native_steps: list[int]) -> None:
    tokens = torch.randint(20, (500,))
    torch.manual_seed(1)
    model = BigramLanguageModel(20)
    fit(model, tokens, max_steps=9, optimizer=optimizer)
    assert native_steps == []
    torch.manual_seed(1)
    expected = BigramLanguageModel(20)
    lecture_loop(expected, optimizer([*expected.parameters()]), tokens, 9)
    assert torch.equal(weight_of(model), weight_of(expected))


def lecture_loop(model: BigramLanguageModel, optimizer: Any, tokens: Tensor, max_steps: int) -> None:
    for _ in range(max_steps):
        _logits, loss = model(*reference.get_batch(tokens, 32, 8))
        optimizer.zero_grad(set_to_none=True)
        assert loss is not None
        loss.backward()
        optimizer.step()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("options", [{"betas": (0.5, 0.75)}, {"eps": 0.1}, {"weight_decay": 0.5}, {"lr": 0.2}], ids=str)
def test_options_of_a_native_optimizer(options: Any, native_steps: list[int]) -> None:
    tokens = torch.randint(20, (500,))
    torch.manual_seed(1)
    model = BigramLanguageModel(20)
    fit(model, tokens, max_steps=9, optimizer=partial(optim.AdamW, **options))
    assert sum(native_steps) == 9
    torch.manual_seed(1)
    expected = BigramLanguageModel(20)
    lecture_loop(expected, torch.optim.AdamW(expected.parameters(), **options), tokens, 9)
    torch.testing.assert_close(weight_of(model), weight_of(expected), rtol=1e-5, atol=1e-5)


def test_parameters_that_the_model_adds(native_steps: list[int]) -> None:
    model = OneMore()
    fit(model, torch.randint(20, (500,)), max_steps=3)
    assert native_steps == []
    assert torch.equal(model.bias, torch.zeros(20))


@contextlib.contextmanager
def replaced(owner: Any, name: str) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: original(*arguments, **options))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def global_hook() -> Iterator[None]:
    handle = register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS: dict[str, Callable[[], Any]] = {
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": partial(torch.autocast, "cpu"),
    "saved tensors": torch.autograd.graph.save_on_cpu,
    "profiler": torch.profiler.profile,
    "functions": Functions,
    "dispatches": Dispatches,
    "global hook": global_hook,
    "forward replaced": partial(replaced, BigramLanguageModel, "forward"),
    "step replaced": partial(replaced, optim.AdamW, "step"),
    "zero_grad replaced": partial(replaced, optim.AdamW, "zero_grad"),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.filterwarnings("ignore:.*(Anomaly Detection has been enabled|Profiler clears events):UserWarning")
def test_contexts_that_show_or_change_the_steps(context: Any, native_steps: list[int]) -> None:
    tokens = torch.randint(20, (500,))
    with context():
        assert fit(new_model(), tokens, max_steps=3).step == 3
    assert native_steps == []
    fit(new_model(), tokens, max_steps=3)
    assert sum(native_steps) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, partial(torch.device, "meta")])
def test_contexts_that_do_not(context: Any, native_steps: list[int]) -> None:
    model, tokens = new_model(), torch.randint(20, (500,))
    with context():
        history = fit(model, tokens, max_steps=30)
    assert sum(native_steps) == 30
    assert history.train_losses[1] < history.train_losses[0]


def test_a_gradient_of_another_dtype_raises_as_in_torchs_own_step(native_steps: list[int]) -> None:
    model, tokens = new_model(), torch.randint(20, (500,))
    weight_of(model).grad_dtype = torch.bfloat16
    for optimizer in (None, torch.optim.AdamW):
        with pytest.raises(RuntimeError, match="dtype"):
            fit(model, tokens, max_steps=3, optimizer=optimizer)
    assert native_steps == []


@pytest.mark.usefixtures("rows")
def test_what_a_callback_changes_holds_from_there(native_steps: list[int]) -> None:
    model, calls = BigramLanguageModel(20), []

    def on_evaluation(history: History) -> None:
        if history.step == 4:
            model.register_forward_hook(lambda *_: calls.append(1))

    tokens = torch.randint(20, (500,))
    fit(model, tokens, max_steps=10, eval_interval=4, on_evaluation=on_evaluation)
    assert sum(native_steps) == 4
    assert len(calls) >= 6


@pytest.mark.usefixtures("rows")
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
        "generator": None,
        "row_steps": None,
    }
    steps: int = ops.fit_(*{**arguments, **changes}.values())
    return steps


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_equals_its_reference(dtype: torch.dtype, padding_idx: int, deferred: bool) -> None:
    tokens, results = torch.randint(7, (300,)), []
    functions: list[Any] = [ops.fit_, reference.fit_]
    for function in functions:
        torch.manual_seed(2)
        tensors = [torch.randn(7, 7, dtype=dtype), *(torch.zeros(7, 7, dtype=dtype) for _ in range(2))]
        step, losses = torch.tensor(3.0), torch.zeros(40, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        options, row_steps = (0.05, 0.9, 0.99, 1e-8, 0.1), torch.tensor([0, 1, 2, 3, 0, 0, 1]) if deferred else None
        taken = function(*tensors, step, losses, tokens, 4, 5, padding_idx, *options, 100.0, generator, row_steps)
        if row_steps is not None:
            schedule = torch.tensor(options, dtype=torch.float64).expand(43, 5)
            ops.deferred_adamw_(*tensors, row_steps, schedule, 43, None, None, False)
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
        ({"weight": torch.zeros(5, 5).half()}, RuntimeError, "weight .*got Half"),
        ({"exp_avg": torch.zeros(5)}, RuntimeError, r"exp_avg to have the shape of param, \[5, 5\], got \[5\]"),
        ({"losses": torch.zeros(4)}, RuntimeError, "losses .*got Float"),
        ({"losses": torch.zeros(0, dtype=torch.float64)}, RuntimeError, r"not empty, got shape \[0\]"),
        ({"tokens": torch.zeros(3, 3).long()}, RuntimeError, r"tokens to be 1-D, got shape \[3, 3\]"),
        ({"tokens": torch.full((100,), 5)}, IndexError, "idx holds 5"),
        ({"block_size": 100}, ValueError, "more than block_size = 100 tokens, got 100"),
        ({"step": torch.tensor(-1.0)}, ValueError, "step to be a whole number >= 0, got -1"),
        ({"step": torch.tensor(float("nan"))}, ValueError, "step to be a whole number >= 0, got nan"),
        ({"step": torch.tensor(0)}, RuntimeError, "step .*got Long"),
        ({"batch_size": 2**61, "block_size": 8}, RuntimeError, r"batch_size \* block_size .*, got 2305843009213693952"),
        ({"batch_size": 2**57, "block_size": 8}, RuntimeError, r"Storage size calculation overflowed"),
        ({"batch_size": 2**50, "block_size": 8}, RuntimeError, r"memory"),
        ({"batch_size": -(2**63)}, ValueError, "batch_size and block_size >= 1, got -9223372036854775808"),
        ({"padding_idx": 5}, ValueError, "padding_idx must be within the 5 rows"),
        ({"padding_idx": -(2**63)}, ValueError, "padding_idx must be within the 5 rows"),
        ({"beta1": 1.0}, ValueError, "0 <= beta1 < 1, got 1"),
        ({"row_steps": torch.zeros(4).long()}, RuntimeError, r"row_steps to be contiguous and of shape \[5\]"),
        ({"row_steps": torch.zeros(5)}, RuntimeError, "row_steps .*got Float"),
        ({"row_steps": torch.tensor([0, 0, 1, 0, 0])}, ValueError, "0 <= row_steps <= 0, .*got 0 to 1"),
        ({"row_steps": torch.tensor([0, 0, -1, 0, 0])}, ValueError, "0 <= row_steps <= 0, .*got -1 to 0"),
        ({"weight": torch.zeros(5, 1).expand(5, 5)}, RuntimeError, "weight: .*more than one element"),
        ({"exp_avg_sq": torch.zeros(1).expand(5, 5)}, RuntimeError, "exp_avg_sq: .*more than one element"),
        ({"losses": torch.zeros(1, dtype=torch.float64).expand(4)}, RuntimeError, "losses: .*more than one element"),
        ({"losses": torch.zeros(4, dtype=torch.float64, requires_grad=True)}, RuntimeError, "losses requires grad"),
    ],
    ids=str,
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_op(**changes)


@pytest.mark.parametrize("written", ["weight", "exp_avg", "exp_avg_sq", "step", "losses"])
@pytest.mark.parametrize("other", ["weight", "exp_avg", "exp_avg_sq", "step", "losses", "tokens"])
def test_tensors_that_overlap(written: str, other: str) -> None:
    if written == other:
        return
    memory = torch.zeros(200, dtype=torch.float64)
    parts = {
        "step": memory[24],
        "losses": memory[24:28],
        "tokens": memory.view(torch.int64)[20:80],
        **{name: memory[:25].view(5, 5) for name in ("weight", "exp_avg", "exp_avg_sq")},
    }
    tables = {name: torch.zeros(5, 5, dtype=torch.float64) for name in ("weight", "exp_avg", "exp_avg_sq")}
    with pytest.raises(RuntimeError, match=r"and the written-to tensor \w+ refer to a single memory location"):
        fit_op(**{**tables, written: parts[written], other: parts[other]})
    assert not memory.any()
