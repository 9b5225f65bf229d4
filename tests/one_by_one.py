"""Runs tests so that none takes others along: one that hangs, crashes or breaks the GPU ends its process, not the run.

    python -m tests.one_by_one [--seconds 60] [--limit 600] [--out FILE] tests/test_cuda.py [what else pytest takes]

The tests that are left go on in a new process. FILE has a line of JSON for each test as it ends, so that a run which is
cut off loses none. Plugins of other projects stay off. Exits with 1 where a test failed, with 2 where none ran.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
OUT, SECONDS = "BIGRAMX_ONE_BY_ONE_OUT", "BIGRAMX_ONE_BY_ONE_SECONDS"  # for the processes with the tests
BROKEN_GPU = "CUDA error"  # all that a process asks of a GPU fails after the first of these
GOES_ON = 70  # the exit code of a process that leaves the rest of its tests to the next

STDERR = os.dup(2) if OUT in os.environ else 2  # before pytest captures it

Record = dict[str, Any]


def records(out: Path) -> list[Record]:
    """What the file has of the tests so far: {"test": id, "outcome": "passed", "seconds": 0.1, "message": ""}."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def write(out: Path, record: Record) -> None:
    """Adds a line, whole: a process that ends at once leaves no part of it."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------- in a process with the tests


class Plugin:
    """Leaves out the tests that have run, and writes down those that run."""

    def __init__(self) -> None:
        self.out, self.seconds = Path(os.environ[OUT]), float(os.environ[SECONDS])
        self.record: Record = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before the first test."""
        done = {record["test"] for record in records(self.out)}
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around a test, which has its time, and then ends the process wherever it is."""
        self.record = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0, "message": ""}
        write(self.out, {**self.record, "outcome": "started"})
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            write(self.out, self.record)
            if BROKEN_GPU in self.record["message"]:
                os._exit(GOES_ON)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After the setup, the test and the teardown."""
        self.record["seconds"] = round(self.record["seconds"] + report.duration, 3)
        if report.outcome != "passed" and self.record["outcome"] != "failed":
            self.record["outcome"] = report.outcome
            self.record["message"] = report.longreprtext[-4000:]


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest is told to use this module."""
    config.pluginmanager.register(Plugin())


# ------------------------------------------------------------------------------------------------------ outside


def run(arguments: list[str], out: Path, *, seconds: float, limit: float) -> list[Record]:
    """Runs what pytest takes, ``seconds`` for a test and ``limit`` for all; returns a record for each test."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.one_by_one", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, OUT: str(out.resolve()), SECONDS: str(seconds), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = [record for record in records(out) if record["outcome"] in {"passed", "skipped"}]
    out.write_text("".join(json.dumps(record) + "\n" for record in done), encoding="utf-8")
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        before = len(records(out))
        try:
            ended = processes.run(command, cwd=ROOT, env=environment, seconds=left)
        except subprocess.TimeoutExpired:
            break
        now = records(out)
        if len(now) > before and now[-1]["outcome"] == "started":
            message = f"ended its process with {ended.returncode}: {ended.stderr[-8000:]}"
            write(out, {**now[-1], "outcome": "died", "message": message})
        elif len(now) == before or ended.returncode != GOES_ON:
            if not now:
                print(ended.stdout[-3000:], ended.stderr[-3000:], sep="")
            break
    return list({record["test"]: record for record in records(out)}.values())


def summary(tests: list[Record]) -> str:
    """The tests that did not pass, then how many there were of each kind."""
    bad = [test for test in tests if test["outcome"] not in {"passed", "skipped"}]
    lines = [f"{test['outcome']}: {test['test']}: {_last_line(test['message'])}" for test in bad]
    outcomes = [test["outcome"] for test in tests]
    kinds = {kind: outcomes.count(kind) for kind in ("passed", "failed", "died", "started", "skipped")}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count or kind in {"passed", "failed"})
    return "\n".join([*lines, counts])


def _last_line(message: str) -> str:
    return next((line for line in reversed(message.splitlines()) if line.strip()), "").strip()[:200]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for a test")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for all tests")
    parser.add_argument("--out", type=Path, help="the file for the records; those that passed are not run again")
    options, arguments = parser.parse_known_args()
    with TemporaryDirectory() as folder:
        tests = run(arguments, options.out or Path(folder, "tests.jsonl"), seconds=options.seconds, limit=options.limit)
    print(summary(tests))
    sys.exit(2 if not tests else int(any(test["outcome"] not in {"passed", "skipped"} for test in tests)))


if __name__ == "__main__":
    main()
