"""fit and its history."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History, data, fit, memory, optim, reference
from tests import processes
from tests.devices import on_device
from tests.names import name_of

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, int]:
    text = data.default_text()
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer.encode(text), tokenizer.vocab_size


def test_reaches_the_optimum_of_a_corpus(corpus: tuple[torch.Tensor, int]) -> None:
    tokens, vocab_size = corpus  # on the CPU, wherever the model is
    train_tokens, val_tokens = data.split(tokens)
    model = BigramLanguageModel(vocab_size)
    history = fit(model, train_tokens, val_tokens)
    assert history.optimum <= history.train_losses[-1] <= 1.02 * history.optimum
    assert history.steps == list(range(0, 3001, 300))
    assert len(history.train_losses) == len(history.val_losses) == 11
    assert len(history.losses) == history.step == 3000
    assert history.train_losses[-1] == model.evaluate(train_tokens)


def test_equals_the_lectures_loop(corpus: tuple[torch.Tensor, int]) -> None:
    tokens, vocab_size = on_device(corpus[0]), corpus[1]
    torch.manual_seed(3)
    model = BigramLanguageModel(vocab_size)
    history = fit(model, tokens, batch_size=4, max_steps=50, eval_interval=50)
    torch.manual_seed(3)
    lectures = reference.BigramLanguageModel(vocab_size)
    optimizer = torch.optim.AdamW(lectures.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        _logits, loss = lectures(*data.get_batch(tokens, 4, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(model.state_dict(), lectures.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_resumed_runs_equal_one(tmp_path: Path, sparse: bool, through_file: bool) -> None:
    tokens = torch.randint(20, (500,))

    def new_model() -> BigramLanguageModel:
        torch.manual_seed(5)
        return BigramLanguageModel(20, sparse=sparse)

    whole_model, model = new_model(), new_model()
    whole = fit(whole_model, tokens, tokens, max_steps=30, eval_interval=10, generator=torch.Generator().manual_seed(1))
    half = fit(model, tokens, tokens, max_steps=17, eval_interval=10, generator=torch.Generator().manual_seed(1))
    if through_file:
        half.save(tmp_path / "history.safetensors")
        half = History.load(tmp_path / "history.safetensors")
    resumed = fit(model, tokens, tokens, max_steps=30, eval_interval=10, generator=torch.Generator(), resume=half)
    assert resumed.losses == whole.losses
    assert resumed.steps == [0, 10, 17, 20, 30]
    assert resumed.train_losses[-1] == whole.train_losses[-1]
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


def test_interrupt_keeps_the_model_and_the_history() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)

    def interrupt(history: History) -> None:
        if history.step == 7:
            raise KeyboardInterrupt

    history = fit(model, tokens, max_steps=30, eval_interval=7, on_progress=interrupt)
    assert history.interrupted
    assert history.step == 7
    assert model.evaluate(tokens) < history.train_losses[0]
    resumed = fit(model, tokens, max_steps=30, resume=history)
    assert resumed.step == 30
    assert not resumed.interrupted


@pytest.mark.cpu_only
@pytest.mark.parametrize("smallest", [0, 2**62], ids=["deferred", "all"])
def test_runs_resumed_after_ctrl_c_at_any_moment_equal_one(
    keyboard_interrupt: None, monkeypatch: pytest.MonkeyPatch, smallest: int
) -> None:
    monkeypatch.setattr("bigramx.steps._DEFERRED_FROM", smallest)
    tokens = torch.randint(20, (500,))

    def run(history: History | None, interrupt_after: float | None) -> tuple[History, torch.Tensor]:
        torch.manual_seed(5)
        model = BigramLanguageModel(20) if history is None else models[-1]
        models.append(model)
        timer = threading.Timer(interrupt_after or 0, signal.raise_signal, [signal.SIGINT])

        def on_evaluation(history: History) -> None:
            if interrupt_after is not None and history.step == 0:
                timer.start()

        generator = torch.Generator().manual_seed(1)
        history = fit(
            model,
            tokens,
            max_steps=100_000,
            eval_interval=500,
            generator=generator,
            resume=history,
            on_evaluation=on_evaluation,
        )
        timer.cancel()
        return history, model.token_embedding_table.weight.detach().clone()

    models: list[BigramLanguageModel] = []
    whole, expected = run(None, None)
    for interrupt_after in (0.001, 0.004, 0.013, 0.03):
        history, _weight = run(None, interrupt_after)
        assert history.interrupted
        assert 0 < history.step < 100_000
        history, weight = run(history, None)
        assert history.losses == whole.losses
        assert torch.equal(weight, expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class EndedError(Exception):
    """Raised by a handler of SIGINT."""


@contextlib.contextmanager
def handled_by(handler: Callable[..., object], number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    before = signal.signal(number, handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    try:
        yield
        assert signal.getsignal(number) is handler
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(number, before)


def interrupt_at(*steps: int) -> Callable[[History], None]:
    """A callback that sends SIGINT once, twice at a time, after each of these numbers of steps."""

    def callback(history: History) -> None:
        if history.step in steps:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    return callback


def test_a_handler_of_the_users_is_called_where_all_states_agree() -> None:
    tokens, model = torch.randint(20, (500,)), BigramLanguageModel(20)
    calls: list[tuple[Any, ...]] = []
    options: dict[str, Any] = {"max_steps": 30, "eval_interval": 5, "on_progress": interrupt_at(10, 20, 30)}

    def handle(number: int, frame: types.FrameType) -> None:
        calls.append((number, type(frame), model.evaluate(tokens)))

    with handled_by(handle):
        history = fit(model, tokens, **options)
    assert (history.step, history.interrupted) == (30, False)
    losses = [history.train_losses[step // 5] for step in (10, 20, 30)]
    assert [call[:2] for call in calls] == [(signal.SIGINT, types.FrameType)] * 3
    assert [call[2] for call in calls] == losses


@pytest.mark.parametrize("vocab_size", [1, 12, 1200])  # the last has rows that miss steps
def test_logits_of_a_certain_text_stay(vocab_size: int) -> None:
    """A softmax that is 1 in float32 has no gradient; AdamW makes steps of the size lr of any other, however small."""
    model, tokens = BigramLanguageModel(vocab_size), torch.arange(vocab_size).repeat(20)
    with torch.no_grad():
        logits = torch.full((vocab_size, vocab_size), -200.0)
        logits[torch.arange(vocab_size), (torch.arange(vocab_size) + 1) % vocab_size] = 0.0
        model.token_embedding_table.weight.copy_(logits)
    fit(model, tokens, batch_size=12, block_size=10, max_steps=300, optimizer=partial(optim.AdamW, weight_decay=0.0))
    assert torch.equal(model.token_embedding_table.weight.cpu(), logits.cpu())


def test_a_sigint_ends_a_run_within_a_callback_and_the_run_around_it() -> None:
    tokens, inner = torch.randint(20, (500,)), list[History]()

    def run_another(history: History) -> None:
        if history.step == 5:
            options: dict[str, Any] = {
                "max_steps": 10**7,
                "eval_interval": 10**7,
                "on_progress": interrupt_at_some_step,
            }
            inner.append(fit(BigramLanguageModel(20), tokens, **options))

    def interrupt_at_some_step(history: History) -> None:
        if history.step > 0:
            signal.raise_signal(signal.SIGINT)

    calls = []

    def handle(*_: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with handled_by(handle):
        outer = fit(BigramLanguageModel(20), tokens, max_steps=30, eval_interval=5, on_evaluation=run_another)
    assert len(calls) == 1
    assert inner[0].interrupted
    assert outer.interrupted
    assert inner[0].step < 10**7
    assert outer.step < 30


def test_an_exception_of_a_handler_of_the_users_has_the_history() -> None:
    def handle(*_: object) -> None:
        raise EndedError

    tokens = torch.randint(20, (500,))
    model, whole_model = BigramLanguageModel(20), BigramLanguageModel(20)
    whole_model.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"max_steps": 30, "eval_interval": 5}
    for last in (10, 30):
        with handled_by(handle), pytest.raises(EndedError) as caught:
            fit(model, tokens, generator=torch.Generator(), on_progress=interrupt_at(last), **options)
        history: History = caught.value.history  # type: ignore[attr-defined]
        assert history.step == last
        resumed = fit(model, tokens, resume=history, **options)
        whole = fit(whole_model, tokens, generator=torch.Generator(), **options)
        assert resumed.losses == whole.losses
        assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


def test_a_handler_that_is_set_during_a_run_stays() -> None:
    def handle(*_: object) -> None:
        raise AssertionError

    with handled_by(signal.default_int_handler):
        fit(
            BigramLanguageModel(20),
            torch.randint(20, (500,)),
            max_steps=3,
            on_evaluation=lambda _: signal.signal(signal.SIGINT, handle) and None,
        )
        assert signal.signal(signal.SIGINT, signal.default_int_handler) is handle


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_nothing_is_installed_where_python_runs_no_handler(handler: Any) -> None:
    seen: list[object] = []

    def run() -> None:
        tokens = torch.randint(20, (500,))
        fit(BigramLanguageModel(20), tokens, max_steps=3, on_evaluation=lambda _: seen.append(is_there()))

    def is_there() -> bool:
        return signal.getsignal(signal.SIGINT) is handler

    with handled_by(handler):
        if callable(handler):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
    assert seen == [True, True]


def test_an_interrupt_before_the_first_step_and_after_the_last(keyboard_interrupt: None) -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)

    def factory(params: Any) -> torch.optim.Optimizer:
        signal.raise_signal(signal.SIGINT)
        return torch.optim.SGD(params, lr=1.0)

    history = fit(model, tokens, max_steps=6, optimizer=factory)
    assert (history.interrupted, history.step, history.steps) == (True, 0, [])
    history = fit(model, tokens, max_steps=6, optimizer=torch.optim.SGD, on_evaluation=interrupt_at(6), resume=history)
    assert (history.interrupted, history.step, history.steps) == (True, 6, [0, 6])
    assert fit(model, tokens, max_steps=9, optimizer=torch.optim.SGD, resume=history).step == 9


HANGS = ("forward", "progress", "evaluation", "optimizer", "scheduler")


@pytest.mark.parametrize("where", HANGS)
def test_another_interrupt_breaks_what_hangs(
    keyboard_interrupt: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("bigramx.training._Signals._PATIENCE", 0.05)
    monkeypatch.setattr("bigramx.training._Signals._ECHO", 0.001)
    hung: list[str] = []

    def hang(place: str) -> None:
        if place != where or hung or len(calls) < 3:
            return
        hung.append(place)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one
        begin = time.monotonic()
        while time.monotonic() - begin < 0.1:
            pass
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not broken")

    class Model(BigramLanguageModel):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            hang("forward" if torch.is_grad_enabled() else "evaluation")
            return super().forward(*arguments, **options)

    class SGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            hang("optimizer")

    class Schedule(torch.optim.lr_scheduler.ExponentialLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            hang("scheduler")

    def on_progress(_: History) -> None:
        hang("progress")
        calls.append(1)

    def run(model: BigramLanguageModel, resume: History | None = None) -> History:
        return fit(
            model,
            tokens,
            max_steps=9,
            eval_interval=4,
            optimizer=lambda params: SGD(params, lr=1.0, momentum=0.9),
            scheduler=lambda made: Schedule(made, gamma=0.9),
            generator=torch.Generator(),
            on_progress=on_progress,
            resume=resume,
        )

    tokens = torch.randint(20, (500,))
    calls: list[int] = []
    model, whole_model = Model(20), Model(20)
    whole_model.load_state_dict(model.state_dict())
    history = run(model)
    assert hung == [where]
    assert history.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if where == "optimizer":
        with pytest.raises(ValueError, match="its run ended within a step"):
            run(model, history)
    else:
        assert run(model, history).losses == run(whole_model).losses
        assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


@pytest.mark.cpu_only
def test_other_signals_whose_handlers_raise_between_native_steps() -> None:
    def handle(*_: object) -> None:
        raise EndedError

    tokens = torch.randint(65, (5000,))
    options: dict[str, Any] = {"eval_interval": 10**6, "generator": torch.Generator()}
    model, whole_model = BigramLanguageModel(65), BigramLanguageModel(65)
    whole_model.load_state_dict(model.state_dict())
    options["generator"].manual_seed(1)

    def on_progress(history: History) -> None:
        if history.step < 20_000:
            signal.setitimer(signal.ITIMER_REAL, 0.045)  # handlers run 40 ms after the next native call began

    with handled_by(handle, signal.SIGALRM), pytest.raises(EndedError) as caught:
        fit(model, tokens, max_steps=10**6, on_progress=on_progress, **options)
    history: History = caught.value.history  # type: ignore[attr-defined]
    assert (history.optimizer_state or {})["state"][0]["step"] == history.step == len(history.losses) > 0
    options["generator"].manual_seed(1)
    whole = fit(whole_model, tokens, max_steps=history.step, **options)
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)
    assert history.losses == whole.losses
    assert torch.equal(*[each.generator_state for each in (history, whole)])  # type: ignore[arg-type]


def test_resume_checks_that_the_history_belongs_to_the_model() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)
    history = fit(model, tokens, max_steps=3)
    kept = copy.deepcopy(history)
    fit(model, tokens, max_steps=5, resume=history)
    assert history.losses == kept.losses
    with pytest.raises(ValueError, match="its run ended with another table"):
        fit(model, tokens, max_steps=5, resume=history)
    sparse = BigramLanguageModel(20, sparse=True)
    sparse.load_state_dict(model.state_dict())
    history = fit(model, tokens, max_steps=3)
    sparse.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="the history's optimizer is not SparseAdam"):
        fit(sparse, tokens, max_steps=5, resume=history)


def test_another_learning_rate_and_validation_on_resume() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)
    history = fit(model, tokens, max_steps=4, eval_interval=2)
    before = model.token_embedding_table.weight.detach().clone()
    history = fit(model, tokens, tokens, max_steps=8, eval_interval=2, lr=0.0, resume=history)
    assert torch.equal(model.token_embedding_table.weight, before)
    assert len(history.steps) == len(history.train_losses) == len(history.val_losses) == 5
    assert [math.isnan(loss) for loss in history.val_losses] == [True] * 3 + [False] * 2


def test_evaluations_are_reported() -> None:
    tokens, reported = torch.randint(20, (500,)), []
    fit(BigramLanguageModel(20), tokens, max_steps=5, eval_interval=2, on_evaluation=lambda h: reported.append(h.step))
    assert reported == [0, 2, 4, 5]


def test_no_steps() -> None:
    history = fit(BigramLanguageModel(20), torch.randint(20, (50,)), max_steps=0)
    assert history.steps == [0]
    assert history.losses == []


def test_tokens_out_of_range() -> None:
    with pytest.raises(IndexError, match="tokens holds 20 at position 0, expected 0 <= token < 20"):
        fit(BigramLanguageModel(20), torch.full((50,), 20))


def test_other_forms_of_the_same_numbers(tmp_path: Path) -> None:
    tokens, results = torch.randint(20, (500,)), []
    forms: list[tuple[Any, Any]] = [(int, float), (numpy.int32, numpy.float64), (torch.tensor,) * 2, (numpy.array,) * 2]
    for whole, number in forms:
        model = BigramLanguageModel(20, dtype=torch.float64)
        torch.nn.init.zeros_(model.token_embedding_table.weight)
        torch.manual_seed(3)
        sizes: dict[str, Any] = {"batch_size": 5, "block_size": 7, "max_steps": 9, "eval_interval": 4}
        sizes = {name: whole(value) for name, value in sizes.items()}
        history = fit(model, tokens, lr=number(0.25), max_grad_norm=number(1000.0), **sizes)
        history.save(tmp_path / "history")
        loaded = History.load(tmp_path / "history")
        assert (loaded.optimizer_state or {})["param_groups"] == (history.optimizer_state or {})["param_groups"]
        results.append((history.losses, history.steps))
    assert results[1:] == results[:1] * 3


class Whole:
    """A whole number that is no int."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


BAD_NUMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *[
        ({name: value}, TypeError, f"expected {name} to be an int, got ")
        for name in ("batch_size", "block_size", "max_steps", "eval_interval")
        for value in (
            2.0,
            True,
            "2",
            None,
            numpy.bool_(True),
            torch.tensor(True),
            torch.tensor(2.0),
            torch.ones(2),
            [2],
        )
    ],
    *[
        ({name: value}, TypeError, f"expected {name} to be a number, got ")
        for name in ("lr", "max_grad_norm")
        for value in (True, "0.1", 1j, [0.1], torch.tensor(True), numpy.bool_(True), torch.tensor(1j))
    ],
    ({"lr": torch.ones(2)}, ValueError, r"expected lr to be one number, got shape \(2,\)"),
    ({"lr": -1}, ValueError, r"Invalid learning rate: -1\.0"),
    ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(-0.5)}, ValueError, r"Invalid learning rate: -0\.5"),
    ({"max_steps": -1}, ValueError, "expected max_steps >= 0 .* got -1"),
    ({"eval_interval": 0}, ValueError, "eval_interval >= 1, got 3000 and 0"),
    ({"batch_size": 0}, ValueError, "expected batch_size and block_size >= 1, got 0 and 8"),
    ({"block_size": torch.tensor(-2)}, ValueError, "expected batch_size and block_size >= 1, got 32 and -2"),
    *[
        ({name: kind(value)}, OverflowError, f"expected {name} to be an int of 64 bits, got {value}")
        for name in ("batch_size", "block_size")
        for value in (2**63, -(2**63) - 1, 10**30)
        for kind in (int, Whole)
    ],
    ({"block_size": 500}, ValueError, "more than block_size = 500 tokens, got 500"),
    ({"train_tokens": [1, 2, 3]}, TypeError, "'tokens'"),
    ({"train_tokens": numpy.arange(100)}, TypeError, "'tokens'"),
    ({"train_tokens": torch.rand(100)}, RuntimeError, "expected tokens to have one of the dtypes"),
    ({"train_tokens": torch.ones(10, 10).long()}, RuntimeError, "expected tokens to be 1-D"),
    ({"val_tokens": [1, 2, 3]}, TypeError, "expected val_tokens to be a Tensor or TokenShards, got list"),
    ({"val_tokens": torch.rand(100)}, RuntimeError, "expected tokens to be uint8"),
]


@pytest.mark.parametrize("value", [10**12, numpy.int64(2**63 - 1), 2**70])
@pytest.mark.parametrize("name", ["max_steps", "eval_interval"])
def test_what_is_never_reached_takes_no_memory(name: str, value: Any) -> None:
    options: dict[str, Any] = {"max_steps": 10**12, "eval_interval": 10**12, name: value}
    history = fit(
        BigramLanguageModel(20), torch.randint(20, (500,)), on_progress=lambda h: h.step > 3, progress=True, **options
    )
    assert (history.stopped, history.steps[1:]) == (True, [history.step])


@pytest.mark.cpu_only
@pytest.mark.parametrize(("options", "error", "message"), BAD_NUMBERS, ids=name_of)
def test_bad_arguments_are_told_at_the_start(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = BigramLanguageModel(20)
    evaluated: list[History] = []
    before = model.token_embedding_table.weight.detach().clone()
    with pytest.raises(error, match=message):
        fit(model, on_evaluation=evaluated.append, **{"train_tokens": torch.randint(20, (500,)), **options})
    assert evaluated == []
    assert torch.equal(model.token_embedding_table.weight, before)


def test_a_table_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = BigramLanguageModel(20), torch.randint(20, (5000,))
    monkeypatch.setattr(memory, "total_memory", lambda _device: 4 * 400 * 4 + 2 * 400 * 8)
    history = fit(model, tokens, tokens, max_steps=2)
    with pytest.raises(MemoryError, match=r"V = 20 takes .* at most V = 18,"):  # the history's states, and a copy
        fit(model, tokens, tokens, max_steps=3, resume=history)
    monkeypatch.setattr(memory, "total_memory", lambda _device: 4 * 400 * 4)
    with pytest.raises(MemoryError, match="for the pair counts"):
        fit(model, tokens, max_steps=2)
    fit(model, tokens[:500], max_steps=2)
    monkeypatch.setattr(memory, "total_memory", lambda _device: 2 * 400 * 4)
    with pytest.raises(MemoryError, match="for the optimizer's states"):
        fit(model, tokens[:500], max_steps=2)
    fit(model, tokens[:500], max_steps=2, optimizer=torch.optim.SGD)
    monkeypatch.setattr(memory, "total_memory", lambda _device: 400 * 4)
    with pytest.raises(MemoryError, match="for its gradient"):
        fit(model, tokens[:500], max_steps=2, optimizer=torch.optim.SGD)
    fit(BigramLanguageModel(20, sparse=True), tokens[:500], max_steps=2)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"optimizer": torch.optim.SGD}], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_default_device_does_not_matter(tmp_path: Path, sparse: bool, options: dict[str, Any]) -> None:
    if sparse and options.get("max_grad_norm"):
        options = {}
    tokens, longer = torch.randint(20, (500,)), torch.randint(20, (3000,))

    def run(device: str) -> tuple[History, torch.Tensor]:
        torch.manual_seed(3)
        model = BigramLanguageModel(20, sparse=sparse)
        with default_device(device):
            history = fit(model, tokens, longer, max_steps=7, eval_interval=3, **options)
            history.save(tmp_path / "history")
            history = History.load(tmp_path / "history")
            history = fit(model, tokens, longer, max_steps=12, eval_interval=3, resume=history, **options)
            history.save(tmp_path / "history")
        return History.load(tmp_path / "history"), model.token_embedding_table.weight.detach()

    (history, weight), (expected_history, expected) = run("meta"), run("cpu")
    assert history.losses == expected_history.losses
    assert history.val_losses == expected_history.val_losses
    assert torch.equal(weight, expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_the_default_dtype_does_not_matter(default: torch.dtype, options: dict[str, Any]) -> None:
    tokens, results = torch.randint(20, (3000,)), []
    before = torch.get_default_dtype()
    for dtype in (default, torch.float32):
        torch.manual_seed(3)
        model = BigramLanguageModel(20, dtype=torch.float32)
        torch.nn.init.zeros_(model.token_embedding_table.weight)
        torch.set_default_dtype(dtype)
        try:
            history = fit(model, tokens, tokens[:300], max_steps=7, eval_interval=3, **options)
        finally:
            torch.set_default_dtype(before)
        results.append([history.losses, history.train_losses, history.val_losses, [history.optimum]])
    for actual, expected in zip(*results, strict=True):
        assert actual == pytest.approx(expected, rel=1e-6)


def test_modes_of_autograd() -> None:
    tokens = torch.randint(20, (500,))
    for options in ({}, {"max_grad_norm": 1.0}):
        model = BigramLanguageModel(20)
        with torch.no_grad():
            history = fit(model, tokens, max_steps=100, **options)  # type: ignore[arg-type]
            assert not torch.is_grad_enabled()
        assert history.train_losses[-1] < history.train_losses[0]
        before = model.token_embedding_table.weight.detach().clone()
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match="nothing can be trained under"),
        ):
            fit(model, tokens, max_steps=100)
        assert torch.equal(model.token_embedding_table.weight, before)


class Terminal(io.StringIO):
    """A standard error that a person reads."""

    def isatty(self) -> bool:
        return True


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_a_progress_bar_where_a_person_looks(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model, tokens = BigramLanguageModel(20), torch.randint(20, (500,))

    def shown(stream: io.StringIO, progress: bool | None, **more: Any) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with contextlib.suppress(ValueError):
            fit(model, tokens, max_steps=70, progress=progress, **options, **more)
        return stream.getvalue()

    def fail(history: History) -> None:
        raise ValueError

    threads = threading.active_count()
    assert shown(io.StringIO(), None) == shown(io.StringIO(), False) == shown(Terminal(), False) == ""
    for text in (shown(Terminal(), None), shown(io.StringIO(), True)):
        assert "| 0/70 [" in text
        assert "| 70/70 [" in text
        assert re.search(r"loss=\d\.\d{4}\] *\n$", text)
        assert len(text) < 1000
    text = shown(Terminal(), None, on_progress=fail)
    assert text.endswith("\n")
    assert "loss=" in text
    history = fit(model, tokens, max_steps=70, progress=False, on_progress=lambda h: h.step >= 1)
    assert f"| {history.step}/70 [" in shown(Terminal(), None, resume=history) or history.step == 70
    assert threading.active_count() == threads  # no monitor of tqdm's


def test_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = BigramLanguageModel(20), torch.randint(20, (500,))
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert fit(model, tokens, max_steps=3).step == 3


@mock.patch.dict(sys.modules)  # tqdm decides at its import: what is imported here is forgotten
def test_a_progress_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    for name in [name for name in sys.modules if name.startswith("tqdm")]:
        monkeypatch.delitem(sys.modules, name)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    fit(BigramLanguageModel(20), torch.randint(20, (500,)), max_steps=3)  # without ipywidgets: in text, and no warning
    assert "| 3/3 [" in stream.getvalue()


@pytest.mark.cpu_only
def test_what_training_imports() -> None:
    """Not torch's compiler, which takes as long as torch; tqdm for a bar alone."""
    script = """
import io, sys, torch
from bigramx import BigramLanguageModel, History, fit
from bigramx.optim import AdamW, DeferredAdamW
model, tokens = BigramLanguageModel(20), torch.randint(20, (500,))
for progress, is_imported in ((None, False), (False, False), (True, True)):
    history, file = fit(model, tokens, max_steps=3, progress=progress), io.BytesIO()
    assert ("tqdm.auto" in sys.modules) == is_imported, progress
history.save(file)
fit(model, tokens, max_steps=6, resume=History.load(io.BytesIO(file.getvalue())))
for optimizer in (AdamW(model.parameters()), DeferredAdamW(model)):
    model(tokens[:4], tokens[:4])[1].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
torch.optim.AdamW(model.parameters())
print("torch._dynamo" in sys.modules)  # else there is nothing to be gained
"""
    assert processes.run([sys.executable, "-c", script], check=True).stdout.splitlines()[-1] == "True"
