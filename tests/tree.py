"""The ops, and which tests run their kernels: derived from the files, so that no list is kept by hand.

An op has its schema in csrc/bindings.cpp, its contract in csrc/<op>.cpp, its kernels in csrc/cpu/<op>* and
csrc/cuda/<op>*, and its tests in tests/test_<op>.py.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests"


def schema_names() -> list[str]:
    """The names that bindings.cpp registers: adamw_, embedding_cross_entropy_forward, ..."""
    (library,) = re.findall(r"^TORCH_LIBRARY\(.*?^}", (CSRC / "bindings.cpp").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r'm\.def\(\s*"(\w+)\(', library)


def op_of(schema_name: str) -> str:
    """The op that a schema belongs to: adamw, embedding_cross_entropy, ..."""
    stems = [path.stem for path in CSRC.glob("*.cpp") if f"{schema_name}_".startswith(f"{path.stem}_")]
    assert stems, f"bindings.cpp registers {schema_name}, which no file in csrc/ is named after"
    return max(stems, key=len)


OPS = sorted({op_of(name) for name in schema_names()})


def included_by(path: Path) -> list[Path]:
    """The files of csrc/ that a file includes, those for CUDA apart."""
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    paths = [(folder / name).resolve() for name in names for folder in (path.parent, CSRC)]
    return [path for path in paths if path.is_file() and CSRC / "cuda" not in path.parents]


def implementations_of(path: Path) -> list[Path]:
    """Where what a header declares may be defined."""
    here, on_cpu = path.with_suffix(""), (CSRC / "cpu" / path.relative_to(CSRC)).with_suffix("")
    paths = [stem.with_name(stem.name + ending) for stem in (here, on_cpu) for ending in (".cpp", "_kernels.h")]
    return [path for path in paths if path.is_file()]


def cpu_files(op: str) -> set[Path]:
    """All files that an op on the CPU consists of, those that it shares with others included."""
    found: set[Path] = set()
    pending = {CSRC / f"{op}.cpp", *(CSRC / "cpu").glob(f"{op}*")}
    while pending:
        path = pending.pop()
        found.add(path)
        pending |= {*included_by(path), *implementations_of(path)} - found
    return found


def vectorised_tests() -> list[str]:
    """The test files of the ops that run a kernel compiled for several CPU capabilities."""
    return [f"test_{op}.py" for op in OPS if any(path.name.endswith("_kernels.h") for path in cpu_files(op))]


def cuda_tests() -> list[str]:
    """The test files of the ops with CUDA kernels, and those whose tests all ask for the fixture `device`."""
    marked = re.compile(r'^pytestmark = .*usefixtures\("device"\)', re.MULTILINE)
    of_ops = {f"test_{op}.py" for op in OPS if any((CSRC / "cuda").glob(f"{op}*.cu"))}
    return sorted(of_ops | {path.name for path in TESTS.glob("test_*.py") if marked.search(path.read_text())})
