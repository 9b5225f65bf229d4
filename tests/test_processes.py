"""Processes that tests start get the default signals, are limited in time, and never outlive their test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
ENDLESS = ["sh", "-c", "echo started; exec sleep 1000"]

# Prints to the fifo if it lives too long. Only when neither process is left does the fifo end.
FAMILY = 'exec 3>"$0"; (sleep 30; echo survived >&3) & echo started; wait'


class Family:
    """A process with a child of its own, and a fifo that both keep open."""

    def __init__(self, folder: Path) -> None:
        fifo = folder / "fifo"
        os.mkfifo(fifo)
        self.command = ["sh", "-c", FAMILY, str(fifo)]
        self.reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer

    def is_killed(self) -> bool:
        """Waits until both have ended."""
        os.set_blocking(self.reader, True)
        with open(self.reader) as fifo:
            return fifo.read() == ""


@pytest.fixture
def no_signals() -> Iterator[None]:
    """As under nohup, in the background, and worse: signals are ignored and blocked."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_the_default_ones(number: signal.Signals, no_signals: None) -> None:
    with processes.start(ENDLESS) as process:
        processes.read_until(process, "started")
        process.send_signal(number)
        assert process.wait(timeout=60) == -number


def test_ctrl_c_raises_in_python(no_signals: None) -> None:
    script = "import time; print('started', flush=True); time.sleep(1000)"
    with processes.start([sys.executable, "-c", script]) as process:
        processes.read_until(process, "started")
        process.send_signal(signal.SIGINT)
        _output, errors = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors


def test_the_end_of_the_test_kills(tmp_path: Path) -> None:
    family = Family(tmp_path)
    with contextlib.suppress(ZeroDivisionError), processes.start(family.command) as process:
        processes.read_until(process, "started")
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    assert family.is_killed()


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    family = Family(tmp_path)
    shell, option, script, fifo = family.command
    with processes.start([shell, option, script.replace("wait", "exit 3"), fifo]) as process:
        processes.read_until(process, "started")
        assert process.wait(timeout=60) == 3
    assert family.is_killed()


def test_the_end_of_the_time_kills(tmp_path: Path) -> None:
    family = Family(tmp_path)
    with processes.start(family.command, seconds=0.5) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert family.is_killed()
    with processes.start(["sleep", "1000"], seconds=0.1) as process, pytest.raises(AssertionError, match="never print"):
        processes.read_until(process, "started")
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(["sleep", "1000"], seconds=0.1)


def test_a_kill_of_the_starter_kills(tmp_path: Path) -> None:
    family = Family(tmp_path)
    script = f"""
import os, processes, signal
with processes.start({family.command}) as process:
    processes.read_until(process, "started")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = processes.run([sys.executable, "-c", script], cwd=Path(__file__).parent)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert family.is_killed()


def test_run(tmp_path: Path) -> None:
    command = ["sh", "-c", "cat; pwd; echo $NAME; echo é >&2; exit 7"]
    env = {**os.environ, "NAME": "value"}
    result = processes.run(command, input="text\n", cwd=tmp_path, env=env)
    assert result.stdout == f"text\n{tmp_path}\nvalue\n"
    assert (result.stderr, result.returncode) == ("é\n", 7)
    with pytest.raises(AssertionError, match="é"):
        processes.run(command, check=True)
    assert processes.run(["cat"], check=True).stdout == ""  # nothing to read, not even a terminal
