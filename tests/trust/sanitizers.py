"""Runs the tests of the ops, the tokenizer and the storage with the extension compiled for a sanitizer.

python -m tests.trust.sanitizers asan    # memory and undefined behaviour, under each CPU capability
python -m tests.trust.sanitizers tsan    # data races
python -m tests.trust.sanitizers asan-quick --build    # builds alone

The extension is built apart from the package's own, into build/asan or build/tsan, by setup.py's sources and flags, and
GCC's sanitizers. The test suite uses asan-quick and tsan-quick, in which the kernels of one op are instrumented and
the rest is linked as make has built it: to compile all of it takes a third of an hour.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess

import bigramx
from tests import processes, tree
from tests.test_capability import CAPABILITIES, can_run
from tests.trust import report

HERE = Path(__file__).parent
TESTS = [f"tests/test_{name}.py" for name in (*tree.OPS, "counts", "gradient_pool", "ops", "tokenizer", "storage")]
# What torch.compile makes is not instrumented; of the pool, what sanitizers change: memory, limits, environments.
CHOSEN = "not compile and not (gradient_pool and (peak or limit or environment or plain_tensor))"
SECONDS = 7200.0  # for one test file; sanitized code takes many times as long
# Reports name lines. Python's own flags may have -fwrapv, with which a signed overflow is nothing to report.
FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv")
FINDING = re.compile(r"runtime error: |SUMMARY: (?!Undefined)|FATAL: |CHECK failed")


@dataclass(frozen=True)
class Sanitizer:
    """How the extension is compiled, and how Python is started with it.

    Attributes:
        name: Of the make target, and of its folder in build/.
        checks: For -fsanitize.
        libraries: The compiler's, which must be loaded before all others.
        options: The libraries' own, by variables of the environment.
        for_each_capability: Whether the tests run under each CPU capability, or under this machine's alone.
        sources: What is linked besides csrc/.
        link_flags: How.
        kernels_of: The op whose kernels alone are instrumented; none: all of the extension is.
    """

    name: str
    checks: str
    libraries: tuple[str, ...]
    options: dict[str, dict[str, object]]
    for_each_capability: bool
    sources: tuple[str, ...] = ("planted_faults.cpp",)
    link_flags: tuple[str, ...] = ()
    kernels_of: str = ""

    @property
    def flags(self) -> list[str]:
        """For the compiler and the linker."""
        return [*FLAGS, f"-fsanitize={self.checks}"]

    @property
    def folder(self) -> Path:
        """Where it is built."""
        return tree.ROOT / "build" / self.name


ASAN = Sanitizer(
    "asan",
    "address,undefined,float-cast-overflow",
    ("asan", "stdc++"),  # whose __cxa_throw it wraps
    {
        # Python and torch keep memory to the end of the process, by design. Tests ask for more memory than there is.
        "ASAN_OPTIONS": {"detect_leaks": 0, "allocator_may_return_null": 1, "detect_stack_use_after_return": 1},
        "UBSAN_OPTIONS": {"print_stacktrace": 1},
    },
    for_each_capability=True,
)
TSAN = Sanitizer(
    "tsan",
    "thread",
    ("tsan",),
    # What Python and torch do is known only where it passes through pthreads and the allocator.
    {
        "TSAN_OPTIONS": {
            "ignore_noninstrumented_modules": 1,
            "die_after_fork": 0,
            "allocator_may_return_null": 1,
            "suppressions": HERE / "tsan.supp",
        }
    },
    for_each_capability=False,
    sources=("planted_faults.cpp", "tsan_openmp.cpp"),
    link_flags=("-Wl,--wrap=GOMP_parallel",),
)
ASAN_QUICK = replace(ASAN, name="asan-quick", kernels_of="adamw")
TSAN_QUICK = replace(TSAN, name="tsan-quick", kernels_of="adamw")
SANITIZERS = {sanitizer.name: sanitizer for sanitizer in (ASAN, TSAN, ASAN_QUICK, TSAN_QUICK)}


def build(sanitizer: Sanitizer) -> None:
    """Compiles what has changed since the last time."""
    command = [sys.executable, "-m", __spec__.name, sanitizer.name, "--build"]
    result = processes.run(command, cwd=tree.ROOT, seconds=SECONDS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def compile_extension(sanitizer: Sanitizer) -> None:
    """The same in this process, which was started in the root of the project."""
    from setuptools import Distribution

    import setup

    os.environ["BIGRAMX_CUDA"] = "0"
    extension, builder = setup.extension_and_builder()
    rest = [source for source in extension.sources if not is_instrumented(sanitizer, source)]
    extension.sources = [source for source in extension.sources if source not in rest]
    extension.sources += [f"tests/trust/{source}" for source in sanitizer.sources]
    compiled = setup.in_units(list(map(str, rest)))
    extension.extra_objects = [f"build/objects/{Path(source).with_suffix('.o')}" for source in compiled]
    extension.extra_compile_args = [*extension.extra_compile_args, *sanitizer.flags]
    extension.extra_link_args = [*extension.extra_link_args, *sanitizer.flags, *sanitizer.link_flags]
    command = builder(Distribution({"name": "bigramx", "ext_modules": [extension]}))
    command.build_temp, command.build_lib = str(sanitizer.folder / "objects"), str(sanitizer.folder / "linked")
    command.ensure_finalized()
    sanitizer.folder.mkdir(parents=True, exist_ok=True)
    with open(sanitizer.folder / "lock", "w") as lock:  # while another process builds, which make may have started
        fcntl.flock(lock, fcntl.LOCK_EX)
        command.run()
        # It links each time, and others may be using what they have built before: they keep their file.
        os.replace(command.get_ext_fullpath(extension.name), extension_of(sanitizer))


def is_instrumented(sanitizer: Sanitizer, source: str | os.PathLike[str]) -> bool:
    """Whether a file of csrc/ is compiled for the sanitizer."""
    path = tree.ROOT / source
    op = sanitizer.kernels_of
    return not op or (tree.CSRC / "cpu" in path.parents and path in tree.cpu_files(op))


def extension_of(sanitizer: Sanitizer) -> Path:
    """What ``build`` makes."""
    return sanitizer.folder / "_C.so"


def run(sanitizer: Sanitizer, capability: str, command: Sequence[str]) -> tuple[CompletedProcess[str], list[str]]:
    """Runs a Python command in the root of the project with the instrumented extension; also what was reported."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "BIGRAMX_EXTENSION": str(extension_of(sanitizer)),
            "ATEN_CPU_CAPABILITY": capability,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONMALLOC": "malloc",  # an allocation each, whose ends are known
        }
        for name, options in sanitizer.options.items():
            variables[name] = ":".join(
                f"{option}={value}" for option, value in {**options, "log_path": f"{folder}/report"}.items()
            )
        start = [*fixed_addresses(), "env", f"LD_PRELOAD={preloaded(sanitizer)}", sys.executable, *command]
        result = processes.run(start, cwd=tree.ROOT, env={**os.environ, **variables}, seconds=SECONDS)
        logs = [path.read_text(errors="replace") for path in Path(folder).iterdir()]
        return result, findings_in(result.stderr, *logs)


def missing(sanitizer: Sanitizer) -> str | None:
    """What the sanitizer cannot be used without."""
    compiler = os.environ.get("CXX", "c++")
    if not bigramx.build_info()["compiler"].startswith("GCC"):
        return f"the sanitizers are GCC's, and {compiler} is another compiler"
    for name in sanitizer.libraries:
        if not os.path.isabs(output_of(compiler, f"-print-file-name=lib{name}.so").strip()):
            return f"{compiler} has no lib{name}.so"
    return None


def preloaded(sanitizer: Sanitizer) -> str:
    """The paths of the libraries, as they were linked."""
    linked = dict(re.findall(r"^\s*lib(\S+)\.so\S* => (/\S+)", output_of("ldd", extension_of(sanitizer)), re.MULTILINE))
    return " ".join(linked[name] for name in sanitizer.libraries)


def output_of(*command: str | Path) -> str:
    """What a command prints."""
    return processes.run(command, check=True).stdout


def fixed_addresses() -> list[str]:
    """What starts a command without address space randomisation, which may place it where shadow memory must be."""
    start = ["setarch", "-R"]
    return start if shutil.which(start[0]) and processes.run([*start, "true"]).returncode == 0 else []


def findings_in(*logs: str) -> list[str]:
    """One line for each fault that the sanitizers told of."""
    lines = [line.replace(f"{tree.ROOT}/", "") for log in logs for line in log.splitlines()]
    return sorted({line for line in lines if FINDING.search(line)})


def run_tests(sanitizer: Sanitizer, capability: str, name: str, chosen: str = CHOSEN) -> tuple[int, list[str]]:
    """How many tests of a file passed, and the findings; a test that fails is one, too."""
    # Uncaptured (-s), as libubsan writes to standard error, beside libasan even with a log_path. The sanitizer's
    # handler of SIGSEGV tells more than that of pytest.
    command = ["-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", chosen, name]
    result, findings = run(sanitizer, capability, command)
    last = (result.stdout.splitlines() or [""])[-1]
    print(f"make {sanitizer.name}: {capability}, {name}: {last}", flush=True)
    if result.returncode != 0:
        failed = re.findall(r"^(?:FAILED|ERROR) .*$", result.stdout, re.MULTILINE)
        findings += failed or [f"{name} ends with {result.returncode}: {result.stderr[-500:]}"]
    passed = re.search(r"(\d+) passed", last)
    return int(passed[1]) if passed else 0, [f"{capability}: {finding}" for finding in findings]


def trial(sanitizer: Sanitizer) -> tuple[dict[str, int], list[str]]:
    """Runs all tests, under each capability where that matters."""
    if reason := missing(sanitizer):
        sys.exit(f"make {sanitizer.name}: {reason}")
    build(sanitizer)
    capabilities = [capability for capability in CAPABILITIES if can_run(capability)]
    if not sanitizer.for_each_capability:
        capabilities = capabilities[-1:]
    results = [run_tests(sanitizer, capability, name) for capability in capabilities for name in TESTS]
    tried = {"tests": sum(passed for passed, _findings in results), "CPU capabilities": len(capabilities)}
    return tried, [finding for _passed, findings in results for finding in findings]


def main() -> None:
    """Builds, and runs the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("--build", action="store_true", help="build alone")
    arguments = parser.parse_args()
    sanitizer = SANITIZERS[arguments.sanitizer]
    if arguments.build:
        compile_extension(sanitizer)
    else:
        report.run(f"make {sanitizer.name}", lambda: trial(sanitizer))


if __name__ == "__main__":
    main()
