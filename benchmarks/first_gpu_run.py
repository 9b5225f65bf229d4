"""The first hour on a GPU, in parts, each of which leaves what it found on disk as it ends.

    python3 benchmarks/first_gpu_run.py                      # all parts, into build/first_gpu_run
    python3 benchmarks/first_gpu_run.py build ops tests      # these
    python3 benchmarks/first_gpu_run.py --dry-run            # says what would run
    python3 benchmarks/first_gpu_run.py --emulator           # on the CPU, by tests/simt, what can be tried there

A bare machine will do: python3 with torch, pytest and hypothesis, nvcc, a C++ compiler and ninja; no network, no make,
no pip. Wheels in the folder .whl of the checkout, such as Liger-Kernel's, are used from there. A command that fails or
takes too long ends alone: summary.txt has a line for each, with its log beside it. What was built stays in bigramx/, in
build/ and beside the logs, for later calls. Exits with 1 where a command failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_probes
from tests import tree
from tests.tree import ROOT

SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck --kernel-name kns=bigramx")
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")


@dataclass
class Step:
    """A command, with a log of its own.

    Attributes:
        name: Of the log.
        command: What runs in the checkout.
        seconds: Its limit.
        environment: What is added to the environment.
        needs: A program without which it is left out.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass
class Place:
    """Where the results go, and what runs the kernels."""

    out: Path
    emulated: bool

    def environment(self) -> dict[str, str]:
        """For all steps."""
        paths = [str(ROOT), *self._wheels(), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if self.emulated:
            environment |= {"BIGRAMX_EXTENSION": str(ROOT / "build/simt/_C.so"), "OMP_NUM_THREADS": "1"}
        return environment

    def _wheels(self) -> list[str]:
        site = self.out / "site"
        for wheel in sorted((ROOT / ".whl").glob("*.whl")):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(site)
        return [str(site)] if site.exists() else []


def versions(_place: Place) -> list[Step]:
    """What the machine has."""
    return [probe("versions", 120)]


def build(place: Place) -> list[Step]:
    """For the card in the machine, with all cores."""
    if place.emulated:
        return [Step("build", ["make", "--silent", "-C", "tests/simt", f"PYTHON={sys.executable}"], 1800)]
    return [probe("build", 900, str(place.out))]


def ops(place: Place) -> list[Step]:
    """Each op once, in a process of its own, where the launch that fails is the one that raises."""
    names = list(gpu_probes.OPS)[:: 3 if place.emulated else 1]  # there they have tests of their own
    return [probe("op", 90, name, environment={"CUDA_LAUNCH_BLOCKING": "1"}) for name in names]


def gpu_tests(place: Place) -> list[Step]:
    """What only a GPU can show, but for what takes long."""
    chosen = ["tests/test_cuda.py", "-k", "not sanitize and not beyond and not large"]
    return [one_by_one(place, "tests", 420, *(["tests/test_get_batch.py"] if place.emulated else chosen))]


def table(_place: Place) -> list[Step]:
    """The few figures that say most."""
    return [probe("table", 300)]


def ncu(place: Place) -> list[Step]:
    """What each kernel waits for."""
    sections = [argument for section in NCU_SECTIONS for argument in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--launch-count", "40", *sections, *probe("kernels", 0).command]
    return [] if place.emulated else [Step("ncu", command, 300, needs="ncu")]


def bench(place: Place) -> list[Step]:
    """File by file, into one file of results."""
    names = [path.stem.removeprefix("bench_") for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    with_cases = [name for name in names if "CUDA_CASES" in (ROOT / f"benchmarks/bench_{name}.py").read_text()]
    command = [sys.executable, "benchmarks/run.py", "--device", "cuda", "--out", str(place.out / "cuda.json")]
    return [Step(f"bench-{name}", [*command, "--only", name], 300) for name in with_cases if not place.emulated]


def suite(place: Place) -> list[Step]:
    """All tests of the kernels."""
    files = [*(f"tests/{name}" for name in tree.cuda_tests()), "tests/test_cuda.py"]
    return [one_by_one(place, "suite", 1200, *files)] if not place.emulated else []


def sanitize(place: Place) -> list[Step]:
    """As make sanitize does."""
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation, whose ends memcheck knows
    test = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_cuda.py", "-k", "sanitize"]
    return [
        Step(
            f"sanitize-{tool.split()[0]}",
            ["compute-sanitizer", "--error-exitcode", "1", "--tool", *tool.split(), *test],
            600,
            memory,
            needs="compute-sanitizer",
        )
        for tool in SANITIZERS
        if not place.emulated
    ]


PARTS: dict[str, Callable[[Place], list[Step]]] = {
    "versions": versions,
    "build": build,
    "ops": ops,
    "tests": gpu_tests,
    "table": table,
    "ncu": ncu,
    "benchmarks": bench,
    "suite": suite,
    "sanitize": sanitize,
}


def probe(name: str, seconds: float, *arguments: str, environment: dict[str, str] | None = None) -> Step:
    """A part of gpu_probes.py."""
    command = [sys.executable, "-m", "benchmarks.gpu_probes", name, *arguments]
    return Step("-".join([name, *(a for a in arguments if name == "op")]), command, seconds, environment or {})


def one_by_one(place: Place, name: str, seconds: float, *arguments: str) -> Step:
    """Tests of which none ends the others; a later call runs again those that did not pass."""
    own = ["--seconds", "90", "--limit", str(seconds - 15), "--out", str(place.out / f"{name}.jsonl")]
    return Step(name, [sys.executable, "-m", "tests.one_by_one", *own, *arguments], seconds)


def run(step: Step, place: Place) -> tuple[str, bool]:
    """Runs a command; returns its line of the summary, and whether it failed."""
    begin = time.monotonic()
    if step.needs and shutil.which(step.needs) is None:
        return f"{step.name}: left out, as {step.needs} is not found", False
    log = place.out / f"{step.name}.log"
    code = _run_logged(step, log, {**place.environment(), **step.environment})
    outcome = "out of time" if code is None else f"exit code {code}"
    return f"{step.name}: {outcome} after {time.monotonic() - begin:.0f} s: {_last_line(log)}", code != 0


def _run_logged(step: Step, log: Path, environment: dict[str, str]) -> int | None:
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")[:300]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--emulator", action="store_true", help="on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build/first_gpu_run", help="where the results go")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    place = Place(options.out.resolve(), options.emulator)
    place.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for step in (step for name in options.parts or PARTS for step in PARTS[name](place)):
        if options.dry_run:
            print(f"{step.name} (at most {step.seconds:.0f} s): {' '.join(step.command)}")
            continue
        line, failed = run(step, place)
        failures += failed
        print(line, flush=True)
        with (place.out / "summary.txt").open("a", encoding="utf-8") as summary:
            summary.write(line + "\n")
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
