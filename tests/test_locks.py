"""What several threads use at once, or a signal handler in the middle of a call."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigramx import (
    BigramLanguageModel,
    CharTokenizer,
    History,
    distributed_counts,
    evaluate,
    evaluation,
    fit,
    functional,
    fusion,
    optim,
    storage,
    wrappers,
)
from bigramx.locks import new_lock, without_warnings
from tests.interrupts import call_until_handled
from tests.threads import at_once, in_another_thread, meanwhile

pytestmark = [pytest.mark.cpu_only, pytest.mark.once]


# ------------------------------------------------------------------------------------------------------------- locks


def test_a_thread_takes_its_lock_again_and_others_wait() -> None:
    lock, order = new_lock(), list[str]()
    other = threading.Thread(target=lambda: _append_with(lock, order, "other"))
    with lock, lock:
        other.start()
        other.join(0.05)
        order.append("first")
    other.join()
    assert order == ["first", "other"]


def _append_with(lock: Any, order: list[str], name: str) -> None:
    with lock:
        order.append(name)


def test_no_exception_of_a_handler_leaves_a_lock_taken() -> None:
    lock = new_lock()

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, raise_interrupt)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        for _ in range(300):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 2e-4)
                while True:
                    with lock:
                        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGALRM, handler)
    assert not lock._is_owned()


@pytest.mark.parametrize("is_held_by", ["another thread", "this thread"])
def test_a_forked_child_and_a_lock(is_held_by: str) -> None:
    """It finds the other threads' free, and keeps its own."""
    lock = new_lock()

    def take() -> None:
        with lock:
            pass

    with lock if is_held_by == "this thread" else in_another_thread(lock):
        assert _status_of_child(take) == 0


def _status_of_child(call: Callable[[], object]) -> int:
    """How a forked process ends that makes the call, for which it has ten seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.alarm(10)
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_warnings_come_back() -> None:
    before = list(warnings.filters)

    def warn() -> None:
        for _ in range(200):
            with without_warnings("of no use"):
                warnings.warn("of no use at all", stacklevel=1)

    at_once(*[warn] * 4)
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="of use"), without_warnings("of no use"):
        warnings.warn("of use", stacklevel=1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: wrappers.is_fsdp(nn.Linear(1, 1), "FSDPModule"),
        lambda: fusion.any_dtensor(nn.Buffer(torch.zeros(1)).as_subclass(_Subclass)),
    ],
)
def test_modules_that_another_thread_is_importing(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], bool]) -> None:
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert ask() is False


class _Subclass(Tensor):
    pass


# ------------------------------------------------------------------------------------------------------ training


def _trained_by_deferred_adamw(look: Callable[[nn.Module, optim.DeferredAdamW], object] | None) -> Tensor:
    """The table after some steps, at which another thread looks all the time."""
    model = BigramLanguageModel(300, sparse=True)
    with torch.no_grad():
        model.token_embedding_table.weight.copy_(torch.randn(300, 300, generator=torch.Generator().manual_seed(1)))
    optimizer = optim.DeferredAdamW(model, lr=0.1)
    tokens = torch.randint(300, (150, 9), generator=torch.Generator().manual_seed(2))

    def train() -> None:
        for row in tokens:
            optimizer.zero_grad()
            _logits, loss = model(row[:-1][None], row[1:][None], return_logits=False)
            loss.backward()
            optimizer.step()

    if look is None:
        train()
    else:
        with meanwhile(partial(look, model, optimizer)):
            train()
    optimizer.catch_up()
    return model.token_embedding_table.weight.detach()


@torch.no_grad()
def _forward(model: nn.Module, _optimizer: optim.DeferredAdamW) -> None:
    model(torch.arange(100))


def _generate(model: nn.Module, _optimizer: optim.DeferredAdamW) -> None:
    model.generate(torch.zeros((1, 1), dtype=torch.long), 20, generator=torch.Generator())  # type: ignore[operator]


@pytest.mark.parametrize(
    "look",
    [
        _forward,
        lambda model, _optimizer: model.generate(
            torch.zeros((1, 1), dtype=torch.long), 20, generator=torch.Generator()
        ),
        lambda model, _optimizer: model.state_dict(),
        lambda _model, optimizer: optimizer.state_dict(),
        lambda _model, optimizer: optimizer.catch_up(),
    ],
    ids=["forward", "generate", "model.state_dict", "optimizer.state_dict", "catch_up"],
)
def test_a_thread_looks_at_a_table_that_another_trains(look: Callable[..., object]) -> None:
    assert torch.equal(_trained_by_deferred_adamw(look), _trained_by_deferred_adamw(None))


@pytest.mark.parametrize("vocab_size", [65, 1100])  # the second has rows that miss steps
def test_a_thread_saves_the_history_of_a_run(vocab_size: int, tmp_path: Path) -> None:
    tokens = torch.randint(vocab_size, (20_000,), generator=torch.Generator().manual_seed(0))

    def run(on_progress: Callable[[History], object]) -> Tensor:
        torch.manual_seed(1)
        model = BigramLanguageModel(vocab_size)
        generator = torch.Generator().manual_seed(2)
        fit(model, tokens, max_steps=1000, progress=False, generator=generator, on_progress=on_progress)
        return model.token_embedding_table.weight.detach()

    histories: list[History] = []
    is_saved = threading.Event()

    def save() -> None:
        for history in histories[:1]:
            history.save(tmp_path / "history")
            History.load(tmp_path / "history")
            is_saved.set()

    def go_on_once_it_is_saved(history: History) -> None:
        histories.append(history)
        assert is_saved.wait(30)

    with meanwhile(save):
        trained = run(go_on_once_it_is_saved)
    assert torch.equal(trained, run(lambda _history: None))


def test_a_hook_waits_for_a_thread_that_saves_the_history(tmp_path: Path) -> None:
    """No lock is held while code of the user's runs."""
    model, histories = BigramLanguageModel(20), list[History]()

    def save(*_: object) -> None:
        if histories:
            thread = threading.Thread(target=histories[0].save, args=[tmp_path / "history"], daemon=True)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()

    model.register_forward_hook(save)
    tokens = torch.randint(20, (500,))
    history = fit(model, tokens, max_steps=3, progress=False, on_progress=histories.append)
    assert history.step == 3
    assert (tmp_path / "history").exists()


def test_others_see_all_groups_of_an_optimizer_within_its_step() -> None:
    """Of which torch's own step gets those with parameters of 16 bits alone."""
    params = [nn.Parameter(torch.ones(100, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = optim.AdamW([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)

    def look() -> None:
        assert [group["params"] for group in optimizer.param_groups] == [[param] for param in params]
        for group in optimizer.param_groups:
            group["lr"] *= 0.99

    with meanwhile(look):
        for _ in range(60):
            optimizer.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


class _Counted(optim.AdamW):
    """It counts in torch's own step, in an attribute of either kind."""

    __slots__ = ("in_a_slot",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.count, self.in_a_slot = 0, "kept"

    def _init_group(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        self.first = self.__dict__.get("first", self.in_a_slot)
        return super()._init_group(*arguments, **options)  # type: ignore[no-untyped-call]


def test_attributes_that_torchs_step_sets_stay() -> None:
    param = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = _Counted([param])
    param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    assert (optimizer.count, optimizer.first) == (3, "kept")
    assert [group["params"] for group in optimizer.param_groups] == [[param]]


# ---------------------------------------------------------------------------------------------------- evaluation


class _Waiting(nn.Module):
    """A model with dropout, whose first call in each thread waits."""

    def __init__(self, wait: Callable[[str], object]) -> None:
        super().__init__()
        self.table, self.dropout, self.wait, self.have_waited = nn.Embedding(5, 5), nn.Dropout(0.5), wait, set[str]()

    def forward(self, idx: Tensor, _targets: Tensor | None = None) -> tuple[Tensor, None]:
        thread = threading.current_thread().name
        if thread not in self.have_waited:
            self.have_waited.add(thread)
            self.wait(thread)
        assert not self.dropout.training
        return self.dropout(self.table(idx)).view(-1, 5), None


@pytest.mark.parametrize("first_to_end", ["first to begin", "second to begin"])
def test_two_threads_evaluate_a_model(first_to_end: str) -> None:
    begun = {name: threading.Event() for name in ("first to begin", "second to begin")}
    ended = {name: threading.Event() for name in begun}

    def wait(name: str) -> None:
        begun[name].set()
        assert begun["second to begin"].wait(30)
        assert name == first_to_end or ended[first_to_end].wait(30)

    model = _Waiting(wait)

    def run(name: str) -> None:
        threading.current_thread().name = name
        assert name == "first to begin" or begun["first to begin"].wait(30)
        evaluate(model, torch.arange(5))
        ended[name].set()

    at_once(*(partial(run, name) for name in begun))
    assert all(module.training for module in model.modules())
    assert evaluation._modes == {}


def test_a_child_forked_while_another_thread_evaluates() -> None:
    model = nn.Dropout()

    def train_and_evaluate() -> None:
        model.train()
        with evaluation.evaluation_mode(model):
            assert not model.training
        assert model.training

    with in_another_thread(evaluation.evaluation_mode(model)):
        assert _status_of_child(train_and_evaluate) == 0
    assert model.training


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("shape", [(65, 65), (1000, 1000)])
def test_a_table_is_saved_while_a_thread_changes_it(shape: tuple[int, int], tmp_path: Path) -> None:
    model, path = BigramLanguageModel(shape[0]), tmp_path / "model"
    weight = model.token_embedding_table.weight.detach()
    with meanwhile(lambda: weight.add_(1)):
        for _ in range(10):
            model.save(path)
            BigramLanguageModel.load(path)


class _Changing(io.BytesIO):
    """A file that changes the table when it is written to."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def write(self, content: Any) -> int:
        self._weight += 1
        return super().write(content)


def test_a_table_that_changes_while_a_file_object_takes_it() -> None:
    model = BigramLanguageModel(5)
    file = _Changing(model.token_embedding_table.weight.detach())
    with pytest.raises(RuntimeError, match=r"token_embedding_table.weight: expected a tensor that no other thread"):
        model.save(file)


def test_a_changed_tensor_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = BigramLanguageModel(5), tmp_path / "model"
    model.save(path)
    old = path.read_bytes()
    monkeypatch.setattr(storage, "_write_bytes", lambda _file, _tensor: 0)
    with pytest.raises(RuntimeError, match="no other thread changes"):
        model.save(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_partial_counts_that_another_job_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After their header was read, which says what they are of, and before they are."""
    for k in range(4):
        (tmp_path / f"{k}.bin").write_bytes(torch.arange(50).to(torch.uint16).numpy().tobytes())
    output, partial_counts = tmp_path / "out", tmp_path / "out" / "counts.partial" / "rank-00000.safetensors"
    saved: dict[int, bytes] = {}
    save = distributed_counts._Running.save_when_due

    def keep(running: Any) -> None:
        save(running)
        saved[len(saved)] = partial_counts.read_bytes()
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distributed_counts, "_SAVE_SHARE", 0)
        patch.setattr(distributed_counts._Running, "save_when_due", keep)
        with pytest.raises(KeyboardInterrupt):
            distributed_counts.count_shards([tmp_path / "*.bin"], output, save_interval=0.0)
    partial_counts.write_bytes(saved[1])
    load = distributed_counts._Partial.load

    def replace_and_load(*arguments: Any, **options: Any) -> Any:
        partial_counts.write_bytes(saved[2])
        return load(*arguments, **options)

    monkeypatch.setattr(distributed_counts._Partial, "load", replace_and_load)
    with pytest.raises(ValueError, match="another job that counts the same has just replaced it"):
        distributed_counts.count_shards([tmp_path / "*.bin"], output)
    result = distributed_counts.count_shards([tmp_path / "*.bin"], output)
    assert result.num_pairs == 4 * 49


# ------------------------------------------------------------------------------------------------------ the kernels


def test_a_handler_sets_the_number_of_threads_between_slices_of_a_chain() -> None:
    weight, num_threads = torch.randn(65, 65), torch.get_num_threads()
    idx = torch.zeros((1, 1), dtype=torch.long)

    def generate(size: int) -> Tensor:
        torch.set_num_threads(3)
        generator = torch.Generator().manual_seed(5)
        return functional.generate(idx, weight, size * 5_000_000, sampler="philox", generator=generator)

    try:
        actual, size = call_until_handled(
            lambda size: partial(generate, size), lambda: torch.set_num_threads(torch.get_num_threads() % 4 + 1)
        )
        assert torch.equal(actual, generate(size))
    finally:
        torch.set_num_threads(num_threads)


def test_a_token_out_of_range_that_is_put_right_meanwhile() -> None:
    """The error is raised whether or not the token is still there when it is looked for."""
    tokenizer = CharTokenizer("".join(map(chr, range(48, 108))))
    tokens = torch.randint(60, (3_000_000,), generator=torch.Generator().manual_seed(0))
    right, expected = int(tokens[0]), tokenizer.decode(tokens)

    def change() -> None:
        tokens[0] = 60
        tokens[0] = right

    with meanwhile(change):
        for _ in range(60):
            with contextlib.suppress(IndexError):
                assert tokenizer.decode(tokens) == expected
