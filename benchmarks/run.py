"""Runs the benchmarks, prints what they measure, and keeps it with a description of the machine.

    python benchmarks/run.py                 # all, some twenty minutes, into benchmarks/results/cpu.json
    python benchmarks/run.py --device cuda   # on a GPU, under eight minutes, into benchmarks/results/cuda.json
    python benchmarks/run.py --quick         # few rounds, under three minutes; nothing is kept
    python benchmarks/run.py --only adamw    # bench_adamw.py alone; the results of the others stay

The file is written after each case. An implementation that is not installed or does not work, and a case that does not
fit into memory, are reported as skipped. If a case fails, the others are kept and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.comparison import Case, Result, RunConfig
from benchmarks.device import CPU, CUDA, Device
from bigramx import storage

BENCHES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
DEVICES = {"cpu": CPU, "cuda": CUDA}
SECONDS = {"cpu": 8, "cuda": 1.5}  # of a comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", choices=BENCHES, metavar="NAME", help=f"one of {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, help="the file that keeps the results, as JSON")
    arguments = parser.parse_args()

    name, device = arguments.device, DEVICES[arguments.device]
    if reason := device.unavailable():
        sys.exit(f"benchmarks/run.py --device {name}: {reason}")
    benches = [arguments.only] if arguments.only else BENCHES
    cases = [(bench, case) for bench in benches for case in cases_of(bench, device)]
    if not cases:
        sys.exit(f"benchmarks/run.py: bench_{arguments.only}.py has no cases for {name}")
    seconds, min_rounds = (0.5, 2) if arguments.quick else (SECONDS[name], 5)
    out = arguments.out or (None if arguments.quick else report.RESULTS / f"{name}.json")

    print(report.described(name, device.describe()), flush=True)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2 and not device.is_gpu:  # threads that wait for a core make the others wait for them
        print(f"this machine is busy (load {load:.1f} on {cores} cores): these figures mean little", flush=True)
    if failed := run(cases, RunConfig(seconds, min_rounds, arguments.quick, device), out):
        sys.exit(f"{failed} of {len(cases)} cases failed (see above)")


def cases_of(bench: str, device: Device) -> list[Case]:
    """Those of its file; not every file has cases for a GPU."""
    module = importlib.import_module(f"benchmarks.bench_{bench}")
    cases: list[Case] = getattr(module, "CUDA_CASES" if device.is_gpu else "CASES", [])
    return cases


def run(cases: Sequence[tuple[str, Case]], config: RunConfig, out: Path | None) -> int:
    """Measures the cases and writes the file after each, where other benches' results of this machine stay.

    Returns how many cases failed.
    """
    machine, failed = config.device.describe(), 0
    old_machine, old = report.read(out) if out else ({}, [])
    results = {bench: list(group) for bench, group in groupby(old, lambda result: result.bench) if bench in BENCHES}
    measured: dict[str, list[Result]] = {}
    for bench, case in cases:
        if (result := measure(bench, case, config)) is None:
            failed += 1
            continue
        measured.setdefault(bench, []).append(result)
        if out:
            write(out, machine, measured if machine != old_machine else results | measured)
    return failed


def measure(bench: str, case: Case, config: RunConfig) -> Result | None:
    """Prints the result of a case, or its error."""
    start = time.perf_counter()
    gc.collect()  # the tensors of the previous case may fill the memory
    try:
        result = case.run(config)
    except Exception:
        print(f"\n{bench}: failed\n{traceback.format_exc()}", flush=True)
        return None
    result.bench = bench
    print(f"\n{bench}  [{time.perf_counter() - start:.1f} s]")
    lines = [f"    {head}: {'; '.join(cell)}" for head, cell in report.cells(result).items() if cell]
    print("\n".join(lines), flush=True)
    return result


def write(out: Path, machine: report.Machine, results: dict[str, list[Result]]) -> None:
    """Writes the file whole or not at all, by bench."""
    content = [result.to_json() for bench in sorted(results) for result in results[bench]]
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(out, json.dumps({"machine": machine, "results": content}, indent=2) + "\n")


if __name__ == "__main__":
    main()
