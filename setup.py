"""Builds bigramx._C. Metadata stands in pyproject.toml, but for the dependencies, of which torch is that of the build.

torch is needed only where the extension is built, so that an sdist can be made without it. The CUDA kernels are built
where torch has CUDA and a fitting nvcc is found; BIGRAMX_CUDA=0 leaves them out, BIGRAMX_CUDA=1 insists on them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def files(*patterns: str) -> list[str]:
    """The paths that match any of the patterns."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


CUDA_SOURCES = files("cuda/**/*.cpp", "cuda/**/*.cu")
SOURCES = sorted(set(files("**/*.cpp")) - set(CUDA_SOURCES))
HEADERS = files("**/*.h", "**/*.cuh")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
# With a header of torch for each op: the one for all takes the compiler seconds more a file.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-DAT_PER_OPERATOR_HEADERS", *WARNINGS]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", ",".join(["-fvisibility=hidden", *WARNINGS])]
NVCC_FLAGS += ["--fatbin-options", "-compress-all"]  # a quarter of the size
UNITS = 2  # of the short files, see in_units
# at::parallel_for is a header: compiled without OpenMP it runs everything in one thread.
ON_LINUX = sys.platform.startswith("linux")
OPENMP = ["-fopenmp"] if ON_LINUX else []
OPTIONS: dict[str, Any] = {
    "depends": [*HEADERS, "setup.py"],
    "include_dirs": [os.path.abspath("csrc")],  # includes name files from there
    "extra_link_args": ["-lgomp"] if ON_LINUX else [],  # torch's runtime, with Clang too (csrc/base/openmp.cpp)
}

OLDEST_TORCH = (2, 11)
DEPENDENCIES = ["numpy>=1.24", "tqdm>=4.60"]  # torch warns at its import where numpy is missing
BUILDS = {"bdist_wheel", "dist_info", "editable_wheel"}  # the commands for what is compiled against the torch at hand

NO_TORCH = """
bigramx: torch is not importable here, and the extension is compiled against it. Type
    pip install torch "setuptools>=77" ninja pybind11
    pip install --no-build-isolation bigramx
(in a checkout: a dot in place of the last word. Without --no-build-isolation pip builds in an empty environment of its
own, which has no torch).
"""


class MissingTorch(build_ext):
    """In place of torch's builder."""

    def run(self) -> None:
        """Says what to type."""
        sys.exit(NO_TORCH)


def in_units(sources: list[str]) -> list[str]:
    """What the compiler is given: the short files, those of csrc itself and of csrc/base, several at once.

    It takes longer to read torch's headers, now once for all files of a unit, than for what those files say.
    """
    short = [source for source in sources if Path(source).parent in {Path("csrc"), Path("csrc/base")}]
    units = []
    for k, files_of_unit in enumerate(filter(None, (short[k::UNITS] for k in range(UNITS)))):
        unit = Path("build/units", f"ops_{k}.cpp")
        text = "".join(f'#include "{Path(path).relative_to("csrc").as_posix()}"\n' for path in files_of_unit)
        if not (unit.exists() and unit.read_text() == text):  # a new file would be compiled again
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
        units.append(str(unit))
    return units + [source for source in sources if source not in short]


def output_of(*command: str) -> str:
    """What a command prints, by both ways."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or where the one in PATH says that it lies: that one may be a script elsewhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    return shutil.which("nvcc", path=f"{os.path.realpath(top[1])}/bin") if top else nvcc


def missing_for_cuda(nvcc: str | None) -> str | None:
    """What the CUDA kernels cannot be built without."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if nvcc is None:
        return f"nvcc is not found; put that of CUDA {torch.version.cuda} into PATH, or name its folder by CUDA_HOME"
    release = re.findall(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"torch {torch.__version__} is built with CUDA {torch.version.cuda}, and nvcc is of CUDA {release}"
    return None


def nvcc_for_cuda() -> str | None:
    """What compiles the CUDA kernels; none: they are left out."""
    choice = os.environ.get("BIGRAMX_CUDA", "")
    if choice not in {"", "0", "1"}:
        sys.exit(f"bigramx: expected BIGRAMX_CUDA to be 0 or 1, got {choice}")
    if choice == "0":
        return None
    nvcc = find_nvcc()
    missing = missing_for_cuda(nvcc)
    if missing is None:
        return nvcc
    if choice == "1":
        sys.exit(f"bigramx: BIGRAMX_CUDA=1, but {missing}")
    print(f"bigramx: without CUDA kernels ({missing})")
    return None


def default_architectures(nvcc: str) -> str:
    """Those of this torch that nvcc knows; of the newest also the code from which drivers make that of later ones."""
    import torch

    known = output_of(nvcc, "--list-gpu-arch").split()
    versions = re.findall(r"sm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")
    architectures = [f"{major}.{minor}" for major, minor in versions if f"compute_{major}{minor}" in known]
    return ";".join(sorted(architectures, key=float)) + "+PTX"


def cuda_extension(nvcc: str) -> Extension:
    """bigramx._C with the CUDA kernels."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(nvcc)
    # torch reads both, the first when this module is imported.
    os.environ.update(CUDA_HOME=str(Path(nvcc).parents[1]), TORCH_CUDA_ARCH_LIST=architectures)
    from torch.utils.cpp_extension import CUDAExtension

    macros = ["-DBIGRAMX_CUDA", f'-DBIGRAMX_CUDA_ARCHITECTURES="{architectures}"']
    flags = {"cxx": FLAGS + OPENMP + macros, "nvcc": NVCC_FLAGS}
    sources = SOURCES + CUDA_SOURCES
    extension: Extension = CUDAExtension("bigramx._C", sources, extra_compile_args=flags, **OPTIONS)
    return extension


def cpu_extension() -> Extension:
    """bigramx._C without them."""
    from torch.utils.cpp_extension import CppExtension

    extension: Extension = CppExtension("bigramx._C", SOURCES, extra_compile_args=FLAGS + OPENMP, **OPTIONS)
    return extension


def torch_requirement() -> str:
    """Any torch that is new enough; for what is compiled, the X.Y of the one that it is compiled against."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if importlib.util.find_spec("torch") is None or not BUILDS & set(sys.argv):
        return f"torch>={oldest}"
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        sys.exit(f"bigramx: needs torch {oldest} or newer, but torch {torch.__version__} is installed")
    return f"torch=={major}.{minor}.*"


def extension_and_builder() -> tuple[Extension, type[build_ext]]:
    """bigramx._C, and torch's builder, which compiles with ninja only what has changed."""
    if importlib.util.find_spec("torch") is None:
        return Extension("bigramx._C", SOURCES), MissingTorch
    import torch

    nvcc = nvcc_for_cuda()
    extension = cpu_extension() if nvcc is None else cuda_extension(nvcc)
    from torch.utils.cpp_extension import BuildExtension

    class KeepObjects(BuildExtension):
        """Object files outlive the command, so that pip, too, compiles only what has changed."""

        def initialize_options(self) -> None:
            """Where they lie, whatever folder the command would take."""
            super().initialize_options()
            self.build_temp = "build/objects"

        def run(self) -> None:
            """Compiles everything where the last torch was another, whose headers are no dependency for ninja."""
            used = Path(self.build_temp, "torch-version")
            if not used.exists() or used.read_text() != torch.__version__:
                shutil.rmtree(self.build_temp, ignore_errors=True)
                self.force = True
                used.parent.mkdir(parents=True, exist_ok=True)
                used.write_text(torch.__version__)
            super().run()

        def build_extensions(self) -> None:
            """Compiles units, which depend on the files that they include."""
            for extension in self.extensions:
                extension.depends = [*extension.depends, *extension.sources]
                extension.sources = in_units(extension.sources)
            super().build_extensions()

    return extension, KeepObjects


if __name__ == "__main__":
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    extension, builder = extension_and_builder()
    dependencies = [*DEPENDENCIES, torch_requirement()]
    setup(install_requires=dependencies, ext_modules=[extension], cmdclass={"build_ext": builder})
