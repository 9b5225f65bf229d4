"""Runs the benchmarks, prints them as a table, and keeps them in benchmarks/results/ with the machine's description.

python benchmarks/run.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench_embedding_cross_entropy, bench_generate
from benchmarks.timing import machine

RESULTS = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="alternating rounds, of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go, as JSON")
    arguments = parser.parse_args()

    results = [
        bench_embedding_cross_entropy.lecture_step(arguments.rounds),
        bench_embedding_cross_entropy.large_table(max(3, arguments.rounds // 3)),
        bench_generate.one_start(arguments.rounds),
    ]
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for result in results:
        print_result(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    print(f"wrote {arguments.out}")


def print_result(result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    print(
        f"{result['job']}: {seconds['bigramx'] * 1e6:.1f} us, eager {seconds['eager'] * 1e6:.1f} us, "
        f"{result['ratio']:.1f}x (reach {result['reach']:g}x)"
    )
    if "no-op" in seconds:
        no_op = seconds["no-op"]
        print(
            f"    floor, a C++ autograd function that computes nothing: {no_op * 1e6:.1f} us, "
            f"{seconds['eager'] / no_op:.1f}x; bigramx takes {seconds['bigramx'] / no_op:.2f} times that"
        )
    if "peak_bytes_beyond_gradient" in result:
        print(
            f"    peak memory beyond table and gradient: {result['peak_bytes_beyond_gradient']:,} bytes "
            f"(reach {result['peak_bytes_reach']:,}), eager {result['eager_peak_bytes_beyond_gradient']:,}"
        )


if __name__ == "__main__":
    main()
