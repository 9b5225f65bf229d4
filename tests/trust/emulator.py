"""Runs all tests of the CUDA kernels in the GPU emulator, which must also find each faulty kernel and each mutation.

The test suite has the short form (tests/test_simt.py).
"""

from __future__ import annotations

import re
import sys

from tests import processes, tree
from tests.trust import report

SECONDS = 14400.0


def trial() -> tuple[dict[str, int], list[str]]:
    """How many tests there were, and those that failed."""
    if not sys.platform.startswith("linux"):
        sys.exit("make emulator: the GPU emulator needs Linux")
    command = [sys.executable, "-m", "pytest", "--long", "-rA", "-p", "no:cacheprovider", "tests/test_simt.py"]
    result = processes.run(command, cwd=tree.ROOT, seconds=SECONDS)
    passed = re.findall(r"^PASSED tests/test_simt\.py::(\w+)(.*)", result.stdout, re.MULTILINE)
    names = [name for name, _case in passed]
    findings = re.findall(r"^(?:FAILED|ERROR) .*$", result.stdout, re.MULTILINE)
    if result.returncode != 0 and not findings:
        findings = [f"pytest ends with {result.returncode}: {result.stderr[-500:]}"]
    tried = {
        "test files": sum(len(case.split()) for name, case in passed if name == "test_kernels_pass"),
        "faulty kernels": names.count("test_finds_fault"),
        "mutations of kernels": names.count("test_finds_mutation"),
    }
    return tried, findings


if __name__ == "__main__":
    report.run("make emulator", trial)
