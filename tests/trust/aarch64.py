"""The tests on an aarch64 processor that qemu emulates: the plain-vector kernels, with torch's own build for it.

The Python is Debian's, unpacked; the extension is compiled by the cross compiler. portability.py runs this.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import tree
from tests.trust import environments
from tests.trust.environments import FOLDER, UnavailableError

TORCH = "2.13"
NAME = f"aarch64-torch{TORCH}-gcc"
PREFIX = "aarch64-linux-gnu-"
PLATFORM = "manylinux_2_28_aarch64"
# torch's cpuinfo reads these of the machine, and cannot read those of another architecture.
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
IDENTIFICATION = "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"
TOOLS = ["apt-get", "dpkg-deb", "qemu-aarch64", f"{PREFIX}g++", f"{PREFIX}objdump"]


def unpack_python(root: Path, log: Path) -> str:
    """Unpacks Debian's Python, its headers, and all that it needs; returns its version."""
    lists = root.with_name("packages")
    for folder in ("lists/partial", "archives/partial"):
        (lists / folder).mkdir(parents=True, exist_ok=True)
    (lists / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": lists,
        "Dir::State::status": lists / "status",
        "Dir::Cache": lists,
    }
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    environments.run([*apt, "update"], FOLDER, log)
    options = ["--download-only", "--no-install-recommends"]
    environments.run([*apt, *options, "install", "python3", "libpython3-dev", "libstdc++6"], FOLDER, log)
    for package in (lists / "archives").glob("*.deb"):
        environments.run(["dpkg-deb", "-x", package, root], FOLDER, log)
    for name, text in (("proc/cpuinfo", CPUINFO), (IDENTIFICATION, "0x00000000410fd083\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return os.readlink(root / "usr/bin/python3").removeprefix("python")


def install_packages(site: Path, version: str, log: Path) -> None:
    """Installs torch, stubs in place of CUDA's libraries, and what the tests need."""
    place = ["--python-version", version, "--platform", PLATFORM, "--platform", "manylinux2014_aarch64"]
    wheel = environments.download(sys.executable, f"torch=={TORCH}.*", site.with_name("wheels"), *place)
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--only-binary=:all:",
        "--target",
        site,
        *place,
    ]
    environments.run([*install, "--no-deps", wheel], FOLDER, log)
    shutil.rmtree(wheel.parent)
    requirements = environments.requirements_of_torch(sys.executable, log, site)
    environments.run([*install, "--upgrade", *environments.TOOLS, *requirements], FOLDER, log)
    environments.run([sys.executable, "-m", "tests.trust.cuda_stubs", site / "torch" / "lib", PREFIX], tree.ROOT, log)


def make_root(log: Path) -> tuple[Path, Path]:
    """The root and the packages of the emulated machine."""
    root, site, made = FOLDER / "aarch64/root", FOLDER / "aarch64/site", FOLDER / "aarch64/made"
    if not made.exists():
        shutil.rmtree(root.parent, ignore_errors=True)
        root.mkdir(parents=True)
        install_packages(site, unpack_python(root, log), log)
        # Processes that a test starts are emulated, too.
        (site / "sitecustomize.py").write_text('import os, sys\nsys.executable = os.environ["EMULATED_PYTHON"]\n')
        python = root.with_name("python")
        python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -cpu cortex-a72 -L "{root}" "{root}/usr/bin/python3" "$@"\n')
        python.chmod(0o755)
        made.touch()
    return root, site


def build(sources: Path, root: Path, site: Path, log: Path) -> None:
    """Compiles the extension with the flags of setup.py."""
    setup = runpy.run_path(str(tree.ROOT / "setup.py"))
    (python_headers,) = (root / "usr/include").glob("python3.*")
    torch = site / "torch"
    headers = [torch / "include", torch / "include/torch/csrc/api/include", python_headers, python_headers.parent]
    flags = [*setup["FLAGS"], *setup["OPENMP"], "-std=c++20", "-fPIC", f"-I{sources / 'csrc'}"]
    flags += [f"-isystem{path}" for path in headers]
    flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    files = [path for path in (sources / "csrc").rglob("*.cpp") if "cuda" not in path.parts]
    newest = max(path.stat().st_mtime for path in (sources / "csrc").rglob("*.*"))

    def compile_file(path: Path) -> Path:
        compiled = sources / "build" / f"{'-'.join(path.relative_to(sources).parts)}.o"
        if not compiled.exists() or compiled.stat().st_mtime < newest:
            compiled.parent.mkdir(exist_ok=True)
            environments.compile_sources([f"{PREFIX}g++", *flags, "-c", path, "-o", compiled], sources, log)
        return compiled

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_file, files))
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-lgomp"]
    link: list[str | Path] = [f"{PREFIX}g++", "-shared", *objects, *libraries, "-Wl,--allow-shlib-undefined"]
    environments.run([*link, "-o", sources / "bigramx/_C.so"], sources, log)


def check() -> int:
    """Builds and tests; returns how many tests passed. Raises UnavailableError and BrokenError."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise UnavailableError(f"no {', '.join(missing)}")
    sources, log = environments.prepare(NAME)
    root, site = make_root(log)
    build(sources, root, site, log)
    python = str(root.with_name("python"))
    variables = {"PYTHONPATH": f"{site}:{sources}", "EMULATED_PYTHON": python, "OMP_NUM_THREADS": "2"}
    # Some cases of each test: emulated, all take hours. "compile" would take this machine's compiler.
    tests = [*environments.TESTS_OF_OPS, "--every=4", "-k", "not compile"]
    return environments.run_tests(python, sources, log, {**os.environ, **variables}, tests)
