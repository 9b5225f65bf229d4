"""The one way in which a test starts a process.

However the tests were started, the command gets the default signal handlers. Whatever happens to the test, the command
and all that it has started are killed when the test ends or the time is over.

The command leads a process group in a session of its own. A guard in that group waits until the time is over or the
test's end of a pipe is closed, as it also is when the test's process is killed by SIGKILL; then it kills the group.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SECONDS = 300.0  # far more than any command needs on a busy machine; one that takes longer hangs


@contextlib.contextmanager
def start(
    command: Sequence[str | Path],
    *,
    seconds: float = SECONDS,
    stdin: int = subprocess.DEVNULL,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A running command, whose standard output and standard error are pipes."""
    lifeline, held = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(lifeline), str(seconds), *map(str, command)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=cwd,
            env=env,
            pass_fds=[lifeline],
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):  # where the guard has done so
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(lifeline)
        os.close(held)


def run(
    command: Sequence[str | Path],
    *,
    seconds: float = SECONDS,
    input: str | None = None,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; with `check` it must succeed. Raises TimeoutExpired when its time is over."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with start(command, seconds=2 * seconds, stdin=stdin, cwd=cwd, env=env) as process:
        output, errors = process.communicate(input, timeout=seconds)  # raises, where the guard would kill
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads what a process prints, up to the end of the first line that contains the text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed: {process.communicate()[1]}")


def guard(lifeline: int, seconds: float) -> NoReturn:
    """Kills the process group, itself included."""
    for standard in (0, 1, 2):
        os.close(standard)  # else whoever reads from the command would wait for the guard
    select.select([lifeline], [], [], seconds)
    os.kill(0, signal.SIGKILL)
    raise AssertionError("unreachable")


def main(lifeline: int, seconds: float, command: list[str]) -> NoReturn:
    """Becomes the command. Forking is safe here, in a process of one thread; in a test it would not be."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    if os.fork() == 0:
        guard(lifeline, seconds)
    os.close(lifeline)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
