"""Runs cases in children of this process, and knows which case ran when one dies or hangs.

A child serves one case after another; one that ends is replaced, and goes on with the next case. Forking is safe: this
process has computed nothing, and so has started no threads.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import signal
import struct
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.trust.fuzz_cases import Case
from tests.trust.fuzz_judge import Finding, evaluate, run

HANG = 20.0  # seconds
LONG_TWIN = 2.0  # seconds, after which a call is not compared with plain PyTorch
MEMORY = 2**30  # bytes that a child may allocate
STAGES = ("arguments", "call", "twin", "judgement", "done")
_SLOT = struct.Struct("qqd")


@dataclass
class Tally:
    """What was tried. counts: of calls by outcome; findings: with the number of their case."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, Finding]] = field(default_factory=list)


class Slot:
    """Where a child notes which case it runs, in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOT.size)

    def note(self, index: int, stage: str) -> None:
        self._memory[:] = _SLOT.pack(index, STAGES.index(stage), time.monotonic())

    def read(self) -> tuple[int, str, float]:
        index, stage, since = _SLOT.unpack(self._memory[:])
        return index, STAGES[stage], since


class Child:
    """A process that runs the cases first, first + step, ... below end, until a time."""

    def __init__(self, case_of: Callable[[int], Case], indices: range, until: float) -> None:
        self.slot, self.indices = Slot(), indices
        self.slot.note(indices.start, "arguments")
        self._lines, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(case_of, indices, until, self.slot, writer)
        os.close(writer)
        self._rest = b""

    def messages(self, seconds: float) -> Iterator[tuple[int, str, list[Finding]]]:
        """What it has to say: the number of a case, its outcome, its findings."""
        while select.select([self._lines], [], [], seconds)[0]:
            got = os.read(self._lines, 1 << 16)
            if not got:
                return
            *lines, self._rest = (self._rest + got).split(b"\n")
            for line in lines:
                index, outcome, findings = json.loads(line)
                yield index, outcome, [Finding(*finding) for finding in findings]
            seconds = 0

    def end(self) -> int | None:
        """Its exit status, negative for a signal, if it has ended; ends it if it hangs."""
        _index, stage, since = self.slot.read()
        is_hanging = time.monotonic() - since > (LONG_TWIN if stage == "twin" else HANG)
        if is_hanging:
            os.kill(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if is_hanging else os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        os.close(self._lines)


def _serve(case_of: Callable[[int], Case], indices: range, until: float, slot: Slot, writer: int) -> NoReturn:
    parent = os.getppid()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what dies would say so
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for index in indices:
            if time.monotonic() > until or os.getppid() != parent:
                break
            slot.note(index, "arguments")
            outcome, findings = _outcome(case_of(index), lambda stage, index=index: slot.note(index, stage))  # type: ignore[misc]
            os.write(writer, json.dumps([index, outcome, [astuple(finding) for finding in findings]]).encode() + b"\n")
        slot.note(0, "done")
    finally:
        os._exit(0)


def _outcome(case: Case, begin_stage: Callable[[str], None]) -> tuple[str, list[Finding]]:
    try:
        verdict = run(case, begin_stage)
    except BaseException:
        return "not judged", [Finding("the fuzzer itself fails", traceback.format_exc())]
    return verdict.outcome + (" and compared" if verdict.is_compared else ""), verdict.findings


def preload() -> None:
    """Imports here what PyTorch imports when it is first used; else each child would."""
    evaluate("torch.ops.bigramx.count_bigrams(torch.zeros(1, dtype=torch.int64, device='meta'), 1)")
    evaluate("fake(torch.ones(1))")


def watch(case_of: Callable[[int], Case], num_cases: int, num_children: int = 1, seconds: float = 1e9) -> Tally:
    """Runs the cases 0 to num_cases - 1, as many of them as the time allows."""
    preload()
    tally = Tally()
    until = time.monotonic() + seconds
    children = [Child(case_of, range(k, num_cases, num_children), until) for k in range(min(num_children, num_cases))]
    while children:
        for child in list(children):
            status = child.end()
            for index, outcome, findings in child.messages(0 if status is not None else 0.02):
                tally.counts[outcome] += 1
                tally.findings += [(index, finding) for finding in findings]
            if status is None:
                continue
            children.remove(child)
            child.close()
            index, stage, since = child.slot.read()
            if stage == "done":
                continue
            tally.counts[f"ended in {stage}"] += 1
            if stage in {"call", "judgement"}:  # what writes where it must not may die later
                is_hang = time.monotonic() - since > HANG
                name = f"hangs for more than {HANG:.0f} s" if is_hang else _name_of(status)
                tally.findings.append((index, Finding(name if stage == "call" else f"{name} after the call")))
            rest = range(index + num_children, num_cases, num_children)
            if rest and time.monotonic() < until:
                children.append(Child(case_of, rest, until))
    return tally


def _name_of(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exits with {status}"
