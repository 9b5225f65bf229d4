"""The steps of fit: optimizers, schedulers, clipping, wrappers; and how a run goes on, whatever ended it."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import bigramx
from bigramx import BigramLanguageModel, History, fit, optim, reference
from bigramx.data import TokenShards
from tests import processes

pytestmark = pytest.mark.cpu_only  # of the GPU's steps, test_training.py

TOKENS = torch.randint(20, (500,), generator=torch.Generator().manual_seed(1))
SGD = partial(torch.optim.SGD, lr=1.0, momentum=0.9)


class Lectures(BigramLanguageModel):
    """A subclass with the lecture's forward, in which the logits are scaled."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = 4 * self.token_embedding_table(idx)
        if targets is None:
            return logits, None
        logits = logits.view(-1, logits.size(-1))
        return logits, nn.functional.cross_entropy(logits, targets.view(-1))


def new_model(kind: type[BigramLanguageModel] = BigramLanguageModel, **options: Any) -> BigramLanguageModel:
    torch.manual_seed(5)
    return kind(20, **options)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def weight_of(model: BigramLanguageModel) -> Tensor:
    return model.token_embedding_table.weight.detach()


def lecture_loop(
    model: nn.Module,
    max_steps: int,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    scheduler: Callable[[Optimizer], Any] | None = None,
    max_grad_norm: float | None = None,
) -> list[float]:
    """The lecture's loop, with what people add to it."""
    generator, losses = seeded(), []
    made = optimizer(model.parameters())
    schedule = None if scheduler is None else scheduler(made)
    for _ in range(max_steps):
        idx, targets = reference.get_batch(TOKENS, 32, 8, generator=generator)
        _logits, loss = model(idx, targets)
        made.zero_grad(set_to_none=True)
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        made.step()
        losses.append(loss.item())
        if schedule is not None:
            schedule.step(*[losses[-1]] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
    return losses


PARTS: dict[str, dict[str, Any]] = {
    "a class": {"optimizer": torch.optim.Adam},
    "a partial": {"optimizer": SGD},
    "a lambda": {"optimizer": lambda params: torch.optim.RMSprop(params, lr=0.1)},
    "clipping": {"optimizer": SGD, "max_grad_norm": 0.01},
    "clipping AdamW": {"optimizer": optim.AdamW, "max_grad_norm": 0.01},
    "a cosine": {"optimizer": SGD, "scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=20)},
    "one cycle": {"optimizer": SGD, "scheduler": partial(lr_scheduler.OneCycleLR, max_lr=2.0, total_steps=20)},
    "a lambda of steps": {"scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))},
    "a plateau": {"optimizer": SGD, "scheduler": partial(lr_scheduler.ReduceLROnPlateau, patience=2)},
    "all": {
        "optimizer": SGD,
        "scheduler": partial(lr_scheduler.ExponentialLR, gamma=0.5),
        "max_grad_norm": torch.tensor(0.1),
    },
}


@pytest.mark.parametrize("kind", [BigramLanguageModel, Lectures])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_equals_the_lectures_loop_with_the_same_parts(parts: dict[str, Any], kind: type[BigramLanguageModel]) -> None:
    expected = new_model(kind)
    losses = lecture_loop(expected, 20, **{"optimizer": optim.AdamW, **parts})
    model = new_model(kind)
    parts = {"lr": 1e-3, **parts} if "optimizer" not in parts else parts  # the default of torch's AdamW
    history = fit(model, TOKENS, max_steps=20, generator=seeded(), **parts)
    assert history.losses == losses
    assert torch.equal(weight_of(model), weight_of(expected))


def test_the_learning_rate_is_given_to_the_factory() -> None:
    rates: list[dict[str, Any]] = []

    def factory(params: Any, **options: Any) -> Optimizer:
        rates.append(options)
        return torch.optim.SGD(params, **{"lr": 3.0, **options})

    for lr in (None, 0.25):
        history = fit(new_model(), TOKENS, max_steps=2, optimizer=factory, lr=lr)
        assert (history.optimizer_state or {})["param_groups"][0]["lr"] == (lr or 3.0)
    assert rates == [{}, {"lr": 0.25}]


def test_a_scheduler_follows_each_step() -> None:
    steps: list[int] = []

    class Recorded(lr_scheduler.ConstantLR):
        def step(self, epoch: int | None = None) -> None:
            steps.append(self.last_epoch)
            super().step(epoch)

    fit(new_model(), TOKENS, max_steps=5, eval_interval=2, scheduler=Recorded)
    assert steps == [-1, 0, 1, 2, 3, 4]


def test_evaluation_calls_the_forward_of_a_subclass() -> None:
    model = new_model(Lectures)
    history = fit(model, TOKENS, TOKENS[100:], max_steps=9, eval_interval=4)
    assert history.steps == [0, 4, 8, 9]
    with torch.no_grad():
        for tokens, losses in ((TOKENS, history.train_losses), (TOKENS[100:], history.val_losses)):
            assert losses[-1] == pytest.approx(model(tokens[:-1], tokens[1:])[1].item(), rel=1e-5)


def test_evaluation_that_a_subclass_overrides() -> None:
    class Own(BigramLanguageModel):
        def evaluate(self, tokens: Tensor | TokenShards) -> float:
            return float(len(tokens))

    history = fit(new_model(Own), torch.randint(20, (2000,)), TOKENS, max_steps=1)
    assert (history.train_losses, history.val_losses) == ([2000.0] * 2, [500.0] * 2)


def test_dropout_does_not_evaluate() -> None:
    class WithDropout(BigramLanguageModel):
        def __init__(self, vocab_size: int) -> None:
            super().__init__(vocab_size)
            self.dropout = nn.Dropout(0.5)

        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
            logits = self.dropout(self.token_embedding_table(idx))
            return logits, None if targets is None else nn.functional.cross_entropy(
                logits.flatten(0, -2), targets.flatten()
            )

    evaluations = [fit(new_model(WithDropout), TOKENS, max_steps=0).train_losses[0] for _ in range(2)]
    assert evaluations[0] == evaluations[1] == pytest.approx(new_model().evaluate(TOKENS), rel=1e-5)
    model = new_model(WithDropout)
    fit(model, TOKENS, max_steps=3, eval_interval=1)
    assert model.dropout.training


@pytest.mark.parametrize(
    "options", [{"ignore_index": 3}, {"class_weight": torch.arange(20.0)}, {"label_smoothing": 0.5}], ids=str
)
def test_a_loss_with_options(options: dict[str, Any]) -> None:
    expected, model = new_model(**options), new_model(**options)
    losses = lecture_loop(expected, 9)
    history = fit(model, TOKENS, max_steps=9, generator=seeded(), lr=1e-3)
    assert history.losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(weight_of(model), weight_of(expected), rtol=1e-5, atol=1e-5)
    assert history.train_losses[-1] == model.evaluate(TOKENS)
    assert history.optimum != history.optimum


class NeedsEpoch(lr_scheduler.ConstantLR):
    """As some libraries have them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:  # type: ignore[override]
        super().step(epoch)


def test_a_constructor_that_does_not_call_ours() -> None:
    class Own(BigramLanguageModel):
        def __init__(self, vocab_size: int) -> None:
            nn.Module.__init__(self)
            self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    model, expected = new_model(Own), new_model()
    histories = [fit(each, TOKENS, max_steps=9, generator=seeded()) for each in (model, expected)]
    assert histories[0].losses == histories[1].losses
    assert torch.equal(weight_of(model), weight_of(expected))


def test_an_optimizer_that_has_a_scheduler_already() -> None:
    """Of a run before, for example: a scheduler puts a function around the optimizer's step."""
    model = new_model()
    optimizer = SGD(model.parameters())
    for _ in range(2):
        history = fit(
            model,
            TOKENS,
            max_steps=3,
            optimizer=lambda _parameters: optimizer,
            scheduler=partial(lr_scheduler.StepLR, step_size=2),
        )
        assert history.step == 3


class StepAsProperty(lr_scheduler.StepLR):
    @property
    def step(self) -> Any:
        return super().step


class StaticStep(lr_scheduler.StepLR):
    @staticmethod
    def step(needed: int) -> None:  # type: ignore[override]
        pass


def test_a_scheduler_whose_step_is_a_property() -> None:
    assert fit(new_model(), TOKENS, max_steps=3, scheduler=partial(StepAsProperty, step_size=2)).step == 3


class OfTheLogits(nn.DataParallel[BigramLanguageModel]):
    """A wrapper that makes a loss of its own."""

    def forward(self, idx: Tensor, targets: Tensor, **options: Any) -> Any:
        logits, loss = self.module(idx, targets, **options)
        return logits, loss + 0.1 * logits.logsumexp(-1).square().mean()


def test_a_wrapper_that_needs_the_logits() -> None:
    model, patched = new_model(), nn.DataParallel(new_model())
    original = patched.forward
    vars(patched)["forward"] = lambda idx, targets: original(idx, targets)
    assert fit(OfTheLogits(model), TOKENS, max_steps=3, generator=seeded()).step == 3
    assert fit(patched, TOKENS, max_steps=3, generator=seeded()).step == 3


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an optimizer": (
        {"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])},
        TypeError,
        "expected optimizer to be callable, got SGD",
    ),
    "a name": ({"optimizer": "SGD"}, TypeError, "expected optimizer to be callable, got str"),
    "no optimizer": ({"optimizer": list}, TypeError, "make a torch.optim.Optimizer, got <class 'list'>"),
    "a closure": ({"optimizer": torch.optim.LBFGS}, TypeError, r"got LBFGS, whose step\(\) needs closure"),
    "no scheduler": ({"scheduler": lambda _: None}, TypeError, "torch.optim.lr_scheduler, got <class 'NoneType'>"),
    "a static step": (
        {"scheduler": lambda _optimizer: object.__new__(StaticStep)},
        TypeError,
        r"got StaticStep, whose step\(\) needs needed",
    ),
    "an epoch": ({"scheduler": NeedsEpoch}, TypeError, r"got NeedsEpoch, whose step\(\) needs epoch"),
    "a number": ({"scheduler": 3}, TypeError, "expected scheduler to be callable, got int"),
    "a callback": ({"on_progress": 3}, TypeError, "expected on_progress to be callable, got int"),
    "another callback": ({"on_evaluation": "x"}, TypeError, "expected on_evaluation to be callable, got str"),
    "a norm of 0": ({"max_grad_norm": 0}, ValueError, "max_grad_norm > 0, got 0.0"),
    "a norm of nan": ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm > 0, got nan"),
    "a path": ({"resume": "history.safetensors"}, TypeError, r"a History, as History.load\(path\) reads it, got str"),
    "a seed": ({"generator": 3}, TypeError, "expected generator to be a torch.Generator, got int"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_parts(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = new_model()
    with pytest.raises(error, match=message):
        fit(model, TOKENS, max_steps=3, **options)
    assert torch.equal(weight_of(model), weight_of(new_model()))


def test_sparse_gradients_are_not_clipped() -> None:
    with pytest.raises(NotImplementedError, match="clip_grad_norm_ takes no sparse gradients"):
        fit(new_model(sparse=True), TOKENS, max_grad_norm=1.0)


class Twice(nn.Module):
    """A module of someone else's around the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BigramLanguageModel(20)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (
            reference.BigramLanguageModel(20),
            "got bigramx.reference.BigramLanguageModel; change the import: from bigramx ",
        ),
        (nn.DataParallel(reference.BigramLanguageModel(20)), "BigramLanguageModel; change the import"),
        (BigramLanguageModel, "got the class bigramx.model.BigramLanguageModel$"),
        (nn.Linear(20, 20), "got torch.nn.modules.linear.Linear$"),
        (nn.DataParallel(nn.Linear(20, 20)), "got torch.nn.modules.linear.Linear$"),
        (Twice(), "got tests.test_steps.Twice$"),
        ("x", "got builtins.str$"),
        (None, "got builtins.NoneType$"),
        (torch.zeros(20, 20), "got torch.Tensor$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_models(model: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^expected model to be a bigramx.BigramLanguageModel, or one in .*{got}"):
        fit(model, TOKENS)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("kind", [BigramLanguageModel, Lectures])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        partial(torch.compile, backend="eager"),
        lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
        lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["DDP", "DataParallel", "compile", "compile(DDP)", "DDP(compile)"],
)
def test_wrapped_models(one_process: None, wrap: Callable[[nn.Module], Any], kind: type[BigramLanguageModel]) -> None:
    expected, model = new_model(kind), new_model(kind)
    losses = lecture_loop(expected, 12, SGD, max_grad_norm=1.0)
    wrapper = wrap(model)
    calls: list[int] = []
    wrapper.register_forward_hook(lambda _module, _arguments, output: calls.append(output[0].size(0)))
    options: dict[str, Any] = {"optimizer": SGD, "max_grad_norm": 1.0, "generator": seeded()}
    history = fit(wrapper, TOKENS, TOKENS, max_steps=5, eval_interval=2, **options)
    history = fit(wrapper, TOKENS, TOKENS, max_steps=12, eval_interval=2, resume=history, **options)
    assert calls == [32 * 8] * 12
    assert history.losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(weight_of(model), weight_of(expected))
    assert history.train_losses[-1] == history.val_losses[-1] == model.evaluate(TOKENS)


WORKER = """
import os, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from bigramx import BigramLanguageModel, History, fit

folder, rank = sys.argv[1], int(sys.argv[2])
warnings.filterwarnings("ignore", message=".*returned a view tensor")  # fully_shard, of the lecture's logits
warnings.filterwarnings("ignore", category=FutureWarning)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for wrap in (
    nn.parallel.DistributedDataParallel,
    lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
):
    torch.manual_seed(0)
    tokens = torch.randint(20, (500,))
    model = wrap(BigramLanguageModel(20))
    options = {"optimizer": torch.optim.AdamW, "max_grad_norm": 1.0, "eval_interval": 3}
    history = fit(model, tokens, max_steps=7, lr=0.1, generator=torch.Generator().manual_seed(rank), **options)
    history.save(f"{folder}/{rank}")
    history = History.load(f"{folder}/{rank}")
    history = fit(model, tokens, max_steps=12, generator=torch.Generator(), resume=history, **options)
    print([history.losses, history.train_losses])
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # torch's own threads may abort a process that ends
"""


def run_two(folder: Path) -> list[list[list[list[float]]]]:
    """The losses and the evaluations of two processes, for each wrapper."""
    outputs: list[Any] = [None, None]

    def run(rank: int) -> None:
        outputs[rank] = processes.run([sys.executable, "-W", "error", "-c", WORKER, str(folder), str(rank)])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs:
        assert output.returncode == 0, output.stderr
    return [[json.loads(line) for line in output.stdout.splitlines()] for output in outputs]


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    losses: list[list[float]] = [[], []]
    for _ in range(12):
        both = [model(*reference.get_batch(tokens, 32, 8, generator=generator))[1] for generator in generators]
        optimizer.zero_grad()
        ((both[0] + both[1]) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for rank, loss in enumerate(both):
            losses[rank].append(loss.item())
    for rank, results in enumerate(run_two(tmp_path)):
        assert len(results) == 3
        for actual, evaluations in results:
            assert actual == pytest.approx(losses[rank], abs=1e-5)
            assert len(evaluations) == 6
            assert evaluations[-1] == pytest.approx(model.evaluate(tokens), abs=1e-5)


class LostError(Exception):
    """Raised once, by whatever part of a run."""


class FailingModel(Lectures):
    """Fails in the forward pass of the fifth step."""

    calls = 0

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        self.calls += idx.dim() == 2 and idx.size(0) == 32
        if self.calls == 5:
            self.calls += 1
            raise LostError
        return super().forward(idx, targets)


class FailingOptimizer(torch.optim.SGD):
    """Fails at the fifth step."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 5 and not FailingOptimizer.failed:
            FailingOptimizer.failed = True
            raise LostError
        return super().step(closure)


class FailingSchedule:
    """A schedule that fails once, after the fifth step."""

    failed = False

    def __call__(self, step: int) -> float:
        if step == 5 and not self.failed:
            self.failed = True
            raise LostError
        return 0.9**step


def fail_once(at_step: int, error: type[BaseException] = LostError) -> Callable[[History], None]:
    """A callback that raises an error the first time that this step has been taken."""
    done: list[int] = []

    def callback(history: History) -> None:
        if history.step >= at_step and not done:
            done.append(1)
            raise error

    return callback


def failing_evaluation(model: BigramLanguageModel, error: type[BaseException] = LostError) -> None:
    evaluate, calls = model.evaluate, []

    def fails_once(tokens: Tensor | TokenShards) -> float:
        calls.append(1)
        if len(calls) == 4:  # on the validation tokens, after the training tokens
            raise error
        return evaluate(tokens)

    model.evaluate = fails_once  # type: ignore[method-assign]


FAILURES: dict[str, tuple[type[BigramLanguageModel], dict[str, Callable[[], Any]]]] = {
    "model": (FailingModel, {}),
    "optimizer": (Lectures, {"optimizer": lambda: partial(FailingOptimizer, lr=1.0)}),
    "scheduler": (Lectures, {"scheduler": lambda: partial(lr_scheduler.LambdaLR, lr_lambda=FailingSchedule())}),
    "progress": (Lectures, {"on_progress": lambda: fail_once(5)}),
    "progress, native": (BigramLanguageModel, {"on_progress": lambda: fail_once(5)}),
    "evaluated": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(4)}),
    "evaluated at first": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(0)}),
    "evaluated at last": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(12)}),
    "exit": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(4, SystemExit)}),
    "generator": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(4, GeneratorExit)}),
    "memory": (BigramLanguageModel, {"on_evaluation": lambda: fail_once(4, torch.OutOfMemoryError)}),
    "evaluation": (BigramLanguageModel, {}),
}


@pytest.mark.parametrize(("kind", "parts"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("through_file", [False, True])
def test_a_run_goes_on_after_any_exception(
    tmp_path: Path,
    kind: type[BigramLanguageModel],
    parts: dict[str, Callable[[], Any]],
    through_file: bool,
    request: pytest.FixtureRequest,
) -> None:
    FailingOptimizer.failed = False
    made = {"optimizer": SGD, "scheduler": partial(lr_scheduler.StepLR, step_size=2)} if kind is Lectures else {}
    made |= {name: make() for name, make in parts.items()}
    model = new_model(kind)
    if request.node.callspec.id.endswith("-evaluation"):
        failing_evaluation(model)
    options: dict[str, Any] = {"max_steps": 12, "eval_interval": 4, **made}
    with pytest.raises(BaseException) as caught:  # noqa: PT011, of several types
        fit(model, TOKENS, TOKENS, generator=seeded(), **options)
    assert isinstance(caught.value, (LostError, SystemExit, GeneratorExit, torch.OutOfMemoryError))
    history: History = caught.value.history  # type: ignore[union-attr]
    assert len(history.losses) == history.step
    if sys.version_info >= (3, 11):
        note = f"fit took {history.step} steps; fit(..., resume=error.history) goes on from there"
        assert getattr(caught.value, "__notes__", []) == ([note] if history.step else [])
    if through_file:
        history.save(tmp_path / "history")
        history = History.load(tmp_path / "history")
    resumed = fit(model, TOKENS, TOKENS, generator=torch.Generator(), resume=history, **options)

    whole_model = new_model(Lectures if kind is FailingModel else kind)
    whole = fit(whole_model, TOKENS, TOKENS, generator=seeded(), **options)
    assert resumed.losses == whole.losses
    assert torch.equal(weight_of(model), weight_of(whole_model))
    assert (resumed.steps, resumed.train_losses, resumed.val_losses) == (
        whole.steps,
        whole.train_losses,
        whole.val_losses,
    )


@pytest.mark.parametrize("where", ["step", "evaluation", "callback"])
def test_a_keyboard_interrupt_anywhere_ends_the_run_with_its_history(where: str) -> None:
    model, whole_model = new_model(Lectures), new_model(Lectures)
    options: dict[str, Any] = {"max_steps": 12, "eval_interval": 4}
    if where == "step":
        model.token_embedding_table.weight.register_hook(interrupt_at_call(6))
    elif where == "evaluation":
        failing_evaluation(model, KeyboardInterrupt)
    on_evaluation = fail_once(4, KeyboardInterrupt) if where == "callback" else None
    history = fit(model, TOKENS, TOKENS, generator=seeded(), on_evaluation=on_evaluation, **options)
    assert (history.interrupted, history.stopped, history.step) == (True, False, 5 if where == "step" else 4)
    resumed = fit(model, TOKENS, TOKENS, generator=torch.Generator(), resume=history, **options)
    whole = fit(whole_model, TOKENS, TOKENS, generator=seeded(), **options)
    assert (resumed.losses, resumed.train_losses) == (whole.losses, whole.train_losses)
    assert torch.equal(weight_of(model), weight_of(whole_model))


def interrupt_at_call(number: int) -> Callable[[Tensor], None]:
    calls: list[int] = []

    def hook(_gradient: Tensor) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    return hook


def test_exceptions_that_take_no_attribute_are_raised_as_they_are() -> None:
    class FrozenError(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    with pytest.raises(FrozenError):
        fit(new_model(), TOKENS, max_steps=9, on_progress=fail_once(1, FrozenError))


def test_a_history_whose_states_could_not_be_read_is_not_resumed() -> None:
    model = new_model()

    def lose_the_device(history: History) -> None:
        if history.step:
            model.token_embedding_table = nn.Embedding(20, 20, device="meta")
            raise LostError

    with pytest.raises(LostError) as caught:
        fit(model, TOKENS, max_steps=9, eval_interval=4, on_evaluation=lose_the_device)
    history: History = caught.value.history  # type: ignore[attr-defined]
    assert history.step == len(history.losses) == 4
    assert history.table_checksum is None
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(ValueError, match=r"the history is not of this model: .* could not be read"):
        fit(new_model(), TOKENS, max_steps=9, resume=history)


class TornOptimizer(torch.optim.SGD):
    """Fails in its fifth step, somewhere in its middle."""

    def __init__(self, params: Any, tear: Callable[[Tensor, dict[str, Any]], object]) -> None:
        super().__init__(params, lr=1.0, momentum=0.9)
        self.tear, self.calls = tear, 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 5:
            (weight,) = self.param_groups[0]["params"]
            self.tear(weight, self.state[weight])
            raise LostError
        return super().step(closure)


def in_place(weight: Tensor, _state: dict[str, Any]) -> None:
    assert weight.grad is not None
    with torch.no_grad():
        weight.sub_(weight.grad)


TEARS: dict[str, Callable[[Tensor, dict[str, Any]], object]] = {
    "in place": in_place,
    "through .data": lambda weight, _: weight.data.mul_(0.9),
    "a state": lambda _, state: state["momentum_buffer"].mul_(0.9),
    "another state": lambda _, state: state.update(momentum_buffer=state["momentum_buffer"] * 0.9),
    "a number": lambda _, state: state.update(count=5),
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
@pytest.mark.parametrize("through_file", [False, True])
def test_a_step_left_in_its_middle_is_not_resumed(tmp_path: Path, tear: Any, through_file: bool) -> None:
    model = new_model()
    with pytest.raises(LostError) as caught:
        fit(model, TOKENS, max_steps=9, optimizer=partial(TornOptimizer, tear=tear))
    history: History = caught.value.history  # type: ignore[attr-defined]
    assert (history.step, history.table_checksum) == (4, None)
    assert not hasattr(caught.value, "__notes__")
    if through_file:
        history.save(tmp_path / "history")
        history = History.load(tmp_path / "history")
    with pytest.raises(ValueError, match="its run ended within a step"):
        fit(model, TOKENS, max_steps=9, optimizer=partial(TornOptimizer, tear=tear), resume=history)


@pytest.mark.parametrize("new_rate", [float, torch.tensor])
def test_a_scheduler_left_in_its_middle_is_put_back(new_rate: Callable[[float], Any]) -> None:
    class Torn(lr_scheduler.ExponentialLR):
        """Multiplies the learning rates, then fails, once."""

        torn = False

        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            if self.last_epoch == 5 and not Torn.torn:
                Torn.torn = True
                raise LostError

    options: dict[str, Any] = {
        "max_steps": 9,
        "optimizer": lambda params: torch.optim.SGD(params, lr=new_rate(1.0)),
        "scheduler": partial(Torn, gamma=0.5),
    }
    model, whole_model = new_model(), new_model()
    with pytest.raises(LostError) as caught:
        fit(model, TOKENS, generator=seeded(), **options)
    history: History = caught.value.history  # type: ignore[attr-defined]
    assert (history.step, history.scheduler_is_due) == (5, True)
    resumed = fit(model, TOKENS, generator=torch.Generator(), resume=history, **options)
    whole = fit(whole_model, TOKENS, generator=seeded(), **options)
    assert resumed.losses == whole.losses
    assert torch.equal(weight_of(model), weight_of(whole_model))


@pytest.mark.parametrize(
    "answer", [True, torch.tensor(True), torch.tensor([2.0]).mean() < 3, __import__("numpy").bool_(True)], ids=repr
)
@pytest.mark.parametrize("kind", [BigramLanguageModel, Lectures])
@pytest.mark.parametrize("callback", ["on_progress", "on_evaluation"])
def test_a_callback_ends_the_run(kind: type[BigramLanguageModel], callback: str, answer: object) -> None:
    options: dict[str, Any] = {"eval_interval": 4, "optimizer": SGD}
    whole_model, model = new_model(kind), new_model(kind)
    whole = fit(whole_model, TOKENS, max_steps=12, generator=seeded(), **options)
    stop: dict[str, Any] = {callback: lambda history: history.step >= 4 and answer}
    history = fit(model, TOKENS, max_steps=12, generator=seeded(), **options, **stop)
    assert (history.step, history.stopped, history.interrupted) == (4, True, False)
    assert history.steps == [0, 4]
    assert history.train_losses[-1] == model.evaluate(TOKENS)
    resumed = fit(model, TOKENS, max_steps=12, generator=torch.Generator(), resume=history, **options)
    assert (resumed.losses, resumed.steps, resumed.stopped) == (whole.losses, whole.steps, False)
    assert torch.equal(weight_of(model), weight_of(whole_model))


@pytest.mark.parametrize("answer", [None, False, 1, 0.5, "True", torch.ones(2), torch.tensor(False), [True]], ids=repr)
def test_other_answers_of_a_callback_mean_nothing(answer: object) -> None:
    history = fit(
        new_model(), TOKENS, max_steps=9, eval_interval=4, on_progress=lambda _: answer, on_evaluation=lambda _: answer
    )
    assert (history.step, history.stopped) == (9, False)


def test_a_run_that_a_callback_would_end_at_its_end() -> None:
    history = fit(new_model(), TOKENS, max_steps=9, eval_interval=9, on_progress=lambda h: h.step == 9)
    assert (history.step, history.steps, history.stopped) == (9, [0, 9], False)
    history = fit(new_model(), TOKENS, max_steps=9, on_evaluation=lambda _: True)
    assert (history.step, history.steps, history.stopped) == (0, [0], True)


@pytest.mark.parametrize("callback", ["on_progress", "on_evaluation"])
def test_a_callback_may_save_what_goes_on(tmp_path: Path, callback: str) -> None:
    model, whole_model = new_model(), new_model()
    copies: list[History] = []

    def save(history: History) -> None:
        if history.step == 8 and not copies:
            history.save(tmp_path / "history")
            model.save(tmp_path / "model")
            copies.append(copy.deepcopy(history))

    options: dict[str, Any] = {"max_steps": 12, "eval_interval": 4}
    whole = fit(whole_model, TOKENS, generator=seeded(), **options)
    saving: dict[str, Any] = {callback: save}
    ended = fit(model, TOKENS, generator=seeded(), **options, **saving)
    for history in (*copies, History.load(tmp_path / "history")):
        assert history.step == 8
        saved = BigramLanguageModel.load(tmp_path / "model")
        resumed = fit(saved, TOKENS, generator=torch.Generator(), resume=history, **options)
        assert (resumed.losses, resumed.train_losses) == (whole.losses, whole.train_losses)
        assert torch.equal(weight_of(saved), weight_of(whole_model))
    assert vars(ended).keys() == vars(copies[0]).keys() == vars(History()).keys()
    ended.save(tmp_path / "history")
    assert History.load(tmp_path / "history").table_checksum == ended.table_checksum


def test_resume_asks_for_the_same_parts() -> None:
    def resume(history: History, **options: Any) -> None:
        fit(model, TOKENS, max_steps=9, resume=history, **options)

    model = new_model()
    cosine = partial(lr_scheduler.CosineAnnealingLR, T_max=9)
    plain = fit(model, TOKENS, max_steps=3, lr=0.1)
    with pytest.raises(ValueError, match="the history's optimizer is not SGD but AdamW"):
        resume(plain, optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="the history's scheduler is not CosineAnnealingLR but None"):
        resume(plain, scheduler=cosine)
    with pytest.raises(ValueError, match="resume: loaded state dict has a different number of parameter groups"):
        resume(plain, optimizer=lambda params: torch.optim.AdamW([{"params": params}, {"params": [torch.ones(1)]}]))
    model = new_model()
    scheduled = fit(model, TOKENS, max_steps=3, lr=0.1, scheduler=cosine)
    with pytest.raises(ValueError, match="the history's scheduler is not None but CosineAnnealingLR"):
        resume(scheduled)
    with pytest.raises(ValueError, match=r"scheduler began at another learning rate than lr = 0\.2"):
        resume(scheduled, scheduler=cosine, lr=0.2)
    resume(scheduled, scheduler=cosine, lr=0.1)
    model = new_model()
    torchs = fit(model, TOKENS, max_steps=3, optimizer=torch.optim.AdamW)
    resume(torchs)  # bigramx.optim.AdamW has the same state


def test_the_learning_rate_of_a_resumed_run() -> None:
    model = new_model()
    history = fit(model, TOKENS, max_steps=3, lr=0.25)
    for lr, expected in ((None, 0.25), (0.5, 0.5), (None, 0.5)):
        history = fit(model, TOKENS, max_steps=history.step + 3, lr=lr, resume=history)
        assert (history.optimizer_state or {})["param_groups"][0]["lr"] == expected


def test_an_empty_history_begins_a_run() -> None:
    model, expected = new_model(), new_model()
    fit(model, TOKENS, max_steps=9, generator=seeded(), resume=History())
    fit(expected, TOKENS, max_steps=9, generator=seeded())
    assert torch.equal(weight_of(model), weight_of(expected))


def test_bigramx_exports_what_fit_needs() -> None:
    assert bigramx.History is History
