"""The short form of make faults, and that its instruments work."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import processes, tree
from tests.trust import fault_scenarios, faults

linux = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected into glibc")

# How often each must have tried at least, as a scenario that tries nothing finds nothing.
LEAST = {
    "kills_while_saving": 5,
    "kills_of_training": 3,
    "signals_to_training": 3,
    "kills_of_counting": 3,
    "full_disks": 5,
    "failing_calls": 100,
    "failing_allocations": 60,
    "little_memory": 50,
    "files_changed_while_read": 20,
}


def test_all_scenarios_are_tried() -> None:
    assert LEAST.keys() == fault_scenarios.SCENARIOS.keys()


@linux
@pytest.mark.cpu_only
@pytest.mark.parametrize("scenario", LEAST)
def test_faults(scenario: str) -> None:
    tried, findings = faults.watch(scenario, seconds=0.5, seed=1)
    assert findings == []
    assert sum(tried.values()) >= LEAST[scenario]


CARELESS = """
import functools, io, sys, time
from pathlib import Path
from tests.trust import fault_scenarios
from tests.trust.fault_scenarios import Checkpoints

@functools.cache
def content_of(checkpoints, which):
    file = io.BytesIO()
    save(checkpoints, file, which)
    return file.getvalue()

def save_in_place(self, path, which):
    content = content_of(self, which)
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, len(content), 4096):
            file.write(content[begin : begin + 4096])
            time.sleep(0.001 if sys.argv[1] == "kills_while_saving" else 0)

save, Checkpoints.save = Checkpoints.save, save_in_place
fault_scenarios.main(sys.argv[1], 0.5, 1, Path(sys.argv[2]))
"""


@linux
@pytest.mark.cpu_only
@pytest.mark.parametrize("scenario", ["kills_while_saving", "failing_calls"])
def test_a_careless_writer_is_found(tmp_path: Path, scenario: str) -> None:
    environment = os.environ | {"LD_PRELOAD": str(faults.injection())}
    done = processes.run([sys.executable, "-c", CARELESS, scenario, str(tmp_path)], env=environment)
    assert '"finding"' in done.stdout, done.stderr


@linux
def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'print({faults.PREFIX!r} + \'["case", "the only one"]\', flush=True); import os; os.kill(os.getpid(), 11)'
    run = processes.run
    monkeypatch.setattr(processes, "run", lambda *_, **options: run([sys.executable, "-c", script], **options))
    tried, findings = faults.watch("crash", 0.1, 1)
    assert tried == Counter()
    assert "status -11" in findings[0]
    assert "the last case: the only one" in findings[0]


KTH_CALL = f"""
import os
from tests.trust.fault_scenarios import Injection

def write():
    with open("file", "wb", buffering=0) as file:
        file.write(b"1")

def sync():
    folder = os.open(".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

def allocate():
    b"1" * 100_000

injection = Injection()
for call, error, work in ((b"write", {errno.ENOSPC}, write), (b"fsync", {errno.EIO}, sync), (b"malloc", 12, allocate)):
    for k in (1, 2):
        try:
            print(injection.fails(call, k, error, work, least=100_000 if call == b"malloc" else 0))
        except MemoryError:
            print("MemoryError")
        except OSError as raised:
            print(raised.errno)
"""


@linux
def test_the_kth_call_fails(tmp_path: Path) -> None:
    environment = os.environ | {"LD_PRELOAD": str(faults.injection()), "PYTHONPATH": str(tree.ROOT)}
    done = processes.run([sys.executable, "-c", KTH_CALL], env=environment, cwd=tmp_path, check=True)
    assert done.stdout.split() == [str(errno.ENOSPC), "False", str(errno.EIO), "False", "MemoryError", "False"]
