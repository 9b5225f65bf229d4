"""make faults: processes are killed, disks are full, calls and allocations fail; fault_scenarios.py has what must hold.

python -m tests.trust.faults [SECONDS] [--seed SEED] [--only SCENARIO]

SECONDS is for each scenario whose faults come at random moments; the others try each fault once.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests import processes
from tests.trust import report

_HERE = Path(__file__).parent
_BUILD = _HERE.parents[1] / "build" / "trust"
PREFIX = "fault: "  # of the lines in which fault_scenarios.py tells what it does


def injection() -> Path:
    """The library to preload, compiled if it is older than its source."""
    source, library = _HERE / "fault_injection.c", _BUILD / "fault_injection.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        _BUILD.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(new), str(source), "-ldl"], check=True)
        new.rename(library)
    return library


def watch(scenario: str, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Runs a scenario in a process; returns what it tried how often, and the findings, a crash or a hang among them."""
    environment = os.environ | {"LD_PRELOAD": str(injection()), "TERM": "dumb"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.trust.fault_scenarios", scenario, str(seconds), str(seed), folder]
        try:
            done = processes.run(command, seconds=10 * seconds + 600, env=environment)
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            told = _told(output.decode() if isinstance(output, bytes) else output)
            return Counter(), [f"{scenario} hangs; seed {seed}; the last case: {_last_case(told)}"]
    told = _told(done.stdout)
    findings = [f"{value}; seed {seed}" for kind, value in told if kind == "finding"]
    counts = [value for kind, value in told if kind == "counts" and isinstance(value, dict)]
    if done.returncode != 0 or not counts:
        findings.append(
            f"{scenario} ended with status {done.returncode}; seed {seed}; the last case: {_last_case(told)}; "
            f"{done.stderr[-3000:]}"
        )
    return Counter(counts[0] if counts else {}), findings


def _told(output: str) -> list[tuple[str, object]]:
    told = (json.loads(line.removeprefix(PREFIX)) for line in output.splitlines() if line.startswith(PREFIX))
    return [(kind, value) for kind, value in told]


def _last_case(told: list[tuple[str, object]]) -> object:
    return next((value for kind, value in reversed(told) if kind == "case"), "none")


def main() -> None:
    """Runs the scenarios."""
    from tests.trust.fault_scenarios import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--only", choices=SCENARIOS)
    options = parser.parse_args()

    def trial() -> tuple[Counter[str], list[str]]:
        tried: Counter[str] = Counter()
        findings: list[str] = []
        for scenario in [options.only] if options.only else SCENARIOS:
            counts, found = watch(scenario, options.seconds, options.seed)
            print(f"{scenario}: {dict(counts)}, {len(found)} findings", flush=True)
            tried += counts
            findings += found
        return tried, findings

    report.run("make faults", trial)


if __name__ == "__main__":
    main()
