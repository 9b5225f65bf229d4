"""The short form of `make soak`; and that it finds what it looks for."""

from __future__ import annotations

import sys

import pytest

from tests import processes

pytestmark = pytest.mark.cpu_only


def interrupted_runs(seed: int, count: int, first: str = "") -> list[str]:
    """What is wrong with interrupted runs, in a process that does something first."""
    script = f"{first}\nfrom tests.trust import soak\nprint(*soak.interrupted_runs({seed}, {count}), sep='\\n')"
    return processes.run([sys.executable, "-c", script], check=True).stdout.split("\n")


def test_two_interrupts_at_any_moment_lose_nothing() -> None:
    assert interrupted_runs(1, 24) == ["", ""]


def test_a_run_that_lets_interrupts_through_is_found() -> None:
    lets_through = "from bigramx import training; training._Interrupt.__enter__ = lambda self: self"
    assert any("the history is lost" in line for line in interrupted_runs(1, 48, lets_through))
