"""Runs the benchmarks, prints them as tables, and keeps them with the machine's description.

    python benchmarks/run.py                 # all, some ten minutes, into benchmarks/results/cpu.json
    python benchmarks/run.py --device cuda   # on a GPU, under eight minutes, into benchmarks/results/cuda.json
    python benchmarks/run.py --quick         # all that fits into three minutes, kept nowhere
    python benchmarks/run.py --only adamw    # bench_adamw.py alone: its lines replace those that are kept

The cost curves are drawn beside the results. A peer that is not installed or does not work, and a job that does not fit
into memory, are named as skipped. Where a job fails, the others are kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.device import DEVICES, Device
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
SECONDS = {"cpu": 8, "cuda": 1.5}  # of a race


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", choices=BENCHES, metavar="NAME", help=f"one of {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    arguments = parser.parse_args()

    device = DEVICES[arguments.device]
    if reason := device.lacks():
        sys.exit(f"benchmarks/run.py --device {device.name}: {reason}")
    benches = [arguments.only] if arguments.only else BENCHES
    if not any(jobs_of(bench, device) for bench in benches):
        sys.exit(f"benchmarks/run.py: bench_{arguments.only}.py has no jobs for {device.name}")
    full = Effort(seconds=SECONDS[device.name], min_rounds=5, quick=False, device=device)
    quick = Effort(seconds=0.5, min_rounds=2, quick=True, device=device)
    out = arguments.out or (None if arguments.quick else report.RESULTS / f"{device.name}.json")

    print(", ".join(f"{name} {value}" for name, value in device.machine().items()), flush=True)
    if load := device.busy():
        print(f"{load}: these figures mean little", flush=True)
    start = time.perf_counter()
    results = run(benches, quick if arguments.quick else full)
    measured = [result for result in results if result is not None]
    print(f"\n{report.plain_table(measured)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if out is not None and measured:
        write(out, [result.to_json() for result in measured], device, kept=benches != BENCHES)
        print(f"wrote {out}")
        report.draw_curves(out)
    if len(measured) < len(results):
        sys.exit(f"{len(results) - len(measured)} of {len(results)} jobs failed (see above)")


def write(out: Path, contents: list[dict[str, Any]], device: Device, kept: bool) -> None:
    """Writes the results; where ``kept``, those of other files that were measured on this machine stay, in place."""
    content: dict[str, Any] = {"machine": device.machine(), "results": contents}
    if kept and out.exists():
        old = json.loads(out.read_text(encoding="utf-8"))
        if old["machine"] == content["machine"]:
            others = [result for result in old["results"] if result["bench"] != contents[0]["bench"]]
            content["results"] = sorted([*others, *contents], key=lambda result: BENCHES.index(result["bench"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def jobs_of(bench: str, device: Device) -> list[Job]:
    """Those of its file; not every file has jobs for a GPU."""
    module = importlib.import_module(f"benchmarks.bench_{bench}")
    jobs: list[Job] = getattr(module, "CUDA_JOBS" if device.is_gpu else "JOBS", [])
    return jobs


def run(benches: list[str], effort: Effort) -> list[Result | None]:
    """The results of all jobs of the files; None for one that failed, whose error is printed."""
    results: list[Result | None] = []
    for bench in benches:
        for job in jobs_of(bench, effort.device):
            start = time.perf_counter()
            gc.collect()  # the tensors of the last job may fill the memory
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
