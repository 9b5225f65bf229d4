"""What the commands share: printing, progress, signals, and the errors that end them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bigramx import storage

_CLOSED_PIPE = 128 + signal.SIGPIPE  # the status of other tools, as quiet, whose reader has gone away
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newlines and tabs
_SHOWN_EVERY = 0.1  # seconds


class _Console(Console):
    """One that raises an error where nobody reads any more, as files do."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


_console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


class CommandError(RuntimeError):
    """An error for the user, printed as one line.

    Attributes:
        status: The exit status of the process.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def shown(text: str) -> str:
    """The text as it is for files and pipes; for a terminal, without the characters that it would obey."""
    if not sys.stdout.isatty():
        return text
    return _CONTROL_CHARACTERS.sub(lambda match: storage.printable(match.group()), text)


def print_line(text: str, style: str | None = None) -> None:
    """Prints a line."""
    _console.print(shown(text), style=style)


@contextlib.contextmanager
def printed_warnings() -> Iterator[None]:
    """Prints the warnings of what is done meanwhile, each as a line, when it is done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print_line(message)


def write(text: str) -> None:
    """Prints a part of a text at once."""
    sys.stdout.write(shown(text))
    sys.stdout.flush()


class Bar:
    """A progress bar with the rate in tokens and the remaining time; lines are printed above it.

    Where nobody reads any more, the work goes on.

    Args:
        title: What is done.
        total: How much there is to do; None: not known.
        unit: What it is counted in.
    """

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._unit, self._total = unit, total
        self._bar = Progress(*columns, console=_console, transient=True, auto_refresh=False)
        self._task = self._bar.add_task(title, total=total, done="", rate="")
        self._begin = time.monotonic()
        self._next_time = self._begin + _SHOWN_EVERY  # what takes no longer needs no bar

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def show(
        self, done: int, num_tokens: int | None = None, *, title: str | None = None, total: int | None = None
    ) -> None:
        """Shows how much is done, and the rate at which so many tokens were. Many times a second: ten are shown."""
        if not _console.is_interactive or (now := time.monotonic()) < self._next_time:
            return
        self._next_time = now + _SHOWN_EVERY
        self._total = self._total if total is None else total
        of_total = "" if self._total is None else f"/{self._total:,}"
        rate = "" if num_tokens is None else f"{compact(num_tokens / max(now - self._begin, 1e-9))} tokens/s"
        with contextlib.suppress(OSError):
            self._bar.start()
            self._bar.update(
                self._task,
                description=title,
                total=self._total,
                completed=done,
                done=f"{done:,}{of_total} {self._unit}",
                rate=rate,
                refresh=True,
            )

    def print(self, text: str) -> None:
        """Prints a line, if anyone still reads."""
        with contextlib.suppress(OSError):
            print_line(text)


def compact(number: float) -> str:
    """Three digits or so of a number, in thousands, millions, ..."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


class Signals:
    """Ends a command at SIGINT, SIGTERM or SIGHUP: they are only remembered, until it is between two steps.

    What is ignored stays so: SIGHUP under nohup, SIGINT in the background job of a shell.

    Args:
        message: What the command ends with, if it does not end by itself.

    Attributes:
        received: The first of them.
    """

    def __init__(self, message: str = "interrupted") -> None:
        self.received: int | None = None
        self._message = message
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.received is not None and isinstance(error, KeyboardInterrupt):
            raise self.error(self._message) from None

    def _remember(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received = number

    def check(self) -> None:
        """To be called between two steps.

        Raises:
            KeyboardInterrupt: There was a signal.
        """
        if self.received is not None:
            raise KeyboardInterrupt

    def error(self, message: str) -> CommandError:
        """The error of a command that a signal ended."""
        return CommandError(message, 128 + (self.received or 0))


def run(command: Callable[[], object]) -> None:
    """Runs the command line; errors are printed as one line, without a traceback."""
    _prepare_streams()
    try:
        try:
            command()
        finally:
            _flush()
    except BrokenPipeError:
        sys.exit(_CLOSED_PIPE)
    except SystemExit as ended:  # which typer makes of it
        sys.exit(_CLOSED_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except CommandError as error:
        _fail(str(error), error.status)
    except (OSError, ValueError, IndexError, TypeError, OverflowError, RuntimeError, MemoryError, ImportError) as error:
        # The first line of an error from C++ is its message; a stack trace may follow.
        _fail((str(error) or type(error).__name__).partition("\n")[0], 1)


def _fail(message: str, status: int) -> NoReturn:
    """Prints one line, if anyone still reads."""
    with contextlib.suppress(OSError):
        print(f"bigramx: {storage.printable(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _prepare_streams() -> None:
    """A closed stream takes what is written and drops it; characters that the console lacks are replaced."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it takes the lowest descriptor that is free, which a file of ours would get
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more when it ends, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
