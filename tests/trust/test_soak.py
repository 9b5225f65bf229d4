"""The short form of `make soak`; and that it finds what it looks for."""

from __future__ import annotations

import pytest

from tests import tree
from tests.trust import soak

pytestmark = pytest.mark.cpu_only


def test_nothing_is_left_behind() -> None:
    sections = {"ops": 900, "errors": 300, "files": 20, "interrupts": 12, "threads": 60, "forks": 6}
    assert soak.in_a_process({**sections, "workers fork": 3, "daemons": 1}, seed=1) == []


def test_every_op_is_called() -> None:
    assert soak.op_cases().keys() >= set(tree.schema_names())


def test_leaks_are_found() -> None:
    first = """
import os, threading, time, torch
from bigramx import ops
kept, kernels = [], torch.ops.bigramx
def leak_after(op, leak):
    return lambda *arguments: (op(*arguments), kept.append(leak()))
def thread():
    thread = threading.Thread(target=time.sleep, args=[60], daemon=True)
    thread.start()
kernels.count_bigrams = leak_after(kernels.count_bigrams, lambda: torch.ones(4096))
kernels.get_batch = leak_after(kernels.get_batch, lambda: open(os.devnull))
kernels.multinomial = leak_after(kernels.multinomial, thread)"""
    found = soak.in_a_process({"ops": 800}, 1, first=first)
    for op, what in {"count_bigrams": "bytes", "get_batch": "fd", "multinomial": "task"}.items():
        assert any(line.startswith(f"{op}: ") and f" more {what} " in line for line in found)
    assert {line.partition(":")[0] for line in found} == {"count_bigrams", "get_batch", "multinomial"}


def test_a_run_that_lets_interrupts_through_is_found() -> None:
    first = "from bigramx import training; training._Signals.__enter__ = lambda self: self"
    assert any("the history is lost" in line for line in soak.in_a_process({"interrupts": 12}, 1, first=first))


def test_a_hang_and_a_crash_are_found() -> None:
    assert "has not ended" in soak.in_a_process({"ops": 3}, 1, first="import time; time.sleep(60)", seconds=1)[0]
    assert "ended with -6" in soak.in_a_process({"ops": 3}, 1, first="import os; os.abort()")[0]
