"""Builds bigramx._C. Metadata stands in pyproject.toml.

torch is needed only where the extension is built, so that an sdist can be made without it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
HEADERS = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.h"))
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# at::parallel_for is a header: compiled without OpenMP it runs everything in one thread.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

NO_TORCH = """
bigramx: torch is not importable here, and the extension is compiled against it. Type
    pip install torch "setuptools>=77" ninja pybind11
    pip install --no-build-isolation .
(without --no-build-isolation pip builds in an empty environment of its own, which has no torch).
"""


class MissingTorch(build_ext):
    """In place of torch's builder."""

    def run(self) -> None:
        """Says what to type."""
        sys.exit(NO_TORCH)


def extension_and_builder() -> tuple[Extension, type[build_ext]]:
    """bigramx._C, and torch's builder, which compiles with ninja only what has changed."""
    arguments: dict[str, Any] = {"sources": SOURCES, "depends": HEADERS, "language": "c++"}
    if importlib.util.find_spec("torch") is None:
        return Extension("bigramx._C", **arguments), MissingTorch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension("bigramx._C", extra_compile_args=FLAGS + OPENMP, extra_link_args=OPENMP, **arguments)
    return extension, BuildExtension


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
extension, builder = extension_and_builder()
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": builder},
    # Object files outlive the command, so that pip, too, compiles only what has changed.
    options={"build_ext": {"build_temp": "build/objects"}},
)
