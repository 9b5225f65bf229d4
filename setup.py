"""Builds bigramx._C. Metadata stands in pyproject.toml.

torch is imported only where the extension is built, so that an sdist can be made without it.
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
HEADERS = sorted(str(path) for pattern in ("*.h", "cpu/*.h") for path in Path("csrc").glob(pattern))

NO_TORCH = """
bigramx: torch is not importable here, and the extension is compiled against it. Type
    pip install torch setuptools ninja pybind11
    pip install --no-build-isolation .
(without --no-build-isolation pip builds in an empty environment of its own, which has no torch).
"""


def torch_build_ext() -> type[build_ext]:
    """Torch's builder, which compiles with ninja only what has changed; or one that says what is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise

        class MissingTorch(build_ext):
            def run(self) -> None:
                sys.exit(NO_TORCH)

        return MissingTorch

    return BuildExtension


def extension() -> Extension:
    """bigramx._C, with torch's include paths and libraries where torch is there."""
    arguments: dict[str, Any] = {
        "name": "bigramx._C",
        "sources": SOURCES,
        "depends": HEADERS,
        "language": "c++",
        "extra_compile_args": ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    }
    if importlib.util.find_spec("torch") is None:
        return Extension(**arguments)
    from torch.utils.cpp_extension import CppExtension

    built: Extension = CppExtension(**arguments)
    return built


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": torch_build_ext()},
    # Object files outlive the command, so that pip, too, compiles only what has changed.
    options={"build_ext": {"build_temp": "build/objects"}},
)
