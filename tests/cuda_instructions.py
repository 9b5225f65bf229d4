"""Counts the machine instructions that block_rows_kernel takes for an element of a row.

    python tests/cuda_instructions.py    # what make cuda-instructions runs

Of the loops over the vectors of a row: the one that measures it, and the one that writes its gradient. All that stands
in a loop counts, even what few turns take. Needs nvcc and nvdisasm, no GPU. Fails where there are more than MOST.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = "csrc/cuda/embedding_cross_entropy_kernels.cu"
FLAGS = ["-O3", "-std=c++17", "-arch=sm_90", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]
KERNELS = {
    "float32": "PlainRowsParamsIf",
    "bfloat16": "PlainRowsParamsI13__nv_bfloat16",
    "float16": "PlainRowsParamsI6__half",
}
ELEMENTS = {"float32": 4, "bfloat16": 8, "float16": 8}  # of a vector
MOST = 14.0


@dataclass
class Loop:
    """The instructions of an innermost loop."""

    instructions: list[str]

    def count(self, pattern: str) -> int:
        """How many of them match."""
        return sum(re.match(pattern, instruction) is not None for instruction in self.instructions)


def functions(disassembly: str) -> dict[str, list[str]]:
    """The lines of each function, by its mangled name."""
    parts = re.split(r"^\.text\.(\w+):$", disassembly, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.splitlines() for part in parts[2::2]), strict=True))


def innermost_loops(lines: list[str]) -> list[Loop]:
    """Those of a function: from the target of a branch back to the branch, with no other loop in between."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*);", line):
            instructions.append(found[1])
            target = re.search(r"^BRA.*\(?(\.L_x_\d+)", found[1])
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(instructions)))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Loop(instructions[begin:end]) for begin, end in inner]


def instructions_an_element(lines: list[str], elements_of_vector: int) -> tuple[float, float]:
    """Of the loop that measures the row, and of the one that writes its gradient, each unrolled the most."""
    best: dict[str, tuple[int, float]] = {}
    for loop in innermost_loops(lines):
        # An exponential for each element, and one for a maximum that rises. Loops that convert counts are for rows
        # with many pairs.
        elements = loop.count(r"MUFU\.EX2") // elements_of_vector * elements_of_vector
        for name, store in (("measure", r"STS"), ("gradient", r"STG?\.E\.128")):
            is_loop = elements > 0 and loop.count(store) and not loop.count("I2F")
            if is_loop and elements >= best.get(name, (0, 0.0))[0]:
                best[name] = (elements, len(loop.instructions) / elements)
    return best["measure"][1], best["gradient"][1]


def find_nvdisasm() -> str:
    """That in PATH, or of the wheel nvidia-cuda-nvdisasm."""
    wheel = next(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"), None)
    return shutil.which("nvdisasm") or (str(wheel) if wheel else sys.exit("cuda-instructions: nvdisasm is not found"))


def main() -> None:
    """The command."""
    nvdisasm = find_nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        subprocess.run(["nvcc", *FLAGS, "-cubin", ROOT / SOURCE, "-o", cubin], check=True)
        disassembly = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    too_many = []
    for dtype, parameter in KERNELS.items():
        (lines,) = (
            lines
            for name, lines in functions(disassembly).items()
            if "block_rows_kernelIj" in name and parameter in name
        )
        measure, gradient = instructions_an_element(lines, ELEMENTS[dtype])
        print(
            f"block_rows_kernel, {dtype}: {measure:.1f} + {gradient:.1f} = {measure + gradient:.1f} an element (sm_90)"
        )
        too_many += [dtype] if measure + gradient > MOST else []
    if too_many:
        sys.exit(f"cuda-instructions: more than {MOST:.0f} an element for {', '.join(too_many)}")


if __name__ == "__main__":
    main()
