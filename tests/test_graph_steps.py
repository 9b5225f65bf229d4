"""The steps of fit on a GPU, against the same steps in Python.

Without a GPU a graph is replayed by calling what it would have captured.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode

from bigramx import BigramLanguageModel, History, fit, graph_steps, ops, optim
from bigramx.data import TokenShards
from bigramx.graph_steps import GraphSteps
from bigramx.graph_steps import _Graphs as Graphs  # as it is, while tests replace it
from bigramx.steps import Steps
from tests.devices import IN_SIMT, nothing_waits
from tests.test_fit import CONTEXTS, OPTIMIZERS, SEEN, UNSEEN, OneMore, PythonSteps, accumulator_of, removed_hooks

NUM_STEPS = 11 if IN_SIMT else 150


class ReplayedByCalling:
    """In place of graphs."""

    def __init__(self, _device: torch.device) -> None:
        pass

    def capture(self, run: Any) -> Callable[[], object]:
        """What runs it, and as a graph counts no versions of the tensors."""

        def replay() -> None:
            with preserve_version_counter(run.func.__self__._tensors):
                run()

        return replay


class Launches:
    """How many steps were captured, and how many launched at a time."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.launched: list[int] = []


@pytest.fixture(autouse=True)
def launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """On a GPU, or where none is on the CPU."""
    launches = Launches()
    if device.type == "cpu":
        monkeypatch.setattr("bigramx.steps.runs_graphs", lambda _weight: True)
        monkeypatch.setattr(Steps, "has_native_steps", lambda _steps: False)
        monkeypatch.setattr(graph_steps, "_Graphs", ReplayedByCalling)
    monkeypatch.setattr(graph_steps, "_MAX_SECONDS", float("inf"))
    capture, launch = graph_steps._Graphs.capture, GraphSteps.launch

    def recorded_capture(graphs: Any, run: Any) -> Any:
        launches.captured.append(run.args[0])
        return capture(graphs, run)

    def recorded_launch(steps: GraphSteps, pairs: tuple[Tensor, Tensor], count: int) -> None:
        launch(steps, pairs, count)
        launches.launched.append(pairs[0].numel() // 32)

    monkeypatch.setattr(graph_steps._Graphs, "capture", recorded_capture)
    monkeypatch.setattr(GraphSteps, "launch", recorded_launch)
    return launches


pytestmark = pytest.mark.usefixtures("device")


def weight_of(model: BigramLanguageModel) -> Tensor:
    return model.token_embedding_table.weight


def new_model(kind: type[BigramLanguageModel] = BigramLanguageModel, **options: Any) -> BigramLanguageModel:
    torch.manual_seed(1)
    return kind(20, **options)


def run(model: BigramLanguageModel, tokens: Any = None, **options: Any) -> History:
    """With 32 tokens a step."""
    sizes = {"batch_size": 8, "block_size": 4, "max_steps": NUM_STEPS, "eval_interval": 60, "lr": 0.05}
    generator = torch.Generator().manual_seed(3)
    return fit(model, TOKENS if tokens is None else tokens, **{**sizes, "generator": generator, **options})


TOKENS = torch.randint(20, (900,), generator=torch.Generator().manual_seed(2))


def assert_same_run(
    model: BigramLanguageModel, history: History, expected: BigramLanguageModel, other: History
) -> None:
    """The same batches, and the rest up to rounding: a GPU computes its constants of AdamW itself."""
    torch.testing.assert_close(history.generator_state, other.generator_state)
    assert history.losses == pytest.approx(other.losses, abs=1e-5)
    assert (history.steps, history.step) == (other.steps, other.step)
    torch.testing.assert_close(weight_of(model), weight_of(expected))
    torch.testing.assert_close(history.optimizer_state, other.optimizer_state, check_device=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("place", ["host", "device", "shards"])
def test_equal_those_in_python(dtype: torch.dtype, place: str, launches: Launches) -> None:
    tokens: Any = TOKENS.to(torch.uint16)
    if place == "device":
        tokens = tokens.to(torch.get_default_device())
    elif place == "shards":
        tokens = TokenShards([tokens[:200], tokens[200:]])
    model, expected = new_model(dtype=dtype), new_model(PythonSteps, dtype=dtype)
    history, other = run(model, tokens), run(expected, tokens)
    assert sum(launches.launched) == NUM_STEPS
    assert_same_run(model, history, expected, other)
    assert (history.optimizer_state or {})["state"][0]["step"] == NUM_STEPS


@pytest.mark.cpu_only
def test_are_taken_in_powers_of_two_up_to_the_next_evaluation(launches: Launches) -> None:
    steps: list[int] = []
    run(new_model(), max_steps=150, eval_interval=60, on_progress=lambda history: steps.append(history.step))
    assert launches.launched == [1, 2, 4, 8, 16, 16, 8, 4, 1, 32, 16, 8, 4, 16, 8, 4, 2]
    assert launches.captured == [2, 4, 8, 16, 32]
    assert 60 in steps
    assert 120 in steps


@pytest.mark.cpu_only
def test_are_as_many_as_run_for_a_twentieth_of_a_second(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def later() -> float:
        nonlocal now
        seconds_a_step = 0.004 if sum(launches.launched) < 30 else 0.03
        now += seconds_a_step * (launches.launched[-1] if launches.launched else 0)
        return now

    monkeypatch.setattr(graph_steps, "_MAX_SECONDS", 0.05)
    monkeypatch.setattr("bigramx.graph_steps.time.monotonic", later)
    run(new_model(), max_steps=40, eval_interval=100)
    assert launches.launched == [1, 2, 4, 8, 8, 8, 4, 2, 1, 1, 1]


def test_batches_take_bounded_memory(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "_MOST_TOKENS", 128)
    run(new_model(), max_steps=15)
    assert launches.launched == [1, 2, 4, 4, 4]
    run(new_model(), batch_size=129, block_size=1, max_steps=2)
    assert launches.launched[5:] == [4, 4]  # of 32 tokens


FORBIDDEN = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "to")
ON_DEVICE = {
    "add",
    "arange",
    "copy_",
    "detach",
    "empty",
    "fill_",
    "memset",
    "select",
    "slice",
    "split",
    "zero_",
    "alias",
}


class OnDevice(TorchDispatchMode):
    """Allows ops alone for which the host neither waits nor copies."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace == "bigramx" or func.overloadpacket.__name__ in ON_DEVICE, func
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu_only
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_no_step(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, checked = GraphSteps.launch, []

    def watched(steps: GraphSteps, pairs: tuple[Tensor, Tensor], count: int) -> None:
        with monkeypatch.context() as patch, OnDevice(), nothing_waits():  # type: ignore[no-untyped-call]
            for name in FORBIDDEN:
                patch.setattr(Tensor, name, None)
            launch(steps, pairs, count)
        checked.append(count)

    monkeypatch.setattr(GraphSteps, "launch", watched)
    run(new_model())
    assert sum(launches.launched) == NUM_STEPS
    assert checked[:3] == [0, 1, 3]


def test_padding_row_stays(launches: Launches) -> None:
    model = new_model()
    model.token_embedding_table = nn.Embedding(20, 20, padding_idx=3, device=torch.get_default_device())
    with torch.no_grad():
        weight_of(model)[3] = 0.5
    run(model)
    assert sum(launches.launched) == NUM_STEPS
    torch.testing.assert_close(weight_of(model)[3], torch.full((20,), 0.5) * (1 - 0.05 * 0.01) ** NUM_STEPS)


def test_leave_no_gradient_and_autograd_notices_them() -> None:
    model, graphs = new_model(), []

    def look(history: History) -> None:
        graphs.append((weight_of(model) ** 2).sum())
        weight_of(model).grad = torch.ones_like(weight_of(model))

    run(model, on_progress=look, max_steps=7)
    for graph in graphs[:-1]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()
    assert len(graphs) == 3
    weight_of(model).grad = torch.ones_like(weight_of(model))
    run(model, max_steps=3)
    assert weight_of(model).grad is None


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("options", [{"betas": (0.5, 0.75)}, {"eps": 0.1, "weight_decay": 0.5}], ids=str)
def test_options_of_the_optimizer(options: dict[str, Any], launches: Launches) -> None:
    if torch.get_default_device().type == "cuda":
        options = {**options, "capturable": True}
    model, expected = new_model(), new_model(PythonSteps)
    histories = [run(kind, optimizer=partial(optim.AdamW, **options)) for kind in (model, expected)]
    assert sum(launches.launched) == NUM_STEPS
    assert_same_run(model, histories[0], expected, histories[1])


def test_what_a_callback_changes_holds_from_there(launches: Launches) -> None:
    """Other numbers, and other memory, which a graph would not know."""
    made: list[Any] = []

    def make(params: Any) -> optim.AdamW:
        optimizer = optim.AdamW(params, lr=0.05)
        made.append((optimizer, params[0]))
        return optimizer

    def change(history: History) -> None:
        optimizer, weight = made[-1]
        if history.step == 4:
            optimizer.param_groups[0]["lr"] = 0.01
        elif history.step == 8:
            with torch.no_grad():
                weight.data = 2 * weight
            optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"] / 2

    options: dict[str, Any] = {"lr": None, "optimizer": make, "eval_interval": 4, "on_evaluation": change}
    model, expected = new_model(), new_model(PythonSteps)
    histories = [run(kind, **options) for kind in (model, expected)]
    assert sum(launches.launched) == NUM_STEPS
    assert launches.captured.count(2) == 3
    assert_same_run(model, histories[0], expected, histories[1])


def test_a_run_may_be_resumed_on_another_device(launches: Launches) -> None:
    model, whole = new_model(), new_model()
    half = run(model, max_steps=NUM_STEPS // 2)
    on_cpu = new_model(PythonSteps, device="cpu")
    on_cpu.load_state_dict(model.state_dict())
    launches.launched.clear()
    resumed = [run(kind, resume=half, generator=torch.Generator()) for kind in (model, on_cpu)]
    assert sum(launches.launched) == NUM_STEPS - NUM_STEPS // 2
    expected = run(whole)
    for history in resumed:
        assert history.losses == pytest.approx(expected.losses, abs=1e-5)
        torch.testing.assert_close(history.generator_state, expected.generator_state)
    torch.testing.assert_close(weight_of(model), weight_of(whole))
    torch.testing.assert_close(weight_of(on_cpu), weight_of(whole).cpu())


# ------------------------------------------------------------------------------------------------ exceptions


class LostError(Exception):
    """Raised somewhere within a step."""


def failing(call: Callable[..., Any], number: int, is_done: bool, error: type[BaseException]) -> Callable[..., Any]:
    """The function, whose call of this number raises, before or after it has done its work."""
    calls: list[int] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        result = call(*arguments, **options) if is_done or len(calls) != number else None
        if len(calls) == number:
            raise error
        return result

    return fail


@pytest.mark.parametrize("error", [LostError, KeyboardInterrupt])
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(("owner", "name"), [(Steps, "_draw"), (GraphSteps, "launch")])
def test_an_exception_leaves_whole_steps(
    owner: Any, name: str, is_done: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the batches are drawn, before the steps run, and while they do."""
    model, whole = new_model(), new_model()
    expected = run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), 3, is_done, error))
        if error is KeyboardInterrupt:
            history = run(model)
            assert history.interrupted
        else:
            with pytest.raises(LostError) as caught:
                run(model)
            history = caught.value.history  # type: ignore[attr-defined]
    assert history.step == (7 if (name, is_done) == ("launch", True) else 3)
    assert (history.optimizer_state or {})["state"][0]["step"] == history.step
    resumed = run(model, resume=history, generator=torch.Generator())
    assert resumed.losses == expected.losses
    assert torch.equal(weight_of(model), weight_of(whole))


@pytest.mark.parametrize("is_done", [False, True])
def test_a_first_step_left_in_its_middle_is_not_resumed(is_done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no graph's: AdamW may have been, and no loss recorded."""
    model = new_model()
    with monkeypatch.context() as patch:
        patch.setattr(ops, "adamw_", failing(ops.adamw_, 1, is_done, LostError))
        with pytest.raises(LostError) as caught:
            run(model)
    history = caught.value.history  # type: ignore[attr-defined]
    assert history.step == 0
    assert (history.table_checksum is None) == is_done
    if not is_done:
        expected = run(new_model())
        assert run(model, resume=history).losses == expected.losses


def test_ctrl_c_waits_for_the_steps(keyboard_interrupt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, launch, counts = new_model(), GraphSteps.launch, []

    def interrupted(steps: GraphSteps, pairs: tuple[Tensor, Tensor], count: int) -> None:
        counts.append(count)
        if len(counts) == 3:
            signal.raise_signal(signal.SIGINT)
        launch(steps, pairs, count)

    monkeypatch.setattr(GraphSteps, "launch", interrupted)
    history = run(model)
    assert history.interrupted
    assert history.step == 7


# -------------------------------------------------------------------------------------- where no graph is taken


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_runs_in_python(
    error: type[RuntimeError], launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_graphs: object, run: Any) -> None:
        launches.captured.append(run.args[0])
        raise error

    monkeypatch.setattr(graph_steps._Graphs, "capture", fail)
    model, expected = new_model(), new_model(PythonSteps)
    histories = [run(kind) for kind in (model, expected)]
    assert launches.launched == [1]
    assert launches.captured == [2]
    assert_same_run(model, histories[0], expected, histories[1])


def test_more_steps_than_are_counted(launches: Launches) -> None:
    """AdamW counts in float32."""

    def make(params: Any) -> optim.AdamW:
        optimizer = optim.AdamW(params)
        state = optim.state_of(optimizer, params[0], optimizer.param_groups[0])
        state["step"].fill_(2**24 - 100)
        return optimizer

    assert run(new_model(), lr=None, optimizer=make, max_steps=5).step == 5
    assert launches.launched == []


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2)}], ids=str
)
def test_parts_of_a_step_that_no_kernel_has(options: dict[str, Any], launches: Launches) -> None:
    assert run(new_model(), max_steps=5, **options).step == 5
    assert launches.launched == []


def test_other_dtypes(launches: Launches) -> None:
    assert run(new_model(dtype=torch.bfloat16), max_steps=5).step == 5
    assert launches.launched == []


@pytest.mark.parametrize("is_enabled", [False, True])
def test_autocast(is_enabled: bool, launches: Launches) -> None:
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16, enabled=is_enabled):
        assert run(new_model(), max_steps=5).step == 5
    assert sum(launches.launched) == (0 if is_enabled else 5)


@pytest.mark.cpu_only
@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
def test_what_a_step_would_show_is_shown(change: Any, launches: Launches) -> None:
    model = new_model()
    model.__dict__["kept"] = change(model)
    assert run(model, max_steps=3).step == 3
    assert launches.launched == []


@pytest.mark.cpu_only
@pytest.mark.parametrize("change", [value for value in UNSEEN.values() if value is not None])
def test_what_no_step_would_show(change: Any, launches: Launches) -> None:
    model = new_model()
    model.__dict__["kept"] = change(model)
    run(model, max_steps=3)
    if change in (accumulator_of, removed_hooks) and torch.__version__ < "2.13":
        return
    assert sum(launches.launched) == 3


@pytest.mark.cpu_only
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_whose_steps_are_their_own(optimizer: Any, launches: Launches) -> None:
    run(new_model(), lr=None, optimizer=optimizer, max_steps=3)
    assert launches.launched == []


@pytest.mark.cpu_only
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.filterwarnings("ignore:.*(Anomaly Detection has been enabled|Profiler clears events):UserWarning")
def test_contexts_that_show_or_change_the_steps(context: Any, launches: Launches) -> None:
    with context():
        assert run(new_model(), max_steps=3).step == 3
    assert launches.launched == []


def test_parameters_that_the_model_adds(launches: Launches) -> None:
    run(OneMore(), max_steps=3)
    assert launches.launched == []


# ------------------------------------------------------------------------------------------------- the capture


class StubOfGraph:
    """In place of torch.cuda.CUDAGraph: notes what torch.cuda.graph asks of it."""

    calls: list[Any]

    def capture_begin(self, pool: object, capture_error_mode: str = "global", **_options: Any) -> None:
        """As PyTorch's."""
        self.calls.append((pool, capture_error_mode))

    def capture_end(self) -> None:
        """As PyTorch's."""
        self.calls.append("end")

    def replay(self) -> None:
        """As PyTorch's."""
        self.calls.append("replay")


@pytest.mark.cpu_only
@pytest.mark.parametrize("is_failing", [False, True])
def test_what_is_asked_of_torch(is_failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    StubOfGraph.calls = calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StubOfGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: object())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def work() -> None:
        calls.append("run")
        if is_failing:
            raise LostError

    graphs = Graphs(torch.device("cuda"))
    begin = ((0, 7), "thread_local")
    if is_failing:
        with pytest.raises(LostError):
            graphs.capture(work)
        assert calls == [begin, "run", "end"]
        return
    replays = [graphs.capture(work) for _ in range(2)]
    for replay in replays:
        replay()
    assert calls == [begin, "run", "end", begin, "run", "end", "replay", "replay"]
