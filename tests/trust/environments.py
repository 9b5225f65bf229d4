"""What the environments of portability.py and aarch64.py are made of. Each has a copy of the sources and a log."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tests import processes, tree

FOLDER = tree.ROOT / "build" / "portability"
LARGEST_DOWNLOAD = 600  # MB, of one wheel
TESTS_OF_OPS = [f"tests/test_{op}.py" for op in tree.OPS]
TESTS = [*TESTS_OF_OPS, *(f"tests/test_{name}.py" for name in ("ops", "model", "training", "storage"))]
TOOLS = ["hypothesis>=6.100", "ninja", "numpy", "pybind11", "pytest>=8", "safetensors", "setuptools>=77", "tqdm"]
REQUIREMENTS = """
import importlib.metadata, sys
(torch,) = importlib.metadata.distributions(name="torch", **({"path": sys.argv[1:]} if sys.argv[1:] else {}))
for requirement in torch.requires:
    if not requirement.startswith(("nvidia-", "cuda-", "triton")) and "extra ==" not in requirement:
        print(requirement)
"""

Command = Sequence[str | Path]


class UnavailableError(Exception):
    """Says what this machine, or the package index, lacks."""


class BrokenError(Exception):
    """Says what broke."""


def tracked_files(*places: str) -> list[str]:
    """What git has of this checkout, or of places in it, and is still there."""
    listed = processes.run(["git", "ls-files", "-z", *places], cwd=tree.ROOT, check=True).stdout
    return [file for file in listed.split("\0") if file and (tree.ROOT / file).is_file()]


def digest() -> str:
    """Of all that is compiled and tested."""
    digest = hashlib.sha256()
    for file in tracked_files("csrc", "bigramx", "tests", "setup.py", "pyproject.toml"):
        if not file.startswith("tests/trust/results/"):
            content = (tree.ROOT / file).read_bytes()
            digest.update(f"{file} {len(content)} ".encode() + content)
    return digest.hexdigest()


class Passed:
    """How many tests have passed in which environment, in an earlier run of the same sources: this one goes on.

    Args:
        path: The file that keeps it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._sources = path, digest()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.tests: dict[str, int] = kept["tests"] if kept.get("sources") == self._sources else {}

    def add(self, name: str, count: int) -> None:
        """Keeps one more."""
        self.tests[name] = count
        self._write()

    def forget(self, names: Collection[str]) -> None:
        """At the end of a run of these: the next one begins anew."""
        self.tests = {name: count for name, count in self.tests.items() if name not in names}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"sources": self._sources, "tests": self.tests}), encoding="utf-8")


def prepare(name: str) -> tuple[Path, Path]:
    """A copy of what git has of this checkout, where files that have not changed keep their time; an empty log."""
    folder, log = FOLDER / name, FOLDER / f"{name}.log"
    for file in tracked_files():
        source, copy = tree.ROOT / file, folder / file
        if not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    log.write_text("", encoding="utf-8")
    return folder, log


def run(command: Command, folder: Path, log: Path, variables: Mapping[str, str] | None = None) -> str:
    """Runs a command, adds what it printed to the log, and returns that. Raises BrokenError if it failed."""
    result = processes.run(command, cwd=folder, env=variables, seconds=7200)
    output = result.stdout + result.stderr
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{output}\n")
    if result.returncode != 0:
        said = (result.stdout.strip() or result.stderr.strip() or f"exit status {result.returncode}").splitlines()
        raise BrokenError(f"{' '.join(map(str, command[:4]))}: {said[-1]}; see {log}")
    return output


def compile_sources(command: Command, folder: Path, log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Runs what compiles. Raises BrokenError if it failed, or warned of a file of csrc."""
    if warning := re.search(r"^\S*csrc/\S*: warning: .*$", run(command, folder, log, variables), re.MULTILINE):
        raise BrokenError(f"{warning[0]}; see {log}")


def run_tests(
    python: str | Path, sources: Path, log: Path, variables: Mapping[str, str], tests: Sequence[str] = TESTS
) -> int:
    """Runs tests; returns how many passed. Raises BrokenError where one failed, or none ran."""
    output = run([python, "-m", "pytest", "-p", "no:cacheprovider", *tests], sources, log, variables)
    passed = re.search(r"(\d+) passed", output)
    if passed is None:
        raise BrokenError(f"pytest ran no test; see {log}")
    return int(passed[1])


def download(python: str | Path, requirement: str, folder: Path, *options: str) -> Path:
    """The wheel of torch, unless it is too large: pip says the size when it begins."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *options]
    said: list[str] = []
    with processes.start([*command, "--dest", folder, requirement], seconds=3600) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            size = re.search(r"Downloading \S+\.whl \(([\d.]+) MB\)", line)
            if size and float(size[1]) > LARGEST_DOWNLOAD:
                raise UnavailableError(f"the wheel of {requirement} has {size[1]} MB, more than {LARGEST_DOWNLOAD}")
        said.append(process.communicate()[1])
    wheels = list(folder.glob("torch-*.whl"))
    if len(wheels) != 1:
        raise UnavailableError(f"pip has no wheel of {requirement}: {''.join(said).strip().splitlines()[-1]}")
    return wheels[0]


def requirements_of_torch(python: str | Path, log: Path, *site: Path) -> list[str]:
    """What an installed torch requires, CUDA's libraries apart."""
    return run([python, "-c", REQUIREMENTS, *site], FOLDER, log).splitlines()
