"""The short form of make faults, and that its instruments work."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import processes
from tests.trust import fault_scenarios, faults

linux = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected into glibc")

# How often each must have tried at least, as a scenario that tries nothing finds nothing.
LEAST = {
    "kills_while_saving": 5,
    "kills_of_training": 3,
    "signals_to_training": 3,
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


PLANTED = """
import os, sys, time
from pathlib import Path
from tests.trust import fault_scenarios
from tests.trust.fault_scenarios import Checkpoints, Run

def save_in_place(self, path, which):
    "Writes the file as a careless program does."
    new = path.with_name("new")
    original(self, new, which)
    content = new.read_bytes()
    new.unlink()
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, len(content), 4096):
            file.write(content[begin : begin + 4096])

def crash(run):
    run.log.case("crashes", "the only one")
    os.kill(os.getpid(), 11)

original = Checkpoints.save
if sys.argv[2] == "in place":
    Checkpoints.save = save_in_place
fault_scenarios.SCENARIOS["crash"] = crash
fault_scenarios.main(sys.argv[1], 2.0, 1, Path(sys.argv[3]))
"""


@linux
@pytest.mark.cpu_only
@pytest.mark.parametrize("scenario", ["kills_while_saving", "failing_calls"])
def test_a_careless_writer_is_found(tmp_path: Path, scenario: str) -> None:
    environment = os.environ | {"LD_PRELOAD": str(faults.injection())}
    command = [sys.executable, "-c", PLANTED, scenario, "in place", str(tmp_path)]
    done = processes.run(command, env=environment)
    assert '"finding"' in done.stdout, done.stderr


@linux
def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(command: list[str], **options: object) -> object:
        return run([sys.executable, "-c", PLANTED, "crash", "", command[-1]], **options)  # type: ignore[arg-type]

    run = processes.run
    monkeypatch.setattr(processes, "run", crash)
    tried, findings = faults.watch("crash", 0.1, 1)
    assert tried == Counter()
    assert "status -11" in findings[0]
    assert "the last case: crashes: the only one" in findings[0]


@linux
@pytest.mark.parametrize(
    ("call", "work", "error"),
    [
        ("write", "open('file', 'wb', buffering=0).write(b'1')", errno.ENOSPC),
        ("fsync", "import os; os.fsync(os.open('.', os.O_RDONLY))", errno.EIO),
        ("malloc", "b'1' * 100_000", errno.ENOMEM),
    ],
)
def test_the_kth_call_fails(tmp_path: Path, call: str, work: str, error: int) -> None:
    script = f"""
from tests.trust.fault_scenarios import Injection
injection = Injection()
def work():
    exec({work!r})
for k in (1, 2):
    try:
        print(injection.fails({call.encode()!r}, k, {error}, work, least=100_000))
    except (OSError, MemoryError) as raised:
        print(type(raised).__name__, getattr(raised, "errno", ""))
"""
    environment = os.environ | {"LD_PRELOAD": str(faults.injection()), "PYTHONPATH": os.getcwd()}
    done = processes.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)
    kind = "MemoryError" if error == errno.ENOMEM else f"OSError {error}"
    assert done.stdout.split("\n")[:2] == [kind.rstrip() if error != errno.ENOMEM else "MemoryError ", "False"]
