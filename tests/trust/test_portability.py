"""The short form of make portability: vector primitives by each compiler and processor; what it says of failures."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests import processes, tree
from tests.test_capability import CAPABILITIES, can_run
from tests.trust import cuda_stubs, environments, portability
from tests.trust.environments import BrokenError, Passed, UnavailableError

CROSS = "aarch64-linux-gnu-g++"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror"]


def require(*tools: str) -> None:
    """Skips the test where a tool is missing."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def compile_checks(compiler: str, folder: Path, *flags: str) -> Path:
    """The program of simd_checks.cpp."""
    program = folder / "simd_checks"
    headers = [f"-I{tree.CSRC}", f"-I{tree.ROOT}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    processes.run([compiler, *FLAGS, *flags, *headers, tree.TESTS / "trust/simd_checks.cpp", "-o", program], check=True)
    return program


def run_checks(command: list[str | Path], capability: str = "default") -> str:
    """What the program prints."""
    return processes.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}).stdout


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_vector_primitives(compiler: str, tmp_path: Path) -> None:
    require(compiler)
    program = compile_checks(compiler, tmp_path)
    for capability in filter(can_run, CAPABILITIES):
        assert run_checks([program], capability).endswith(" checks, 0 failed\n")


def test_vector_primitives_of_aarch64(tmp_path: Path) -> None:
    require(CROSS, EMULATOR[0])
    assert run_checks([*EMULATOR, compile_checks(CROSS, tmp_path)]).endswith(" checks, 0 failed\n")


def test_a_wrong_primitive_is_found(tmp_path: Path) -> None:
    require("c++")
    source = (tree.CSRC / "cpu/base/simd.h").read_text()
    log_two = "0x1.62e400p-1f"
    assert source.count(log_two) == 1
    copy = tmp_path / "cpu/base/simd.h"
    copy.parent.mkdir(parents=True)
    copy.write_text(source.replace(log_two, "0x1.62e404p-1f"))
    program = compile_checks("c++", tmp_path, f"-I{tmp_path}", "-O0")
    assert run_checks([program]).startswith("exp: wrong at ")


REGIONS = """
extern "C" int omp_get_thread_num();
extern "C" int omp_in_parallel();

extern "C" __attribute__((visibility("default"))) int run(int* of_thread) {
    int in_parallel = 0, a = 1, b = 10, c = 100;
    #pragma omp parallel
    {
        of_thread[omp_get_thread_num()] = a + b + c;
        if (omp_in_parallel() != 0) in_parallel = 1;
    }
    return in_parallel;
}
"""


def test_parallel_regions_of_clang_run_in_the_runtime_of_torch(tmp_path: Path) -> None:
    require("clang++")
    source, library = tmp_path / "regions.cpp", tmp_path / "regions.so"
    source.write_text(REGIONS)
    flags = ["-fopenmp", "-fvisibility=hidden", "-fPIC"]
    objects = [tmp_path / "regions.o", tmp_path / "openmp.o"]
    for path, compiled in zip([source, tree.CSRC / "base/openmp.cpp"], objects, strict=True):
        processes.run(["clang++", *FLAGS, *flags, "-c", path, "-o", compiled], check=True)
    processes.run(["clang++", "-shared", *objects, "-lgomp", "-o", library], check=True)
    script = f"""
import ctypes, torch
regions = ctypes.CDLL({str(library)!r})
for num_threads in (3, 2):
    torch.set_num_threads(num_threads)
    of_thread = (ctypes.c_int * 4)()
    print(regions.run(of_thread), *of_thread)
print("libomp" in open("/proc/self/maps").read())
"""
    printed = processes.run([sys.executable, "-c", script], check=True).stdout.splitlines()
    assert printed == ["1 111 111 111 0", "1 111 111 0 0", "False"]


def test_stubs_take_the_place_of_cuda(tmp_path: Path) -> None:
    require("gcc", "nm", "objdump")
    cuda, caller = tmp_path / "libcudaexample.so.7", tmp_path / "libcaller.so"
    source, versions = tmp_path / "cuda.c", tmp_path / "cuda.map"
    source.write_text("int cudaVersioned(void) { return 1; } int cuPlain(void) { return 2; }")
    versions.write_text("EXAMPLE { cudaVersioned; };")
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{cuda.name}", f"-Wl,--version-script,{versions}"]
    processes.run(["gcc", *flags, source, "-o", cuda], check=True)
    source.write_text(
        "int cudaVersioned(void); int cuPlain(void); int sum(void) { return cudaVersioned() + cuPlain(); }"
    )
    processes.run(["gcc", "-shared", "-fPIC", source, cuda, "-Wl,-rpath,$ORIGIN", "-o", caller], check=True)
    cuda.unlink()
    assert cuda_stubs.write_stubs(tmp_path) == [cuda.name]
    assert ctypes.CDLL(str(caller)).sum() == 2 * cuda_stubs.NO_DEVICE
    assert cuda_stubs.write_stubs(tmp_path) == []


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"^no Python 3\.1$"):
        portability.find_python("3.1")
    large = write_script(tmp_path / "large", "echo 'Downloading torch-2.11.0-cp310.whl (601.0 MB)'; exec sleep 600")
    with pytest.raises(UnavailableError, match=r"^the wheel of torch has 601\.0 MB, more than 600$"):
        environments.download(large, "torch", tmp_path / "wheels")
    none = write_script(tmp_path / "none", "echo 'ERROR: No matching distribution found' >&2; exit 1")
    with pytest.raises(UnavailableError, match=r"^pip has no wheel of torch: ERROR: No matching distribution found$"):
        environments.download(none, "torch", tmp_path / "wheels")
    monkeypatch.setitem(portability.COMPILERS, "gcc", ("no-cc", "no-c++"))
    with pytest.raises(UnavailableError, match=r"^no no-cc, no-c\+\+$"):
        portability.ENVIRONMENTS[0].check()


def test_what_breaks_is_a_finding(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BrokenError, match=r"^sh -c .*: it broke; see .*log$"):
        environments.run(["sh", "-c", "echo it broke >&2; exit 1"], tmp_path, log)
    assert "it broke" in log.read_text()
    warns = ["echo", "/there/csrc/a.h:1:2: warning: unused"]
    with pytest.raises(BrokenError, match=r"^/there/csrc/a\.h:1:2: warning: unused; see "):
        environments.compile_sources(warns, tmp_path, log)
    environments.compile_sources(["echo", "/elsewhere/torch.h:1:2: warning: unused"], tmp_path, log)
    pytest_of = {
        "passes": "echo '41 passed, 2 skipped in 1s'",
        "fails": "echo '1 failed, 40 passed in 1s'; exit 1",
        "runs none": "echo 'no tests ran in 0s'",
    }
    pythons = {name: write_script(tmp_path / name, text) for name, text in pytest_of.items()}
    assert environments.run_tests(pythons["passes"], tmp_path, log, os.environ) == 41
    for name, message in (("fails", "1 failed, 40 passed in 1s; see "), ("runs none", "pytest ran no test; see ")):
        with pytest.raises(BrokenError, match=message):
            environments.run_tests(pythons[name], tmp_path, log, os.environ)


def test_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passed = Passed(tmp_path / "passed.json")

    def unavailable() -> int:
        raise UnavailableError("no wheel")

    def broken() -> int:
        raise BrokenError("2 failed")

    tried, findings = portability.trial({"a": lambda: 41, "b": unavailable, "c": broken}, 60, passed)
    assert tried == {"environments": 2, "of them in an earlier run": 0, "tests": 41, "environments not to be had": 1}
    assert findings == ["c: 2 failed"]
    assert capsys.readouterr().out == "a: 41 tests passed\nb: not to be had: no wheel\nc: failed\n"
    assert portability.trial({"d": lambda: 41}, -1, passed)[0]["environments not to be had"] == 1


def test_a_trial_goes_on_where_another_was_cut_off_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off() -> int:
        raise KeyboardInterrupt

    def broken() -> int:
        raise BrokenError("a test has failed")

    def unexpected() -> int:
        raise AssertionError("it has passed")

    path = tmp_path / "folder" / "passed.json"
    with pytest.raises(KeyboardInterrupt):
        portability.trial({"a": lambda: 41, "b": cut_off}, 60, Passed(path))
    _tried, findings = portability.trial({"a": unexpected, "b": broken}, 60, Passed(path))
    assert findings == ["b: a test has failed"]
    tried, findings = portability.trial({"a": unexpected, "b": lambda: 1}, 60, Passed(path))
    assert (tried["tests"], tried["of them in an earlier run"], findings) == (42, 1, [])
    assert Passed(path).tests == {}, "the next run begins anew"
    for name in "ab":
        Passed(path).add(name, 41)
    portability.trial({"b": unexpected}, 60, Passed(path))
    assert Passed(path).tests == {"a": 41}, "the others go on where they were"
    portability.trial({"a": unexpected, "b": lambda: 1}, -1, Passed(path))
    assert Passed(path).tests == {"a": 41}, "no time was left for b"
    monkeypatch.setattr(environments, "digest", lambda: "of other sources")
    assert Passed(path).tests == {}


def test_every_version_and_compiler_has_an_environment() -> None:
    assert {each.python for each in portability.ENVIRONMENTS} == {"3.10", "3.11", "3.12", "3.13"}
    assert {each.torch for each in portability.ENVIRONMENTS} == {"2.11", "2.13", "2.14", "newest"}
    assert {each.compiler for each in portability.ENVIRONMENTS} == set(portability.COMPILERS)
    assert all((tree.ROOT / name).exists() for name in environments.TESTS)
