"""Compiles the CUDA kernels for several architectures and prints the resources that each uses.

    python tests/cuda_check.py [--architectures 80 90 100] [the folder of the .cu files]

Fails if nvcc warns or a kernel spills registers. Needs neither a GPU nor torch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
FLAGS = [
    f"-I{ROOT / 'csrc'}",
    *("-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"),
    # As torch compiles extensions.
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]
JOBS = 2


class CompileError(Exception):
    """Carries what nvcc printed."""


@dataclass
class Usage:
    """What a function uses on one architecture: registers, of kernels only, and bytes of memory."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0

    def __str__(self) -> str:
        return f"{self.registers:4}{self.shared:6}{self.stack:5}{self.spilled:5}"


Table = dict[str, dict[int, Usage]]  # by function, then by architecture


def is_fresh(log: Path, dependencies: Path) -> bool:
    """Whether nothing that the log's file was compiled from has changed since."""
    if not log.exists():
        return False
    inputs = dependencies.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(Path(path).exists() and Path(path).stat().st_mtime < log.stat().st_mtime for path in [*inputs, __file__])


def compile_file(nvcc: str, source: Path, build: Path, architectures: Sequence[int]) -> str:
    """What ptxas prints about the functions of a file, which is compiled only if something has changed."""
    log, dependencies, output = (build / f"{source.stem}.{kind}" for kind in ("log", "d", "o"))
    if is_fresh(log, dependencies):
        return log.read_text()
    targets = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in architectures]
    command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", str(output), "-MD", "-MF", str(dependencies)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(result.stdout)
    log.write_text(result.stdout)
    return result.stdout


def read_usage(ptxas: str) -> Table:
    """Parses the output of ptxas."""
    table: Table = defaultdict(lambda: defaultdict(Usage))
    architecture, kernel, function = 0, "", ""
    for line in ptxas.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", line):
            kernel, architecture = entry[1], int(entry[2])
        elif properties := re.search(r"Function properties for (\w+)", line):
            function = properties[1]
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage = table[function][architecture]
            usage.stack, usage.spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        elif registers := re.search(r"Used (\d+) registers", line):
            usage = table[kernel][architecture]
            usage.registers = int(registers[1])
            shared = re.search(r"(\d+) bytes smem", line)
            usage.shared = int(shared[1]) if shared else 0
    return table


def short_names(mangled: Iterable[str]) -> list[str]:
    """Names as in the source, without namespaces, parameters and return types."""
    result = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|\b[a-z]\w*::", "", name) for name in result.stdout.splitlines()]


def report(source: Path, table: Table, architectures: Sequence[int]) -> list[str]:
    """Prints what the kernels of a file use, and returns the functions that spill."""
    spilling = []
    for name, usages in sorted(zip(short_names(table), table.values(), strict=True), key=lambda row: row[0]):
        if usages[architectures[0]].registers > 0:
            print("".join(f"{usages[architecture]} |" for architecture in architectures), source.stem, name)
        spilling += [f"{source.name}: {name}, sm_{where}" for where, usage in usages.items() if usage.spilled > 0]
    return spilling


def check(sources: list[Path], build: Path, architectures: Sequence[int]) -> list[str]:
    """Compiles the files, prints the table, and returns the problems."""
    nvcc = shutil.which("nvcc") or sys.exit("cuda-check: nvcc is not found")
    build.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [pool.submit(compile_file, nvcc, source, build, architectures) for source in sources]
    print("Registers; in bytes: static shared memory (the dynamic is chosen at launch), stack frame, spills")
    print("".join(f"{f'sm_{architecture}':>20} |" for architecture in architectures))
    problems = []
    for source, job in zip(sources, jobs, strict=True):
        try:
            table = read_usage(job.result())
        except CompileError as error:
            problems.append(f"{source.name} does not compile without warnings\n{error}")
            continue
        problems += [f"{spilling} spills registers" for spilling in report(source, table, architectures)]
        if not table:
            problems.append(f"{source.name}: ptxas names no kernel")
    return problems


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "csrc" / "cuda")
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    options = parser.parse_args()
    sources = sorted(options.folder.glob("*.cu"))
    build = ROOT / "build" / "cuda-check" / "-".join(map(str, options.architectures))
    problems = check(sources, build, options.architectures)
    if problems:
        sys.exit("\n".join(f"cuda-check: {problem}" for problem in problems))
    print(f"cuda-check: {len(sources)} files compile without warnings, and no kernel spills")


if __name__ == "__main__":
    main()
