"""The build says what it needs, and its archives hold what they should."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without what was built."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "bigramx", ignore=ignored))


def setup_py(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in an environment without torch, as pip's isolation makes it."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def test_sdist_needs_no_torch_and_contains_the_sources(checkout: Path) -> None:
    result = setup_py(checkout, "-q", "sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for folder in ("csrc", "bigramx", "tests", "benchmarks"):
        sources = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*.[hcp]*")
            if path.suffix in {".h", ".cpp", ".py", ".pyi"}
        }
        assert sources
        assert sources <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "bigramx/py.typed"} <= names


def test_without_torch_it_says_what_to_type(checkout: Path) -> None:
    result = setup_py(checkout, "-q", "build_ext")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "bigramx: torch is not importable here" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="GNU make is not installed")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (["PYTHON=no-such-python"], "bigramx: no-such-python not found; install Python 3.10 or newer"),
        (["PYTHON=./old-python"], "bigramx: needs Python 3.10 or newer, but ./old-python is Python 3.8.1"),
        (["CXX=no-such-compiler"], "bigramx: no C++ compiler found"),
    ],
)
def test_make_names_what_is_missing(checkout: Path, variables: list[str], message: str) -> None:
    old_python = checkout / "old-python"
    old_python.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.1\n[ "$1" = -V ]\n')
    old_python.chmod(0o755)
    result = subprocess.run(["make", "train", *variables], cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 2  # and make's own


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_kernels_have_threads() -> None:
    script = """
import os, torch
from bigramx import functional
tokens = torch.frombuffer(bytearray(2**19), dtype=torch.uint8)
threads = []
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    functional.count_bigrams(tokens, 5)
    threads.append(len(os.listdir("/proc/self/task")))
print(threads[1] - threads[0])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "1\n", result.stderr
