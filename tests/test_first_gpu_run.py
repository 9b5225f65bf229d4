"""benchmarks/first_gpu_run.py without a GPU; test_simt.py runs it over the emulator, to its end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks import first_gpu_run
from tests import processes
from tests.tree import ROOT


def test_the_first_run_on_a_gpu_says_what_it_will_do(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/first_gpu_run.py", "--out", str(tmp_path)]
    printed = processes.run([*command, "--dry-run"], cwd=ROOT, check=True).stdout
    for step in (
        "versions",
        "build",
        "op-generate",
        "tests",
        "table",
        "ncu",
        "bench-fit",
        "suite",
        "sanitize-memcheck",
    ):
        assert f"\n{step} (at most " in f"\n{printed}"
    assert list(tmp_path.iterdir()) == [], "nothing has run"
    unknown = processes.run([*command, "nothing"], cwd=ROOT)
    assert unknown.returncode == 2
    assert "no such part: nothing; there are versions, build, ops" in unknown.stderr


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path: Path) -> None:
    place = first_gpu_run.Place(tmp_path, emulated=False)
    steps = {
        name: first_gpu_run.Step(name, [sys.executable, "-c", code], 10)
        for name, code in {
            "good": "print('as it should')",
            "bad": "raise SystemExit(3)",
            "hanging": "import time; print('begins', flush=True); time.sleep(100)",
        }.items()
    }
    steps["hanging"].seconds = 2
    lines = {name: first_gpu_run.run(step, place) for name, step in steps.items()}
    assert re.fullmatch(r"good: exit code 0 after \d+ s: as it should", lines["good"][0])
    assert re.fullmatch(r"bad: exit code 3 after \d+ s: nothing was printed", lines["bad"][0])
    assert re.fullmatch(r"hanging: out of time after \d+ s: begins", lines["hanging"][0])
    assert [failed for _line, failed in lines.values()] == [False, True, True]
    missing = first_gpu_run.Step("missing", [], 1, needs="no-such-program")
    assert first_gpu_run.run(missing, place) == ("missing: left out, as no-such-program is not found", False)
