"""Runs things very often, and looks at what is left behind: memory, files, threads, locks; and interrupts runs of fit.

python -m tests.trust.soak [SECONDS] [--seed SEED]    # what `make soak` runs
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import TimeoutExpired
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

from bigramx import BigramLanguageModel, CharTokenizer, History, SmoothedBigramModel, fit, functional, ops
from tests import processes, tree
from tests.trust import report

Case = Callable[[], object]

# ------------------------------------------------------------------------------------------ what is left behind


def usage() -> dict[str, int]:
    """What this process holds: resident bytes, descriptors, threads, and shared memory under its number."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    held = {name: len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")}
    shared = [name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name]
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "shared": len(shared), **held}


_MOST = {"bytes": 6 << 20, "fd": 0, "task": 0, "shared": 0}  # how much more a process may hold; bytes: the allocator's


def growth(name: str, case: Case, iterations: int) -> list[str]:
    """What a process holds after so many calls that it did not after a third of them."""
    _repeat(case, iterations // 3)
    before = usage()
    _repeat(case, iterations - iterations // 3)
    end = time.monotonic() + 2
    while True:
        more = {what: held - before[what] for what, held in usage().items()}
        grown = [what for what, most in _MOST.items() if more[what] > most]
        if not grown or time.monotonic() > end:
            return [f"{name}: {more[what]} more {what} after {iterations} calls" for what in grown]
        time.sleep(0.05)  # threads that have ended, and those of OpenMP that they had, are gone a little later


def _repeat(case: Case, iterations: int) -> None:
    for _ in range(iterations):
        case()


# ----------------------------------------------------------------------------------------------- what is called


def op_cases() -> dict[str, Case]:
    """A small call of each op in torch.ops.bigramx, of the functions around them, and of the tokenizer."""
    kernels = torch.ops.bigramx
    tokens, weight = torch.randint(5, (64,)), torch.randn(5, 5)
    probs, grad = torch.rand(2, 5), torch.randn(5, 5)
    param, exp_avg, exp_avg_sq, step = torch.zeros(5, 5), torch.zeros(5, 5), torch.zeros(5, 5), torch.ones(())
    losses, options = torch.empty(2, dtype=torch.float64), (0.01, 0.9, 0.99, 1e-8, 0.01)
    pairs, tokenizer = (tokens[:-1], weight, tokens[1:]), CharTokenizer("abcde")
    text, row_steps = "abcde" * 12, torch.zeros(5, dtype=torch.int64)
    schedule = torch.tensor(options, dtype=torch.float64).expand(3, 5)
    smoothed = SmoothedBigramModel.from_counts(torch.eye(5, dtype=torch.int64))._parts()

    def backward() -> None:
        leaf = weight.detach().requires_grad_()  # threads must not share one whose gradient is accumulated
        functional.embedding_cross_entropy(tokens[:-1], leaf, tokens[1:]).backward()

    return {
        "adamw_": lambda: kernels.adamw_(param, grad, exp_avg, exp_avg_sq, None, step, *options, False),
        "count_bigrams": lambda: kernels.count_bigrams(tokens, 5),
        "deferred_adamw_": lambda: kernels.deferred_adamw_(
            param, exp_avg, exp_avg_sq, row_steps.zero_(), schedule, 3, tokens[:4]
        ),
        "embedding_cross_entropy": lambda: kernels.embedding_cross_entropy(*pairs),
        "embedding_cross_entropy_forward": lambda: kernels.embedding_cross_entropy_forward(*pairs),
        "embedding_cross_entropy_backward": lambda: kernels.embedding_cross_entropy_backward(losses[0] * 0, *pairs),
        "fit_": lambda: kernels.fit_(
            param, exp_avg, exp_avg_sq, step.fill_(1), losses, tokens, 2, 3, -1, *options, 1.0
        ),
        "generate": lambda: kernels.generate(tokens[None, :1], weight, 9),
        "get_batch": lambda: kernels.get_batch(tokens, 2, 3),
        "interpolated_bigram": lambda: kernels.interpolated_bigram(tokens[:-1], tokens[1:], *smoothed),
        "interpolated_bigram_generate": lambda: kernels.interpolated_bigram_generate(tokens[None, :1], *smoothed, 9),
        "multinomial": lambda: kernels.multinomial(probs, 3),
        "generate, philox": lambda: ops.generate(tokens[None, :1], weight, 9, 1.0, 3, 0.9, 0.1, 2, "philox", None, ()),
        "multinomial, philox": lambda: functional.multinomial(probs, 3, replacement=True, sampler="philox"),
        "backward": backward,
        "encode": lambda: tokenizer.encode(text),
        "decode": lambda: tokenizer.decode(tokens),
        "decode a list": lambda: tokenizer.decode([0, 1, 2, 3, 4]),
    }


def error_cases() -> dict[str, Case]:
    """Calls that raise: each op without arguments, with one of the wrong type, and with one out of range."""
    tokens, weight, wrong = torch.randint(5, (64,)), torch.randn(5, 5), torch.full((8,), 7)
    tokenizer = CharTokenizer("abcde")
    calls: dict[str, Case] = {f"{name}, no arguments": getattr(torch.ops.bigramx, name) for name in tree.schema_names()}
    calls |= {
        "a str for a tensor": lambda: ops.count_bigrams("abc", 5),
        "a dtype": lambda: functional.count_bigrams(tokens.float(), 5),
        "tokens out of range": lambda: functional.count_bigrams(wrong, 5),
        "idx out of range": lambda: functional.embedding_cross_entropy(wrong, weight, wrong),
        "shapes": lambda: functional.embedding_cross_entropy(tokens, weight, tokens[1:]),
        "a sampler": lambda: ops.generate(tokens[None, :1], weight, 9, 1.0, None, None, None, None, "x", None, ()),
        "a prompt out of range": lambda: ops.generate(wrong[None], weight, 9, 1.0, *[None] * 6, ()),
        "no probability": lambda: functional.multinomial(torch.zeros(5), 1),
        "too few tokens": lambda: ops.get_batch(tokens, 2, 64, None),
        "an unknown character": lambda: tokenizer.encode("abcx"),
        "a token out of range": lambda: tokenizer.decode([0, 9]),
        "a token out of range, in a tensor": lambda: tokenizer.decode(wrong),
        "a character twice": lambda: CharTokenizer("aa"),
        "fit": lambda: fit(BigramLanguageModel(5), tokens, batch_size=0),
        "a damaged file": lambda: BigramLanguageModel.load(io.BytesIO(b"x" * 100)),
    }
    return {name: partial(_raises, name, call) for name, call in calls.items()}


def _raises(name: str, call: Case) -> None:
    try:
        call()
    except (TypeError, ValueError, IndexError, RuntimeError):
        return
    raise AssertionError(f"{name}: no error")


def file_cases(folder: str) -> dict[str, Case]:
    """Training, saving and loading."""
    model, tokens, path = BigramLanguageModel(5), torch.randint(5, (64,)), Path(folder) / "model"
    model.tokenizer = CharTokenizer("abcde")
    history = fit(model, tokens, max_steps=2)

    def save_and_load() -> None:
        model.save(path)
        BigramLanguageModel.load(path)
        history.save(path)
        History.load(path)

    def through_memory() -> None:
        file = io.BytesIO()
        model.save(file)
        BigramLanguageModel.load(io.BytesIO(file.getvalue()))

    return {
        "save and load": save_and_load,
        "through memory": through_memory,
        "fit": lambda: fit(model, tokens, tokens, max_steps=4, eval_interval=2),
        "fit, steps in Python": lambda: fit(model, tokens, max_steps=2, optimizer=torch.optim.AdamW),
        "generate and evaluate": lambda: (model.generate(tokens[None, :1], 9), model.evaluate(tokens)),
    }


# ------------------------------------------------------------------------------------- threads, forks and workers


def in_threads(cases: dict[str, Case], iterations: int) -> list[str]:
    """What a process holds after four threads have made all calls at once."""
    found: list[BaseException] = []

    def run(call: Case) -> None:
        try:
            _repeat(call, iterations // 4)
        except BaseException as error:
            found.append(error)

    def at_once() -> None:
        calls = [lambda k=k: [case() for case in list(cases.values())[k:] + list(cases.values())[:k]] for k in range(4)]
        threads = [threading.Thread(target=run, args=[call]) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return growth("threads", at_once, 6) + [f"threads: {error!r}" for error in found]


def in_forks(cases: dict[str, Case], iterations: int) -> list[str]:
    """What a process holds whose children, forked after it has computed in parallel, make all calls.

    What users are told to do makes it right: a child computes in one thread, as a DataLoader's workers do.
    """
    torch.set_num_threads(2)
    torch.randn(1 << 20).exp()
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
    found: list[str] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for case in cases.values():
                    case()
                functional.count_bigrams(torch.zeros(1 << 20, dtype=torch.int64), 5)  # enough for two threads
                os._exit(0)
            os._exit(1)
        if status := os.waitpid(child, 0)[1]:
            found.append(f"forks: a child ended with {status}")

    return growth("forks", fork, iterations) + found


class _Batches(Dataset[Tensor]):
    """Items that call ops, in whatever process asks for them."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        idx, targets = ops.get_batch(torch.arange(100), 2, 8, torch.Generator().manual_seed(index))
        loss = functional.embedding_cross_entropy(idx, torch.eye(100), targets)
        return torch.stack([loss, *functional.multinomial(torch.ones(5), 2).float()])


def in_workers(method: str, iterations: int) -> list[str]:
    """What a process holds after a DataLoader's workers, which it starts anew for each pass, have made calls."""
    functional.count_bigrams(torch.zeros(1 << 20, dtype=torch.int64), 5)

    def one_pass() -> None:
        loader = DataLoader(_Batches(), batch_size=8, num_workers=2, multiprocessing_context=method)
        assert len(list(loader)) == 4

    return growth(f"workers, {method}", one_pass, iterations)


# ------------------------------------------------------------------------------------------------- the end


def ends_with_daemons(cases: dict[str, Case]) -> list[str]:
    """How processes end, each of which leaves a case running in daemon threads."""
    found = []
    for name, case in cases.items():
        child = os.fork()
        if child == 0:
            for _ in range(2):
                threading.Thread(target=_keep, args=[case], daemon=True).start()
            time.sleep(0.02)
            sys.exit()
        if status := os.waitpid(child, 0)[1]:
            found.append(f"{name} in a daemon thread: the process ended with {status}")
    return found


def _keep(case: Case) -> NoReturn:
    """Calls the case until the process ends, without freeing a tensor: where that meets the end, PyTorch aborts."""
    kept = []
    while True:
        kept.append(case())


def daemon_cases() -> dict[str, Case]:
    """Long calls, in which a daemon thread nearly always is when the interpreter ends."""
    tokens, weight = torch.randint(100, (1 << 18,)), torch.randn(100, 100)
    tokenizer = CharTokenizer("".join(map(chr, range(100))))
    text, seed, prompt = tokenizer.decode(tokens) * 5, torch.Generator(), tokens[None, :1]
    probs = torch.rand(1 << 18)
    moments = [torch.zeros(1 << 21) for _ in range(4)]
    step = torch.ones(())
    optimizer = (0.01, 0.9, 0.99, 1e-8, 0.01, False)
    loss_options = (None, -100, 1, 0.0, 0.0, -1, False, False)
    return {  # no op of PyTorch's own, nor through torch.ops: these abort there
        "adamw_": lambda: ops.adamw_(*moments, None, step, *optimizer),
        "adamw_step": lambda: ops.adamw_step(*moments, None, step, *optimizer),
        "count_bigrams": lambda: ops.count_bigrams(tokens, 100),
        "embedding_cross_entropy": lambda: ops.embedding_cross_entropy(tokens, weight, tokens, *loss_options),
        "generate": lambda: ops.generate(prompt, weight, 10**4, 1.0, *[None] * 4, "torch", seed, ()),
        "generate, philox": lambda: ops.generate(prompt, weight, 10**5, 1.0, *[None] * 4, "philox", seed, ()),
        "get_batch": lambda: ops.get_batch(tokens, 1 << 10, 1 << 8, seed),
        "multinomial": lambda: ops.multinomial(probs, 1, False, "philox", seed),
        "encode": lambda: tokenizer.encode(text),
    }


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

    def check(self, interrupting: AtBytecodes | AtMoments, max_steps: int) -> list[str]:
        """Takes the steps in a context that sends the SIGINTs; returns what is wrong with what they leave behind."""
        model, histories, found = self._new_model(), [], []
        with torch.set_grad_enabled(self._grad_mode), _handled_by(self._handler):
            try:
                with interrupting:
                    histories.append(self._fit(model, max_steps))
            except (KeyboardInterrupt, EndedError) as error:
                histories += [error.history] if hasattr(error, "history") else []
            finally:
                interrupting.end()
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

    def end(self) -> None:
        """Nothing: none is left to be sent."""

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
        self._not_begun = threading.Lock()
        self._not_begun.acquire()
        self._thread = threading.Thread(target=self._send, args=[seconds], daemon=True)
        self._thread.start()  # not where the first may come: an interrupt within breaks Python's own locks

    def __enter__(self) -> None:
        self._not_begun.release()

    def __exit__(self, *_error: object) -> None:
        self.end()

    def end(self) -> None:
        """Waits for the last: on a busy machine it comes late, when the first has ended the run, or its beginning."""
        while self._thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt, EndedError):
                self._thread.join()
        with contextlib.suppress(KeyboardInterrupt, EndedError):
            time.sleep(1e-3)  # handlers run

    def _send(self, seconds: tuple[float, ...]) -> None:
        self._not_begun.acquire()
        begin = time.monotonic()
        for moment in seconds:
            while (rest := begin + moment - time.monotonic()) > 0:
                time.sleep(rest if rest > 1e-3 else 0)
            signal.raise_signal(signal.SIGINT)


def interrupted_runs(seed: int, count: int) -> list[str]:
    """Interrupts runs at random bytecodes and moments by two SIGINTs, at most 0.2 ms apart; returns what is wrong."""
    chance, found = random.Random(seed), []
    interrupting: AtBytecodes | AtMoments
    for kind in range(len(_RUNS)):
        InterruptedRun(kind).check(AtMoments(), 5)  # imports what is imported once: most bytecodes would be of that
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


# --------------------------------------------------------------------------------------------------- all of it


def run_section(name: str, iterations: int, seed: int) -> list[str]:
    """What one section finds, in this process."""
    torch.manual_seed(seed)
    torch.set_num_threads(2 if name in ("threads", "forks", "workers fork") else 1)
    if name == "interrupts":
        return interrupted_runs(seed, iterations)
    if name.startswith("workers "):
        return in_workers(name.removeprefix("workers "), iterations)
    if name == "daemons":
        return [found for _ in range(iterations) for found in ends_with_daemons(daemon_cases())]
    if name in ("threads", "forks"):
        return (in_threads if name == "threads" else in_forks)({**op_cases(), **error_cases()}, iterations)
    with tempfile.TemporaryDirectory() as folder:
        cases = op_cases() if name == "ops" else error_cases() if name == "errors" else file_cases(folder)
        return [found for what, case in cases.items() for found in growth(what, case, iterations)]


SECTIONS = {  # how often, in `make soak`
    "ops": 10**6,
    "errors": 10**6,
    "threads": 10**5,
    "files": 2000,
    "forks": 300,
    "workers fork": 30,
    "workers spawn": 6,
    "interrupts": 3000,
    "daemons": 30,
}


def in_a_process(sections: dict[str, int], seed: int, *, first: str = "", seconds: float = 4 * 3600) -> list[str]:
    """What sections find in a process of their own, which may hang or crash; ``first`` is what it does before."""
    script = f"""{first}
import json
from tests.trust import soak
print(json.dumps([found for section in {sections}.items() for found in soak.run_section(*section, {seed})]))"""
    name = ", ".join(sections)
    try:
        ended = processes.run([sys.executable, "-c", script], seconds=seconds)
    except TimeoutExpired:
        return [f"{name}: has not ended after {seconds:.0f} s"]
    if ended.returncode:
        return [f"{name}: ended with {ended.returncode}: {ended.stderr[-500:]}"]
    found: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return found


def trial(seconds: float, seed: int) -> tuple[dict[str, int], list[str]]:
    """All sections, with the share of their iterations that fits into the seconds."""
    share = min(1.0, seconds / 900)
    tried: dict[str, int] = {}
    found: list[str] = []
    for name, iterations in SECTIONS.items():
        tried[name] = max(6, round(iterations * share))
        print(f"soak: {tried[name]} {name}, seed {seed}", flush=True)
        found += in_a_process({name: tried[name]}, seed)
    return tried, found


def main() -> None:
    """The command line of `make soak`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=900.0, help="about how long, on a quiet machine")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    report.run("make soak", partial(trial, arguments.seconds, arguments.seed))


if __name__ == "__main__":
    main()
