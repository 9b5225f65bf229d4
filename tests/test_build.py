"""The build says what it needs, and its archives contain what they should."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import sys
import tarfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from setuptools import Distribution
from setuptools.config.pyprojecttoml import read_configuration
from torch.utils import cpp_extension

from tests import cuda_check, processes

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without anything built."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "bigramx", ignore=ignored))


def setup_py(checkout: Path, *arguments: str) -> CompletedProcess[str]:
    """Runs setup.py without torch, as under pip's build isolation."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH, *arguments]
    return processes.run(command, cwd=checkout)


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
            if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py", ".pyi"}
        }
        assert sources
        assert sources <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "bigramx/py.typed"} <= names
    assert {"tests/simt/Makefile", "docs/from-formula-to-kernel.md"} <= names


def test_without_torch_the_build_says_what_to_type(checkout: Path) -> None:
    result = setup_py(checkout, "-q", "build_ext")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "bigramx: torch is not importable here" in result.stderr
    assert "    pip install --no-build-isolation bigramx\n(in a checkout: a dot" in result.stderr


def required_torch(metadata: Path) -> str:
    """The torch that a PKG-INFO or a METADATA requires."""
    (requirement,) = re.findall(r"^Requires-Dist: (torch\b.*)$", metadata.read_text("utf-8"), re.MULTILINE)
    assert isinstance(requirement, str)
    return requirement


THIS_TORCH = ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize(
    ("command", "with_torch", "expected"),
    [
        ("dist_info", True, f"torch=={THIS_TORCH}.*"),  # as wheels and editable installs have it
        ("dist_info", False, "torch>=2.11"),
        ("egg_info", True, "torch>=2.11"),  # as an sdist has it
    ],
)
def test_what_is_compiled_requires_the_torch_of_the_build(
    checkout: Path, tmp_path: Path, command: str, with_torch: bool, expected: str
) -> None:
    place = "--egg-base" if command == "egg_info" else "--output-dir"
    arguments = ["-q", command, place, str(tmp_path)]
    if with_torch:
        processes.run([sys.executable, "-W", "ignore", "setup.py", *arguments], cwd=checkout, check=True)
    else:
        assert setup_py(checkout, *arguments).returncode == 0
    (metadata,) = [*tmp_path.rglob("METADATA"), *tmp_path.rglob("PKG-INFO")]
    assert required_torch(metadata) == expected
    assert {"numpy", "tqdm"} <= set(re.findall(r"^Requires-Dist: (\w+)", metadata.read_text(), re.M))


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(
        SystemExit, match=r"^bigramx: needs torch 2\.11 or newer, but torch 2\.9\.1\+cu128 is installed$"
    ):
        setup_functions()["torch_requirement"]()


def test_another_torch_compiles_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BIGRAMX_CUDA", "0")
    _extension, builder = setup_functions()["extension_and_builder"]()
    monkeypatch.chdir(tmp_path)
    objects = Path("build/objects")

    def compile_one(_command: object) -> None:
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "one.o").touch()

    def keeps_objects() -> bool:
        command = builder(Distribution())
        command.finalize_options()
        command.run()
        kept = (objects / "old.o").exists()
        assert kept or command.force
        (objects / "old.o").touch()
        return kept

    monkeypatch.setattr(cpp_extension.BuildExtension, "run", compile_one)
    assert [keeps_objects(), keeps_objects()] == [False, True]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert [keeps_objects(), keeps_objects()] == [False, True]


IMPORTS = """
import sys, torch
here = torch.__version__

def error():
    for name in [name for name in sys.modules if name.startswith("bigramx") and name != "bigramx._C"]:
        del sys.modules[name]
    try:
        import bigramx
    except ImportError as error:
        return str(error)

torch.__version__ = "2.99.1+cu130"
print(error().splitlines()[0])
sys.modules["bigramx._C"], kernels = None, sys.modules["bigramx._C"]
print(error().splitlines()[0])
sys.modules["bigramx._C"] = kernels
torch.__version__ = ".".join(here.split(".")[:2]) + ".77+cu130"
print(error())
"""


def test_kernels_for_another_torch_are_not_imported() -> None:
    result = processes.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)
    other, missing, patch_release = result.stdout.splitlines()
    assert other.startswith(f"bigramx: the kernels are compiled for torch {THIS_TORCH}.")
    assert other.endswith(", here is torch 2.99.1+cu130. Compile them for this one by")
    assert missing.startswith("bigramx: the compiled kernels cannot be loaded (")
    assert "; here is torch 2.99.1+cu130. Compile them for this one by" in missing
    assert patch_release == "None"


def imports_of(path: Path) -> set[str]:
    """The packages of others that a module imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bigramx"}


def test_what_is_imported_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"\W", requirement)[0] for requirement in requirements}

    monkeypatch.chdir(ROOT)
    core = {"torch", *names(setup_functions()["DEPENDENCIES"])}
    extras = read_configuration("pyproject.toml", expand=False)["project"]["optional-dependencies"]
    assert names(extras["plot"]) <= names(extras["cli"])
    of_commands = core | names(extras["cli"])
    allowed = {"plots.py": core | names(extras["plot"]), "cli.py": of_commands, "console.py": of_commands}
    for path in Path("bigramx").glob("*.py"):
        typing_only = {"typing_extensions"}  # torch requires it; imported under TYPE_CHECKING
        assert imports_of(path) - typing_only <= allowed.get(path.name, core), path


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
    result = processes.run(["make", "train", *variables], cwd=checkout)
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
    result = processes.run([sys.executable, "-c", script], cwd=ROOT)
    assert result.stdout == "1\n", result.stderr


NVCC = """#!/bin/sh
case $1 in
    --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
    --list-gpu-arch) printf "compute_80\\ncompute_90\\ncompute_100\\ncompute_110\\n" ;;
    --dryrun) echo "#$ TOP={home}/bin/.." ;;
esac
"""


def write_nvcc(folder: Path, home: Path, release: str = "13.0") -> None:
    """Writes an nvcc that compiles nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(NVCC.format(release=release, home=home))
    (folder / "nvcc").chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a CUDA toolkit that matches torch, which appears to have CUDA."""
    home = tmp_path / "cuda"
    write_nvcc(home / "bin", home)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_75 sm_100 sm_90 sm_90a sm_120", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("CUDA_PATH", "BIGRAMX_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    return home


def setup_functions() -> dict[str, Any]:
    """What setup.py defines."""
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_is_built_if_torch_and_nvcc_have_it(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = setup_functions()
    assert functions["nvcc_for_cuda"]() == str(toolkit / "bin/nvcc")
    monkeypatch.setenv("BIGRAMX_CUDA", "0")
    assert functions["nvcc_for_cuda"]() is None
    monkeypatch.setenv("BIGRAMX_CUDA", "yes")
    with pytest.raises(SystemExit, match="bigramx: expected BIGRAMX_CUDA to be 0 or 1, got yes"):
        functions["nvcc_for_cuda"]()


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("torch", "torch .* is built without CUDA"),
        ("nvcc", "nvcc is not found; put that of CUDA 13.0 into PATH, or name its folder by CUDA_HOME"),
        ("release", "torch .* is built with CUDA 13.0, and nvcc is of CUDA 12.8"),
    ],
)
def test_the_build_says_what_cuda_lacks(
    lacks: str, message: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if lacks == "torch":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif lacks == "nvcc":
        (toolkit / "bin/nvcc").unlink()
    else:
        write_nvcc(toolkit / "bin", toolkit, release="12.8")
    nvcc_for_cuda = setup_functions()["nvcc_for_cuda"]
    assert nvcc_for_cuda() is None
    assert re.fullmatch(rf"bigramx: without CUDA kernels \({message}\)\n", capsys.readouterr().out)
    monkeypatch.setenv("BIGRAMX_CUDA", "1")
    with pytest.raises(SystemExit, match=rf"^bigramx: BIGRAMX_CUDA=1, but {message}$"):
        nvcc_for_cuda()


def test_nvcc_in_path_may_be_a_script_elsewhere(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path / "elsewhere", toolkit)
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"), prepend=os.pathsep)
    assert setup_functions()["find_nvcc"]() == str(toolkit / "bin/nvcc")


@pytest.mark.parametrize(("wanted", "architectures"), [("", "9.0;10.0+PTX"), ("8.0;9.0", "8.0;9.0")])
def test_cuda_extension(wanted: str, architectures: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    extension = setup_functions()["cuda_extension"](str(toolkit / "bin/nvcc"))
    assert {path.as_posix() for path in Path("csrc").rglob("*.cu")} <= set(extension.sources)
    assert {path.as_posix() for path in Path("csrc/cuda").glob("*.*h")} <= set(extension.depends)
    macros = ["-DBIGRAMX_CUDA", f'-DBIGRAMX_CUDA_ARCHITECTURES="{architectures}"']
    assert extension.extra_compile_args["cxx"][-2:] == macros
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == architectures
    assert {"cudart", "c10_cuda"} <= set(extension.libraries)


def test_fit_has_no_kernel_on_cuda() -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    tensors = [torch.zeros(3, 3) for _ in range(6)]
    with pytest.raises(RuntimeError, match=r"^fit_: no kernel is built for device cuda; expected tensors on cpu(\n|$)"):
        torch.ops.bigramx.fit_.default.redispatch(keys, *tensors, 1, 1, -1, 0.1, 0.9, 0.99, 1e-8, 0.1, 1.0)


KERNELS = """
#include "sizes.h"

template <typename T>
__global__ void __launch_bounds__(1024) sum_kernel(T* sums) {
    T terms[kTerms];
    for (int i = 0; i < kTerms; ++i) terms[i] = sums[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < kTerms; ++i) sums[(i * 7 % kTerms) * 1024 + threadIdx.x] = terms[i];
}
template __global__ void sum_kernel<double>(double*);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, header = tmp_path / "sum.cu", tmp_path / "sizes.h"
    source.write_text(KERNELS)
    build = tmp_path / "build"

    def problems(header_text: str) -> list[str]:
        header.write_text(header_text)
        return cuda_check.check([source], build, [80, 90])

    assert problems("constexpr int kTerms = 4;") == []
    table = capsys.readouterr().out
    assert re.search(r"sm_80 +\| +sm_90 \|\n( +[1-9]\d+ +0 +0 +0 \|){2} sum sum_kernel<double>\n", table)

    log = (build / "sum.log").stat().st_mtime_ns
    assert cuda_check.check([source], build, [80, 90]) == []
    assert (build / "sum.log").stat().st_mtime_ns == log  # not compiled again

    expected = [f"sum.cu: sum_kernel<double>, sm_{where} spills registers" for where in (80, 90)]
    assert problems("constexpr int kTerms = 64;") == expected

    device_warning = "constexpr int kTerms = 4; __device__ inline int two() { int unused; return 2; }"
    host_warning = "constexpr int kTerms = 4; inline bool is_below(int a, unsigned b) { return a < b; }"
    for warning, word in ((device_warning, "unused"), (host_warning, "sign-compare")):
        (problem,) = problems(warning)
        assert problem.startswith("sum.cu does not compile without warnings")
        assert word in problem

    source.write_text("int no_kernel = 0;")
    assert problems("") == ["sum.cu: ptxas names no kernel"]
