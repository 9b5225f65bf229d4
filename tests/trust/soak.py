"""Runs things very often, and looks at what is left behind.

python -m tests.trust.soak [SECONDS]    # what `make soak` runs
"""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from bigramx import BigramLanguageModel, History, fit

# ------------------------------------------------------------------------------------------------- interrupts


class PythonSteps(BigramLanguageModel):
    """Overrides forward, so that fit takes its steps in Python."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, Tensor | None]:
        return super().forward(*arguments, **options)


class EndedError(Exception):
    """Raised by a handler of SIGINT that is not Python's."""


def _raise_ended(*_: object) -> NoReturn:
    raise EndedError


_RUNS: list[tuple[type[BigramLanguageModel], dict[str, Any]]] = [
    (BigramLanguageModel, {"eval_interval": 50}),
    (BigramLanguageModel, {"eval_interval": 10**12}),
    (PythonSteps, {"eval_interval": 3}),
    (
        PythonSteps,
        {
            "eval_interval": 4,
            "optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.9),
            "scheduler": partial(lr_scheduler.ExponentialLR, gamma=0.999),
            "max_grad_norm": 1.0,
        },
    ),
]


def _copy_sometimes(history: History) -> None:
    """A callback that reads all states."""
    if history.step % 3 == 0:
        copy.deepcopy(history)


class InterruptedRun:
    """A run that two SIGINTs end, and one that nothing ends, to compare.

    Args:
        number: Which of the kinds of runs, models, handlers and grad modes.
    """

    def __init__(self, number: int) -> None:
        self._class, self._options = _RUNS[number % len(_RUNS)]
        self._handler = (signal.default_int_handler, _raise_ended)[number // len(_RUNS) % 2]
        self._grad_mode = number % 3 == 0

    def _new_model(self) -> BigramLanguageModel:
        torch.manual_seed(5)
        return self._class(20)

    def _fit(self, model: BigramLanguageModel, max_steps: int, resume: History | None = None) -> History:
        tokens = torch.randint(20, (300,), generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        callbacks: dict[str, Any] = {"on_progress": _copy_sometimes, "on_evaluation": _copy_sometimes}
        options = {**self._options, **callbacks, "generator": generator}
        return fit(model, tokens, max_steps=max_steps, resume=resume, **options)

    def check(self, interrupting: contextlib.AbstractContextManager[object], max_steps: int) -> list[str]:
        """Takes the steps in a context that sends the SIGINTs; returns what is wrong with what they leave behind."""
        model, histories, found = self._new_model(), [], []
        with torch.set_grad_enabled(self._grad_mode), _handled_by(self._handler):
            try:
                with interrupting:
                    histories.append(self._fit(model, max_steps))
            except (KeyboardInterrupt, EndedError) as error:
                histories += [error.history] if hasattr(error, "history") else []
            if torch.is_grad_enabled() != self._grad_mode:
                found.append("the grad mode is another")
            if signal.getsignal(signal.SIGINT) is not self._handler:
                found.append(f"the handler is {signal.getsignal(signal.SIGINT)}")
        if histories:
            try:
                return found + self._check_history(model, histories[0])
            except ValueError as error:
                return [*found, str(error)]
        if not torch.equal(model.token_embedding_table.weight, self._new_model().token_embedding_table.weight):
            found.append("the history is lost")
        return found

    def _check_history(self, model: BigramLanguageModel, history: History) -> list[str]:
        found, step = [], history.step
        states = (history.optimizer_state or {})["state"].values()
        counts = [int(state["step"]) for state in states if "step" in state]
        if counts and counts != [step]:
            found.append(f"{step} losses, {counts} steps of the optimizer")
        scheduler = history.scheduler_state
        if scheduler is not None and scheduler["last_epoch"] + history.scheduler_is_due != step:
            found.append(f"{step} losses, {scheduler['last_epoch']} steps of the scheduler")
        whole_model = self._new_model()
        whole = self._fit(whole_model, step)
        for steps in (step, step + 20):
            if steps > step:
                history, whole = self._fit(model, steps, history), self._fit(whole_model, steps, whole)
            if history.losses != whole.losses:
                found.append(f"other losses after {steps} steps, interrupted at {step}")
            if not torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight):
                found.append(f"another table after {steps} steps, interrupted at {step}")
            states_of = [each.generator_state for each in (history, whole)]
            if not torch.equal(*states_of):  # type: ignore[arg-type]
                found.append(f"another state of the generator after {steps} steps, interrupted at {step}")
        return found


@contextlib.contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class AtBytecodes:
    """Sends SIGINTs before the bytecodes of these numbers, from the first of a call on."""

    def __init__(self, *numbers: int) -> None:
        self._numbers, self.count = numbers, 0

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count in self._numbers:
                signal.raise_signal(signal.SIGINT)
        return self._trace


class AtMoments:
    """Sends SIGINTs these seconds after its begin, from another thread; native calls run in the meantime."""

    def __init__(self, *seconds: float) -> None:
        self._thread = threading.Thread(target=self._send, args=[seconds])

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._thread.join()

    def _send(self, seconds: tuple[float, ...]) -> None:
        begin = time.monotonic()
        for moment in seconds:
            while (rest := begin + moment - time.monotonic()) > 0:
                time.sleep(rest if rest > 1e-3 else 0)
            signal.raise_signal(signal.SIGINT)


def interrupted_runs(seed: int, count: int) -> list[str]:
    """Interrupts runs at random bytecodes and moments by two SIGINTs, at most 0.2 ms apart; returns what is wrong."""
    chance, found = random.Random(seed), []
    interrupting: contextlib.AbstractContextManager[object]
    for number in range(count):
        run = InterruptedRun(chance.randrange(24))
        if number % 2:
            moment = chance.expovariate(100)
            interrupting, max_steps = AtMoments(moment, moment + chance.uniform(0, 2e-4)), 10**9
        else:
            bytecodes = AtBytecodes()
            run.check(bytecodes, 5)
            first = chance.randrange(bytecodes.count)
            interrupting, max_steps = AtBytecodes(first, first + chance.randrange(500)), 5
        found += [f"run {number} of seed {seed}: {what}" for what in run.check(interrupting, max_steps)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(interrupted_runs(*map(int, sys.argv[1:3]))) or "none")
