"""Runs the benchmarks, prints them as tables, and keeps them with the machine's description.

    python benchmarks/run.py                 # all, some ten minutes, into benchmarks/results/cpu.json
    python benchmarks/run.py --quick         # all that fits into three minutes, kept nowhere
    python benchmarks/run.py --only adamw    # bench_adamw.py alone: its lines replace those that are kept

A peer that is not installed, and a job that does not fit into memory, are named as skipped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.machine import busy, machine
from benchmarks.race import Effort, Job, Result

BENCHES = [
    "embedding_cross_entropy",
    "adamw",
    "get_batch",
    "training",
    "generate",
    "multinomial",
    "count_bigrams",
    "evaluate",
    "tokenizer",
    "import",
    "exp",
    "cost_curves",
]
FULL = Effort(seconds=8, min_rounds=5, quick=False)
QUICK = Effort(seconds=0.5, min_rounds=2, quick=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", choices=BENCHES, metavar="NAME", help=f"one of {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    arguments = parser.parse_args()

    benches = [arguments.only] if arguments.only else BENCHES
    effort = QUICK if arguments.quick else FULL
    out = arguments.out or (None if arguments.quick else report.RESULTS / "cpu.json")

    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    if load := busy():
        print(f"{load}: these figures mean little", flush=True)
    start = time.perf_counter()
    results = run(benches, effort)
    print(f"\n{report.plain_table([result for result in results if result is not None])}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if None in results:
        sys.exit(f"{results.count(None)} of {len(results)} jobs failed (see above); nothing is written")
    if out is not None:
        contents = [result.to_json() for result in results if result is not None]
        write(out, contents, kept=benches != BENCHES)
        print(f"wrote {out}")


def write(out: Path, contents: list[dict[str, Any]], kept: bool) -> None:
    """Writes the results; where ``kept``, those of other files that were measured on this machine stay, in place."""
    content: dict[str, Any] = {"machine": machine(), "results": contents}
    if kept and out.exists():
        old = json.loads(out.read_text(encoding="utf-8"))
        if old["machine"] == content["machine"]:
            others = [result for result in old["results"] if result["bench"] != contents[0]["bench"]]
            content["results"] = sorted([*others, *contents], key=lambda result: BENCHES.index(result["bench"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(benches: list[str], effort: Effort) -> list[Result | None]:
    """The results of all jobs of the files; None for one that failed, whose error is printed."""
    results: list[Result | None] = []
    for bench in benches:
        jobs: list[Job] = importlib.import_module(f"benchmarks.bench_{bench}").JOBS
        for job in jobs:
            start = time.perf_counter()
            try:
                result = job(effort)
            except Exception:
                print(f"\n{bench}: failed\n{traceback.format_exc()}", flush=True)
                results.append(None)
                continue
            result.bench = bench
            results.append(result)
            print(f"\n{result.job}  [{time.perf_counter() - start:.1f} s]", flush=True)
            for line in report.details(result):
                print(f"    {line}", flush=True)
    return results


if __name__ == "__main__":
    main()
