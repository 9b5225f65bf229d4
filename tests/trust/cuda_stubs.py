"""Empty libraries in place of CUDA's, so that a CUDA build of torch can be imported where they are not installed.

python -m tests.trust.cuda_stubs FOLDER [PREFIX]    # of torch/lib; PREFIX: of the tools, such as aarch64-linux-gnu-

CUDA's libraries are gigabytes, and a process that computes on the CPU asks them at most whether there is a GPU. That
there is none is all that these say.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests import processes

CUDA_LIBRARY = re.compile(r"lib(?:cu|nv|nccl)\w*\.so\.\d+")
CUDA_SYMBOL = re.compile(r"cu|nv|nccl")
NO_DEVICE = 100  # cudaErrorNoDevice; an error to the other libraries, too


def output_of(*command: str | Path) -> str:
    """What a command prints."""
    return processes.run(command, check=True).stdout


def write_stub(path: Path, compiler: str, versions: dict[str, set[str]], others: Iterable[str]) -> None:
    """Compiles a library whose functions all return NO_DEVICE: those of each version, and those without one."""
    functions = sorted({*others, *(name for names in versions.values() for name in names)})
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stub.c"), Path(folder, "stub.map")
        source.write_text("\n".join(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in functions))
        script.write_text(
            "\n".join(f"{version} {{ {'; '.join([*names, ''])} }};" for version, names in versions.items())
        )
        flags = ["-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{path.name}"]
        flags += [f"-Wl,--version-script,{script}"] if versions else []
        output_of(compiler, *flags, source, "-o", path)


def write_stubs(folder: Path, prefix: str = "") -> list[str]:
    """Writes what the libraries of a folder need of CUDA, and do not find in it; returns the names."""
    libraries = sorted(folder.glob("*.so"))
    headers = output_of(f"{prefix}objdump", "-p", *libraries)
    missing = sorted(
        name
        for name in set(re.findall(r"NEEDED +(\S+)", headers))
        if CUDA_LIBRARY.fullmatch(name) and not (folder / name).exists()
    )
    undefined: dict[str, set[str]] = defaultdict(set)  # by their version
    for line in output_of(f"{prefix}nm", "-D", "--undefined-only", *libraries).splitlines():
        name, _at, version = line.rpartition(" ")[2].partition("@")
        if version or CUDA_SYMBOL.match(name):
            undefined[version].add(name)
    versions: dict[str, dict[str, set[str]]] = defaultdict(dict)  # by their library
    for library, names in re.findall(r"required from (\S+):\n((?:    .+\n)+)", headers):
        versions[library] |= {version: undefined[version] for version in re.findall(r"\S+$", names, re.MULTILINE)}
    for name in missing:
        unversioned = undefined[""] if name == missing[0] else ()  # they may be of any: one has them all
        write_stub(folder / name, f"{prefix}gcc", versions[name], unversioned)
    return missing


if __name__ == "__main__":
    print(*write_stubs(Path(sys.argv[1]), *sys.argv[2:]), sep="\n")
