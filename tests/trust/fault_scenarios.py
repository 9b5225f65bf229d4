"""Faults, and what must hold after each: the scenarios of tests/trust/faults.py.

A scenario runs in a process of its own, of one thread, which it may fork; fault_injection.c is preloaded. It says by
``Log.case`` what it is about to do, so that the one who watches it knows what a crash or a hang belongs to.

python -m tests.trust.fault_scenarios NAME SECONDS SEED FOLDER
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from bigramx import BigramCounts, BigramLanguageModel, CharTokenizer, History, data, fit, functional, optim
from bigramx.__main__ import main as main_of_command
from tests.trust.faults import PREFIX

_V = 150  # a model of 90 KB: written by several calls, killed in the middle of some


class Log:
    """What a scenario did, told to the one who watches."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def case(self, what: str, description: str) -> None:
        """Counts one more of ``what``, and tells the watcher what comes."""
        self._counts[what] += 1
        self._tell("case", f"{what}: {description}")

    def finding(self, description: str) -> None:
        self._tell("finding", description)

    def end(self) -> None:
        self._tell("counts", dict(self._counts))

    @staticmethod
    def _tell(kind: str, value: object) -> None:
        print(f"{PREFIX}{json.dumps([kind, value])}", flush=True)


class Run:
    """What a scenario is given: how long it may take, where, and its randomness."""

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        self.random, self.folder, self.log = random.Random(seed), folder, Log()
        self._seconds = seconds
        self.is_short = seconds < 1

    def rounds(self, least: int) -> Iterator[int]:
        """0, 1, 2, ..., for as long as there is time, and at least so many on the slowest machine."""
        end = time.monotonic() + self._seconds
        yield from range(least)
        yield from itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(least))


class Checkpoints:
    """Two models with their histories, which a file may hold: each can be told from the other, and from a mixture."""

    def __init__(self) -> None:
        tokens = torch.arange(_V)
        self._all = []
        for step in (1, 2):
            model = BigramLanguageModel(_V)
            model.tokenizer = CharTokenizer.from_text("".join(chr(0x4E00 + i) for i in range(_V)))
            history = fit(model, tokens, batch_size=2, block_size=3, max_steps=step, progress=False)
            self._all.append((model, history))

    def save(self, path: Path, which: int) -> None:
        model, history = self._all[which]
        model.save(path, history=history)

    def found_in(self, path: Path) -> int:
        """Which of them the file holds, whole; raises an AssertionError if neither."""
        model, history = BigramLanguageModel.load(path), History.load(path)
        for which, (known, its) in enumerate(self._all):
            if torch.equal(model.token_embedding_table.weight, known.token_embedding_table.weight):
                assert history.losses == its.losses, "the history is another one's"
                assert model.tokenizer == known.tokenizer, "the tokenizer is another one's"
                return which
        raise AssertionError("the table is neither the old nor the new one")

    def check(self, run: Run, path: Path, allowed: Sequence[int | None], what: str) -> None:
        """The file is one of those allowed, None: there is none; and once it is saved again nothing lies beside it."""
        try:
            found = self.found_in(path) if path.exists() else None
        except (AssertionError, ValueError, OSError) as error:
            run.log.finding(f"{what}: the file is not whole: {error}")
            return
        if found not in allowed:
            run.log.finding(f"{what}: expected the file to be one of {allowed}, found {found}")
        self.save(path, 0)
        if left := [name for name in os.listdir(path.parent) if name != path.name]:
            run.log.finding(f"{what}: left after the next save: {left}")


@contextlib.contextmanager
def _forked(work: Callable[[], object], output: Path | None = None) -> Iterator[int]:
    """The id of a child that does the work and exits; killed at the end if it has not been waited for."""
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work, output)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _work_and_exit(work: Callable[[], object], output: Path | None) -> NoReturn:
    """Exits with the status of the work, or as Python does where a signal comes before or after it."""
    status = 128 + signal.SIGINT
    try:
        if output is not None:
            file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
        try:
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except Exception:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(pid: int) -> int:
    """The exit status of a child, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _load(path: Path) -> None:
    """Each load meets a whole file, though not the same one where others write."""
    BigramLanguageModel.load(path)
    History.load(path)


def kills_while_saving(run: Run) -> None:
    """SIGKILL at random moments while one or two processes save."""
    checkpoints = Checkpoints()
    path = run.folder / "model.safetensors"
    checkpoints.save(path, 0)

    ready, started = os.pipe()

    def save_for_ever() -> None:
        os.write(started, b"1")
        for turn in range(10**9):
            checkpoints.save(path, turn % 2)

    for _ in run.rounds(least=5):
        writers = run.random.choice([1, 1, 2])
        delay = run.random.uniform(0, 0.03)
        run.log.case("kills while saving", f"{writers} writers, after {delay:.4f} s")
        with contextlib.ExitStack() as children:
            pids = [children.enter_context(_forked(save_for_ever)) for _ in range(writers)]
            for _ in pids:
                os.read(ready, 1)
            time.sleep(delay)
            if writers == 2:
                _load(path)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                _wait(pid)
        checkpoints.check(run, path, [0, 1], "a kill while saving")


_STEPS = 20_000
_TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def _train(folder: Path, *options: str) -> Callable[[], None]:
    """The command `bigramx train`, with a checkpoint every 20 ms."""
    text = folder / "text.txt"
    text.write_text(_TEXT, encoding="utf-8")
    arguments = ["--steps", str(_STEPS), "--eval-interval", "5000", "--sample", "0", "--checkpoint-interval", "0.02"]
    out = folder / "runs"

    def train() -> None:
        resume = ["--resume"] if (out / "model.safetensors").exists() else []
        sys.argv = ["bigramx", "train", str(text), "--out", str(out), *arguments, *resume, *options]
        main_of_command()

    return train


def _import_all(folder: Path) -> None:
    """What the command imports while it runs: children do not import it anew, and end within their work."""
    folder.mkdir()
    ignored = io.StringIO()
    with contextlib.redirect_stdout(ignored), contextlib.redirect_stderr(ignored), contextlib.suppress(SystemExit):
        _train(folder, "--steps", "1")()


def _run_to_its_end(train: Callable[[], None], output: Path) -> str | None:
    """None, or what the command printed where it failed."""
    with _forked(train, output) as pid:
        return None if _wait(pid) == 0 else output.read_text(encoding="utf-8")


def _weights(folder: Path) -> tuple[Tensor, list[float]]:
    path = folder / "runs" / "model.safetensors"
    return BigramLanguageModel.load(path).token_embedding_table.weight.detach(), History.load(path).losses


def _ends_of_training(
    run: Run, what: str, end: Callable[[int], None], statuses: Callable[[int], bool], saves: bool
) -> None:
    """Ends training runs at random moments, goes on, and compares with the run that nobody ended."""
    _import_all(run.folder / "first")
    (run.folder / "whole").mkdir()
    output = run.folder / "output.txt"
    begin = time.monotonic()
    if failed := _run_to_its_end(_train(run.folder / "whole"), output):
        run.log.finding(f"bigramx train failed: {failed}")
        return
    longest = 1.1 * (time.monotonic() - begin)
    expected = _weights(run.folder / "whole")
    for turn in run.rounds(least=1):
        folder = run.folder / str(turn)
        folder.mkdir()
        train = _train(folder)
        path = folder / "runs" / "model.safetensors"
        for _ in range(3):
            delay = run.random.uniform(0, longest)
            run.log.case(what, f"after {delay:.4f} s")
            before = History.load(path).step if path.exists() else 0
            with _forked(train, output) as pid:
                time.sleep(delay)
                end(pid)
                status = _wait(pid)
            printed = output.read_text(encoding="utf-8")
            if not statuses(status) or "Traceback" in printed:
                run.log.finding(f"{what}: exit status {status}, after {delay:.4f} s: {printed[-2000:]}")
            if saves and "saved in" in printed and not path.exists():
                run.log.finding(f"{what}: nothing was saved: {printed[-2000:]}")
            if path.exists() and History.load(path).step < before:
                run.log.finding(f"{what}: the run went back from step {before} to {History.load(path).step}")
        if failed := _run_to_its_end(train, output):
            run.log.finding(f"{what}: cannot be resumed: {failed[-2000:]}")
        else:
            table, losses = _weights(folder)
            if not torch.equal(table, expected[0]) or losses != expected[1]:
                run.log.finding(f"{what}: the resumed run ended with other bits, or other losses")
        left = {name for name in os.listdir(folder / "runs") if name.endswith(".tmp") or name.startswith(".")}
        if left:
            run.log.finding(f"{what}: left behind: {left}")


def kills_of_training(run: Run) -> None:
    """SIGKILL at random moments of `bigramx train`; resumed, it ends with the same bits as a run that nobody killed."""
    _ends_of_training(
        run,
        "kills of bigramx train",
        lambda pid: os.kill(pid, signal.SIGKILL),
        lambda status: status in (-signal.SIGKILL, 0),
        saves=False,
    )


def signals_to_training(run: Run) -> None:
    """SIGINT, SIGTERM or SIGHUP, once or several times within a millisecond, at random moments of `bigramx train`."""
    sent: list[int] = []

    def end(pid: int) -> None:
        sent[:] = [run.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])]
        for _ in range(run.random.choice([1, 1, 2, 3])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent[0])
            time.sleep(run.random.choice([0, 0.0002, 0.001]))

    # Before Python has its handlers, and after it gave them back, the signal itself ends the process.
    _ends_of_training(
        run, "signals to bigramx train", end, lambda status: status in (0, 128 + sent[0], -sent[0]), saves=True
    )


def kills_of_counting(run: Run) -> None:
    """SIGKILL at random moments of `bigramx count`: the old counts stay until the new ones are there; it can go on."""
    shards = [str(run.folder / f"{name}.bin") for name in range(3)]
    counts = {"old": BigramCounts(_V), "new": BigramCounts(_V)}
    for shard in shards:
        tokens = torch.randint(_V, (300_000,)).to(torch.uint16)
        Path(shard).write_bytes(tokens.numpy().tobytes())
        counts["new"].update(tokens)
    counts["old"].update(tokens)
    path, output = run.folder / "counted" / "counts.safetensors", run.folder / "output.txt"
    path.parent.mkdir()

    def count() -> None:
        sys.argv = ["bigramx", "count", *shards, "--out", str(path)]
        main_of_command()

    begin = time.monotonic()
    failed = _run_to_its_end(count, output)
    longest = 1.1 * (time.monotonic() - begin)
    for _ in run.rounds(least=3):
        delay = run.random.uniform(0, longest)
        run.log.case("kills of bigramx count", f"after {delay:.4f} s")
        counts["old"].save(path)
        with _forked(count, output) as pid:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            _wait(pid)
        what = f"a kill of bigramx count after {delay:.4f} s"
        try:
            if BigramCounts.load(path) not in counts.values():
                run.log.finding(f"{what}: the counts are neither the old nor the new ones")
        except (ValueError, OSError) as error:
            run.log.finding(f"{what}: the file is not whole: {error}")
        failed = failed or _run_to_its_end(count, output)
        if failed or BigramCounts.load(path) != counts["new"] or list(path.parent.iterdir()) != [path]:
            run.log.finding(f"{what}: it does not go on: {failed}")


def full_disks(run: Run) -> None:
    """A file system without room for the new file, and a limit on the size of files."""
    checkpoints = Checkpoints()
    probe = run.folder / "probe"
    checkpoints.save(probe, 0)
    size = probe.stat().st_size
    probe.unlink()
    for kilobytes in range(8, 3 * size // 1024, 64 if run.is_short else 8):
        with _tmpfs(run.folder / "disk", kilobytes) as disk:
            if disk is None:
                print("full_disks: no file system may be mounted here", flush=True)
                break
            _fill_up(run, checkpoints, disk, f"a disk of {kilobytes} KB")
    for limit in range(0, size, 16384 if run.is_short else 1024):
        folder = run.folder / str(limit)
        folder.mkdir()
        path = folder / "model.safetensors"
        checkpoints.save(path, 0)
        run.log.case("limits on the size of files", f"{limit} bytes")

        def save(path: Path = path, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                checkpoints.save(path, 1)
            except OSError as error:
                sys.exit(0 if error.errno == errno.EFBIG and str(path) in str(error) else f"{error!r}")
            sys.exit("no error")

        with _forked(save, run.folder / "output.txt") as pid:
            if _wait(pid) != 0:
                run.log.finding(f"a limit of {limit} bytes: {(run.folder / 'output.txt').read_text(encoding='utf-8')}")
        checkpoints.check(run, path, [0], f"a limit of {limit} bytes")


def _fill_up(run: Run, checkpoints: Checkpoints, disk: Path, what: str) -> None:
    path = disk / "model.safetensors"
    run.log.case("full disks", what)
    allowed: list[int | None] = [None, 0]
    for which in (0, 1):
        error = _error_of(lambda which=which: checkpoints.save(path, which))  # type: ignore[misc]
        if error is None:
            allowed = [which]
        elif error.errno != errno.ENOSPC or str(path) not in str(error):
            run.log.finding(f"{what}: {error!r}")
    found = checkpoints.found_in(path) if path.exists() else None
    if found not in allowed or [name for name in os.listdir(disk) if name != path.name]:
        run.log.finding(f"{what}: the file is {found}, expected one of {allowed}; in the folder: {os.listdir(disk)}")


def _error_of(work: Callable[[], object]) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def _tmpfs(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """A file system of that size, where one may be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


class Injection:
    """Makes the k-th call of a function of the C library fail, by fault_injection.c."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._arm, self._disarm = library.fault_arm, library.fault_disarm
        self._arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_size_t]
        self._arm.restype = None
        self._disarm.restype = ctypes.c_long

    def fails(self, call: bytes, k: int, error: int, work: Callable[[], object], least: int = 0) -> bool:
        """Whether the call was reached, and so failed, while the work was done; the work's exceptions get through."""
        self._arm(call, k, error, least)
        try:
            work()
        finally:
            num_failures: int = self._disarm()
        return num_failures == 1


_WRITING = {
    "open": [errno.EMFILE, errno.EACCES, errno.EROFS, errno.ENOSPC],
    "write": [errno.ENOSPC, errno.EIO, errno.EDQUOT],
    "short write": [errno.ENOSPC],
    "fsync": [errno.EIO, errno.EINVAL],
    "rename": [errno.EACCES, errno.EIO, errno.EXDEV],
    "link": [errno.EPERM, errno.EIO],
    "unlink": [errno.EACCES],
    "close": [errno.EIO, errno.ENOSPC],
    "flock": [errno.ENOLCK],
    "chown": [errno.EPERM],
    "fchown": [errno.EPERM],
    "fchmod": [errno.EPERM],
    "ftruncate64": [errno.EIO],
    "lseek64": [errno.EIO],
}
_READING = {
    "open": [errno.EMFILE, errno.EIO],
    "read": [errno.EIO, errno.EISDIR],
    "lseek64": [errno.EIO],
    "close": [errno.EIO],
}
_MOST_CALLS = 400  # far more than saving or loading takes


def failing_calls(run: Run) -> None:
    """Each call of the C library that saving and loading make fails, one after the other."""
    checkpoints, injection = Checkpoints(), Injection()
    path = run.folder / "saved" / "model.safetensors"
    path.parent.mkdir()
    for call, errors in _WRITING.items():
        for error in errors[: 1 if run.is_short else None]:
            for exists in (True, False):
                _fail_writing(run, checkpoints, injection, path, call, error, exists)
    checkpoints.save(path, 1)
    for call, errors in _READING.items():
        for error in errors[: 1 if run.is_short else None]:
            _fail_reading(run, checkpoints, injection, path, call, error)


def _fail_writing(
    run: Run, checkpoints: Checkpoints, injection: Injection, path: Path, call: str, error: int, exists: bool
) -> None:
    for k in range(1, _MOST_CALLS):
        path.unlink(missing_ok=True)
        if exists:
            checkpoints.save(path, 0)
        what = f"saving, {'over an old file, ' if exists else ''}{call} number {k} fails with {errno.errorcode[error]}"
        run.log.case("failing calls", what)
        allowed: list[int | None] = [1]
        try:
            if not injection.fails(call.encode(), k, error, lambda: checkpoints.save(path, 1)):
                return
        except OSError as raised:
            allowed = [0] if exists else [None]
            if str(path) not in str(raised):
                run.log.finding(f"{what}: the error does not name the file: {raised!r}")
        except Exception as raised:
            run.log.finding(f"{what}: {raised!r}")
        checkpoints.check(run, path, allowed, what)
    run.log.finding(f"{call}: called more than {_MOST_CALLS} times")


def _fail_reading(run: Run, checkpoints: Checkpoints, injection: Injection, path: Path, call: str, error: int) -> None:
    for k in range(1, _MOST_CALLS):
        what = f"loading, {call} number {k} fails with {errno.errorcode[error]}"
        run.log.case("failing calls", what)
        try:
            if not injection.fails(call.encode(), k, error, lambda: checkpoints.found_in(path)):
                return
        except OSError as raised:
            if str(path) not in str(raised):
                run.log.finding(f"{what}: the error does not name the file: {raised!r}")
        except Exception as raised:
            run.log.finding(f"{what}: {raised!r}")
    run.log.finding(f"{call}: called more than {_MOST_CALLS} times")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _kernels() -> dict[str, Callable[[], object]]:
    """Calls of all kernels, each of which gives the same whenever it is called."""
    torch.manual_seed(2)
    vocab_size, num_tokens = 70, 1000
    weight = torch.randn(vocab_size, vocab_size)
    tokens = torch.randint(vocab_size, (num_tokens,))
    idx, targets = tokens[:-1], tokens[1:]
    probs = weight.softmax(-1)

    def loss(**options: object) -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        value = functional.embedding_cross_entropy(idx, leaf, targets, **options)  # type: ignore[arg-type]
        value.sum().backward()
        assert leaf.grad is not None
        return [value.detach(), leaf.grad.to_dense()]

    def with_logits() -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        value, logits = functional.embedding_cross_entropy_with_logits(idx, leaf, targets)
        (value + logits.square().mean()).backward()
        assert leaf.grad is not None
        return [value.detach(), leaf.grad]

    def model() -> BigramLanguageModel:
        fresh = BigramLanguageModel(vocab_size)
        with torch.no_grad():
            fresh.token_embedding_table.weight.copy_(weight)
        return fresh

    def adamw() -> list[Tensor]:
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = optim.AdamW([parameter], amsgrad=True)
        for _ in range(2):
            parameter.grad = probs.clone()
            optimizer.step()
        return [parameter.detach()]

    def trained() -> list[Tensor]:
        fresh = model()
        sizes = {"batch_size": 4, "block_size": 8, "max_steps": 5, "eval_interval": 2}
        history = fit(fresh, tokens, tokens, progress=False, generator=_generator(), **sizes)  # type: ignore[arg-type]
        return [fresh.token_embedding_table.weight.detach(), torch.tensor(history.losses)]

    kernels: dict[str, Callable[[], object]] = {
        "loss": loss,
        "loss, no reduction, with options": lambda: loss(reduction="none", label_smoothing=0.1, z_loss=0.1),
        "loss, sparse": lambda: loss(sparse=True),
        "loss with logits": with_logits,
        "count_bigrams": lambda: [functional.count_bigrams(tokens, vocab_size)],
        "get_batch": lambda: list(data.get_batch(tokens, 8, 16, generator=_generator())),
        "AdamW": adamw,
        "fit": trained,
        "evaluate": lambda: [torch.tensor(model().evaluate(tokens))],
        "tokenizer": lambda: [CharTokenizer.from_text(_TEXT).encode(_TEXT)],
    }
    for sampler in ("torch", "philox"):
        for replacement in (False, True):
            kernels[f"multinomial, {sampler}, replacement={replacement}"] = functools.partial(
                _drawn, probs, replacement, sampler
            )
        for options in ({}, {"top_k": 50, "top_p": 0.9}, {"stop": 7}):
            kernels[f"generate, {sampler}, {options}"] = functools.partial(
                _generated, model(), idx[:3, None], {"sampler": sampler, **options}
            )
    return kernels


def _drawn(probs: Tensor, replacement: bool, sampler: str) -> list[Tensor]:
    return [torch.ops.bigramx.multinomial(probs, 20, replacement, sampler, _generator())]


def _generated(model: BigramLanguageModel, idx: Tensor, options: Mapping[str, object]) -> list[Tensor]:
    return [model.generate(idx, 300, generator=_generator(), **options)]  # type: ignore[arg-type]


def _is_same(first: object, second: object) -> bool:
    assert isinstance(first, list)
    assert isinstance(second, list)
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def failing_allocations(run: Run) -> None:
    """Each allocation of a kilobyte or more within a call fails, one after the other; then the call is repeated."""
    injection = Injection()
    for threads in (2,) if run.is_short else (1, 2):
        torch.set_num_threads(threads)
        for name, call in _kernels().items():
            expected = call()
            for k in _allocations():
                what = f"{name}, {threads} threads, allocation number {k}"
                run.log.case("failing allocations", what)
                try:
                    if not injection.fails(b"malloc", k, errno.ENOMEM, call, least=1024):
                        break
                except (RuntimeError, MemoryError) as error:
                    if isinstance(error, RuntimeError) and "memory" not in str(error) and "bad_alloc" not in str(error):
                        run.log.finding(f"{what}: {error!r}")
                except Exception as error:
                    run.log.finding(f"{what}: {error!r}")
                if not torch.is_grad_enabled() or not _is_same(call(), expected):
                    run.log.finding(f"{what}: the next call gives another result")


def _allocations() -> Iterator[int]:
    """1, 2, 3, ..., then ever fewer, as some calls allocate for each row of a table."""
    k = 1
    while True:
        yield k
        k += 1 + k // 10


def little_memory(run: Run) -> None:
    """A limit on the address space, a little above what is in use."""
    torch.set_num_threads(1)
    output = run.folder / "output.txt"
    for name, call in _kernels().items():
        expected = call()
        for kilobytes in (0, 64, 200, 400, 800, 1600, 4000):
            run.log.case("calls short of memory", f"{name}, {kilobytes} KB")

            def work(call: Callable[[], object] = call, expected: object = expected, more: int = kilobytes) -> None:
                limit = _address_space() + 1024 * more
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                with contextlib.suppress(MemoryError, RuntimeError):
                    call()
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                sys.exit(0 if _is_same(call(), expected) else "the next call gives another result")

            with _forked(work, output) as pid:
                if (status := _wait(pid)) != 0:
                    printed = output.read_text(encoding="utf-8")[-2000:]
                    run.log.finding(f"{name}, short of memory by {kilobytes} KB: exit status {status}: {printed}")


def _address_space() -> int:
    """The bytes of address space in use."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]
    return int(pages) * resource.getpagesize()


def files_changed_while_read(run: Run) -> None:
    """A file is rewritten in place, cut short and written again, all the time, while it is read."""
    checkpoints = Checkpoints()
    sources = {which: run.folder / str(which) for which in (0, 1)}
    for which, source in sources.items():
        checkpoints.save(source, which)
    contents = [source.read_bytes() for source in sources.values()]
    path = run.folder / "changing"
    path.write_bytes(contents[0])
    seed = run.random.random()

    def rewrite() -> None:
        chance = random.Random(seed)
        with open(path, "r+b", buffering=0) as file:
            while True:
                file.truncate(chance.choice([0, 100, 4096, len(contents[0]) // 2, len(contents[0])]))
                file.seek(0)
                file.write(chance.choice(contents))

    with _forked(rewrite):
        for _ in run.rounds(least=20):
            run.log.case("loads of a file that changes", "model and history")
            with contextlib.suppress(ValueError):  # says "damaged", rightly
                _load(path)
            time.sleep(run.random.uniform(0, 0.001))


SCENARIOS: dict[str, Callable[[Run], None]] = {
    scenario.__name__: scenario
    for scenario in (
        kills_while_saving,
        kills_of_training,
        signals_to_training,
        kills_of_counting,
        full_disks,
        failing_calls,
        failing_allocations,
        little_memory,
        files_changed_while_read,
    )
}


def main(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Runs one scenario."""
    torch.set_num_threads(1)  # a child of fork() has no other threads
    torch.manual_seed(seed)
    run = Run(seconds, seed, folder)
    SCENARIOS[name](run)
    run.log.end()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
