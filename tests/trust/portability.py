"""Builds the extension, and runs its tests, with each Python, torch, compiler and processor that can be had here.

python -m tests.trust.portability [SECONDS] [--only NAME]

Every environment has a folder, and a log, in build/portability. After a run that was cut off, or found something, the
next one of the same sources tries only what has not passed. Of a CUDA build of torch it takes the wheel alone, with
stubs in place of CUDA's libraries. What cannot be had is named, with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import processes, tree
from tests.trust import aarch64, environments, report
from tests.trust.environments import FOLDER, BrokenError, Passed, UnavailableError

COMPILERS = {"gcc": ("gcc", "g++"), "clang": ("clang", "clang++")}
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


@dataclass(frozen=True)
class Environment:
    """One combination.

    Attributes:
        python: Such as "3.10".
        torch: Such as "2.11", or "newest": what pip takes where no version is asked for.
        compiler: A key of COMPILERS.
    """

    python: str
    torch: str
    compiler: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return "torch" if self.torch == "newest" else f"torch=={self.torch}.*"

    @property
    def packages(self) -> Path:
        """The virtual environment, which does not depend on the compiler."""
        return FOLDER / f"python{self.python}-torch{self.torch}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.packages.name}-{self.compiler}"

    def check(self) -> int:
        """Builds and tests; returns how many tests passed. Raises UnavailableError and BrokenError."""
        compilers = dict(zip(("CC", "CXX"), COMPILERS[self.compiler], strict=True))
        if missing := [compiler for compiler in compilers.values() if shutil.which(compiler) is None]:
            raise UnavailableError(f"no {', '.join(missing)}")
        openmp = [compilers["CXX"], "-fopenmp", "-fsyntax-only", "-x", "c++", "-include", "omp.h", os.devnull]
        if processes.run(openmp).returncode != 0:
            raise UnavailableError(f"{compilers['CXX']} has no omp.h (Debian: libomp-dev)")
        sources, log = environments.prepare(self.name)
        python = make_packages(self, log)
        variables = {**os.environ, **compilers, "BIGRAMX_CUDA": "0", "PYTHONPATH": str(sources)}
        environments.compile_sources([python, "setup.py", "build_ext", "--inplace"], sources, log, variables)
        return environments.run_tests(python, sources, log, variables)


# Each Python, each torch and each compiler, not each of their combinations: a wheel of torch is half a gigabyte. The
# tests of the whole project run under one more.
ENVIRONMENTS = [
    Environment("3.10", "2.11", "gcc"),
    Environment("3.11", "2.13", "clang"),
    Environment("3.11", "2.14", "gcc"),
    Environment("3.12", "2.13", "gcc"),
    Environment("3.13", "newest", "clang"),
]
CHECKS: dict[str, Callable[[], int]] = {each.name: each.check for each in ENVIRONMENTS} | {aarch64.NAME: aarch64.check}


def find_python(version: str) -> str:
    """A Python of this version: in PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (f"python{version}", *map(str, pyenv.glob(f"versions/{version}.*/bin/python"))):
        if shutil.which(candidate) and processes.run([candidate, "-c", VERSION]).stdout.strip() == version:
            return candidate
    raise UnavailableError(f"no Python {version}")


def make_packages(environment: Environment, log: Path) -> Path:
    """A virtual environment with torch and what the tests need; returns its Python."""
    folder = environment.packages
    python, made = folder / "bin" / "python", folder / "made"
    if made.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    environments.run([find_python(environment.python), "-m", "venv", folder], FOLDER, log)
    wheel = environments.download(python, environment.requirement, folder / "wheels")
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    environments.run([*install, "--no-deps", wheel], FOLDER, log)
    shutil.rmtree(wheel.parent)
    requirements = environments.requirements_of_torch(python, log)
    environments.run([*install, *environments.TOOLS, *requirements], FOLDER, log)
    (libraries,) = folder.glob("lib/python*/site-packages/torch/lib")
    environments.run([sys.executable, "-m", "tests.trust.cuda_stubs", libraries], tree.ROOT, log)
    made.touch()
    return python


def trial(checks: Mapping[str, Callable[[], int]], seconds: float, passed: Passed) -> tuple[dict[str, int], list[str]]:
    """Runs all checks but those that have passed; after so many seconds no other is begun."""
    end = time.monotonic() + seconds
    tried = {"environments": 0, "of them in an earlier run": 0, "tests": 0, "environments not to be had": 0}
    findings = []

    def one(name: str) -> str:
        try:
            if name in passed.tests:
                tried["of them in an earlier run"] += 1
            else:
                if time.monotonic() > end:
                    raise UnavailableError(f"{seconds:.0f} seconds are over")
                passed.add(name, checks[name]())
        except UnavailableError as reason:
            tried["environments not to be had"] += 1
            return f"not to be had: {reason}"
        except BrokenError as reason:
            tried["environments"] += 1
            findings.append(f"{name}: {reason}")
            return "failed"
        tried["environments"] += 1
        tried["tests"] += passed.tests[name]
        return f"{passed.tests[name]} tests passed"

    for name in checks:
        print(f"{name}: {one(name)}", flush=True)
    if not findings and time.monotonic() <= end:  # else the next run tries what has failed, or is left, alone
        passed.forget(checks)
    return tried, findings


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=3600.0)
    parser.add_argument("--only", metavar="NAME", default="", help="those whose name contains this")
    options = parser.parse_args()
    chosen = {name: check for name, check in CHECKS.items() if options.only in name}
    passed = Passed(FOLDER / "passed.json")
    report.run("make portability", lambda: trial(chosen, options.seconds, passed))


if __name__ == "__main__":
    main()
