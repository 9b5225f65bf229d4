"""make fuzz: calls everything that is bound to Python with arguments of all kinds, in children that are watched.

python -m tests.trust.fuzz_ops [SECONDS] [--seed SEED] [--calls CALLS] [--only PATTERN]
python -m tests.trust.fuzz_ops --case SEED/INDEX    # prints one case as a program, and makes the call in this process

fuzz_cases.py makes the calls, fuzz_judge.py says what is wrong with them, fuzz_watch.py runs them.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tests.trust import report
from tests.trust.fuzz_cases import Case, case, targets
from tests.trust.fuzz_judge import Finding, run
from tests.trust.fuzz_watch import Tally, watch

SECONDS = 600.0
MAX_SHOWN = 40  # findings that are shrunk and printed


def described(tally: Tally, case_of: Callable[[int], Case]) -> list[str]:
    """Each different finding once, as a program."""
    different: dict[tuple[str, str, str], tuple[Case, Finding, int]] = {}
    for index, finding in sorted(tally.findings, key=lambda found: found[0]):
        found = case_of(index)
        key = (found.target.op, finding.kind, re.sub(r"\d+|\[.*?\]", "", finding.detail)[:60])
        first, first_finding, count = different.get(key, (found, finding, 0))
        different[key] = (first, first_finding, count + 1)
    shown = [describe(*found) for found in list(different.values())[:MAX_SHOWN]]
    return shown if len(different) <= MAX_SHOWN else [*shown, f"and {len(different) - MAX_SHOWN} others"]


def tried(tally: Tally) -> dict[str, int]:
    """The counts of a table."""
    counts = tally.counts
    num_invalid = counts["invalid"]
    num_returned = sum(count for outcome, count in counts.items() if outcome.startswith("returned"))
    return {
        "calls": counts.total() - num_invalid,
        "returned a result": num_returned,
        "compared with plain PyTorch": sum(count for outcome, count in counts.items() if "compared" in outcome),
    }


def describe(found: Case, finding: Finding, count: int = 1) -> str:
    """A finding, with the shortest program that has it."""
    small, finding = shrink(found, finding)
    often = f" ({count} cases)" if count > 1 else ""
    program = "\n    ".join(small.program().splitlines())
    return f"{found.seed} {found.target.path}: {finding.kind}: {finding.detail}{often}\n    {program}"


def shrink(found: Case, finding: Finding) -> tuple[Case, Finding]:
    """The case with as few odd arguments as have the same finding."""
    if finding.kind.startswith("hangs"):
        return found, finding
    simplifications: list[Callable[[Case], Case]] = [partial(Case.with_plain, name=name) for name in found.odd]
    for simplify in (
        lambda case: replace(case, context=""),
        lambda case: replace(case, num_threads=1),
        *simplifications,
    ):
        candidate = simplify(found)
        if candidate != found and (same := same_finding(candidate, finding.kind)) is not None:
            found, finding = candidate, same
    return found, finding


def same_finding(candidate: Case, kind: str) -> Finding | None:
    """What a case, run alone, has of this kind."""
    findings = [finding for _index, finding in watch([candidate].__getitem__, 1).findings if finding.kind == kind]
    return findings[0] if findings else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--calls", type=int, default=10**9, help="at most so many")
    parser.add_argument("--only", default="", help="a pattern of what to call")
    parser.add_argument("--case", help="SEED/INDEX of one case")
    options = parser.parse_args(arguments)
    chosen = tuple(target for target in targets() if re.search(options.only, target.path))
    if options.case:
        seed, _, index = options.case.partition("/")
        replay(case(int(seed), int(index), chosen))
        return
    print(f"make fuzz: seed {options.seed}; {len(chosen)} things to call", flush=True)

    def trial() -> tuple[Mapping[str, int], Sequence[str]]:
        case_of = partial(case, options.seed, targets=chosen)
        tally = watch(case_of, options.calls, os.cpu_count() or 1, options.seconds)
        return tried(tally), described(tally, case_of)

    report.run("make fuzz", trial)


def replay(found: Case) -> None:
    """Prints a case, and makes its call."""
    print(found.program(), flush=True)
    verdict = run(found)
    print(verdict.outcome)
    for finding in verdict.findings:
        print(f"{finding.kind}: {finding.detail}")


if __name__ == "__main__":
    main()
