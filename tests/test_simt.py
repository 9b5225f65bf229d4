"""The CUDA kernels pass their tests in the GPU emulator (tests/simt), which detects faults injected into kernels.

This is the short form: of each test of an op one case of 32, of the mutations one; make emulator has all.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

from tests import processes, tree
from tests.tree import ROOT

BUILD = Path("build", "simt")
SEEDS = range(5)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GPU emulator needs Linux")

# The kernels of injected_faults.cu, and how the error that reports each fault reads.
FAULTS = {
    "missing_barrier": "data race|uninitialised",
    "missing_barrier_after_reading": "data race",
    "missing_warp_barrier": "data race|uninitialised",
    "shuffle_as_warp_barrier": "data race",
    "warp_barrier_between_warps": "data race|uninitialised",
    "missing_atomic": "data race",
    "missing_atomic_between_blocks": "data race",
    "missing_barrier_before_atomics": "data race|uninitialised",
    "missing_barrier_after_atomics": "data race",
    "shared_half_word": "data race: .* writes 2 bytes",
    "bytes_and_vectors": "data race: .* (1 byte|16 bytes) ",
    "missing_release": "data race",
    "missing_acquire": "data race",
    "missing_release_of_atomics": "data race",
    "missing_barrier_before_ticket": "data race",
    "missing_barrier_after_ticket": "data race|uninitialised",
    "cleared_by_any": "data race",
    "read_before_waiting": "data race: .* a kernel before has written them",
    "written_before_waiting": "data race: .* a kernel before has read them",
    "returns_without_waiting": "thread 3 of block 1 returns without having waited",
    "reads_past_end": "out of bounds: .* reads 4 bytes at byte 516 of a device allocation, which has 516 bytes",
    "writes_past_end": "out of bounds: .* writes 4 bytes at byte 516 of a device allocation, which has 516 bytes",
    "unwritten_element": "wrong result",
    "freed_memory": "out of bounds: .* where there is no device memory",
    "writes_past_shared_memory": "out of bounds: .* at byte 17 of the shared memory of the block, which has 17 bytes",
    "unwritten_shared_memory": "uninitialised: .* at byte 256",
    "shared_memory_of_earlier_block": "uninitialised|wrong result",
    "offset_that_wraps": "wrong result",
    "offset_that_overflows": "integer overflow",
    "misaligned_vector": "misaligned: .* at vector_access.cuh",
    "misaligned_atomic": "misaligned",
    "index_past_local_array": "index out of bounds",
    "local_of_another_thread": "out of bounds: .* where there is no device memory",
    "memcpy_past_end": "out of bounds: .* writes 100 bytes",
    "memset_past_end": "invalid argument",
    "divergent_barrier": "divergent barrier: .* waits at injected_faults.cu:",
    "early_return": "divergent barrier: .* has returned",
    "early_return_in_warp": "divergent barrier|waits for a lane that has returned",
    "barrier_in_uneven_loop": "divergent barrier: .* has returned",
    "divergent_shuffle": "deadlock",
    "crosswise_waits": "deadlock",
    "shuffle_outside_mask": "is not in its own mask|lane that is not in its mask",
    "failed_assertion": "^injected_faults: expected value >= 0",
    "endless_loop": "no end in sight",
    "too_many_threads": "invalid configuration argument",
    "too_much_shared_memory": "invalid argument",
    "shared_memory_not_asked_for": "invalid argument",
}
CORRECT = ["correct_functions", "block_functions", "last_block", "kernels_that_need_not_wait", "vectors_of_rows"]


@dataclass
class Mutation:
    """A fault to inject: `text`, which occurs once in a file of csrc, is replaced; then these tests must fail."""

    file: str
    text: str
    replacement: str
    tests: str  # arguments of pytest, or a kernel of injected_faults.cu

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.tests.split('/')[-1]}:{self.replacement[:30]}"


BARRIER = "    __syncthreads();\n"
MUTATIONS = [
    Mutation("cuda/base/block.cuh", f"= value;\n{BARRIER}    T total", "= value;\n    T total", "block_functions"),
    Mutation("cuda/base/block.cuh", f"scratch[warp]);\n{BARRIER}", "scratch[warp]);\n", "block_functions"),
    Mutation("cuda/base/block.cuh", f"= within;\n{BARRIER}", "= within;\n", "block_functions"),
    Mutation("cuda/base/block.cuh", f"    }}\n{BARRIER}    *total", "    }\n    *total", "block_functions"),
    Mutation("cuda/base/block.cuh", "if (lane_of_thread() >= distance) value", "value", "block_functions"),
    Mutation(
        "cuda/base/block.cuh", f"{BARRIER}    if (threadIdx.x == 0) {{\n", "    if (threadIdx.x == 0) {\n", "last_block"
    ),
    Mutation("cuda/base/block.cuh", "        __threadfence();\n        const", "        const", "last_block"),
    Mutation("cuda/base/block.cuh", "if (is_last) __threadfence();", "", "last_block"),
    Mutation(
        "cuda/base/block.cuh", f"    }}\n{BARRIER}    return *scratch", "    }\n    return *scratch", "last_block"
    ),
    Mutation(
        "cuda/base/vector_access.cuh",
        "(kVectorSize<T> - elements_into_vector(row))",
        "elements_into_vector(row)",
        "vectors_of_rows",
    ),
    Mutation(
        "cuda/base/vector_access.cuh", "k < outside; k += threads", "k < outside - 1; k += threads", "vectors_of_rows"
    ),
    Mutation("cuda/base/vector_access.cuh", "if (c < num_vectors) visit_vector", "visit_vector", "vectors_of_rows"),
    Mutation("cuda/get_batch_kernels.cu", "if (n >= blocks.size)", "if (n > blocks.size)", "tests/test_get_batch.py"),
    Mutation(
        "cuda/base/pairs.cuh",
        "atomicAdd(table + pair.row * num_targets + pair.target, 1u);",
        "++table[pair.row * num_targets + pair.target];",
        "tests/test_count_bigrams.py -k equals_a_counter",
    ),
    Mutation(
        "cuda/base/pairs.cuh",
        "const uint32_t place = atomicAdd(cursors + pair.row, 1u);",
        "const uint32_t place = cursors[pair.row]++;",
        "tests/test_embedding_cross_entropy.py -k groups_of_pairs",
    ),
    Mutation(
        "cuda/base/pairs.cuh",
        "    wait_for_kernel_before();\n    if constexpr (kAreShared) {",
        "    if constexpr (kAreShared) {",
        "tests/test_embedding_cross_entropy.py -k groups_of_pairs",
    ),
    Mutation(
        "cuda/base/pairs.cuh",
        f"{BARRIER}    const int64_t num_pairs = scan_rows",
        "    const int64_t num_pairs = scan_rows",
        "tests/test_embedding_cross_entropy.py -k groups_of_pairs",
    ),
    Mutation(
        "cuda/count_bigrams_kernels.cu",
        f"return 1u; }});\n    {BARRIER}",
        "return 1u; });\n",
        "tests/test_count_bigrams.py -k large_vocabulary",
    ),
    Mutation(
        "cuda/count_bigrams_kernels.cu",
        "if (count > 0) add_atomically(&entry, count);",
        "entry += count;",
        "tests/test_count_bigrams.py -k most_of_the_pairs",
    ),
    Mutation(
        "cuda/count_bigrams_kernels.cu",
        "if (!row.is_cut() || row.begin == cut) return;",
        "if (!row.is_cut()) return;",
        "tests/test_count_bigrams.py -k rows_in_pieces",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_rows.cuh",
        "weight + row * row_stride",
        "weight + static_cast<int32_t>(row * row_stride)",
        "tests/test_embedding_cross_entropy.py -k beyond_32_bits",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "sums[j] = 0;\n    __syncwarp();",
        "sums[j] = 0;",
        "tests/test_embedding_cross_entropy.py -k sparse",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "        if (has_unvisited_rows()) clear_gradient();\n",
        "",
        "tests/test_embedding_cross_entropy.py -k few_rows_occur",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_rows.cuh",
        "add_pairs(own, params_.class_weight_of(begin + k), tile_[k]);",
        "add_pairs(own, params_.class_weight_of(k), tile_[k]);",
        "tests/test_embedding_cross_entropy.py -k class_weights_of_long_rows",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_rows.cuh",
        "exists(r) && has(k) ?",
        "has(k) ?",
        "tests/test_embedding_cross_entropy.py -k test_equals_reference",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "        if (first > warp) warp_rows.load(first);\n",
        "",
        "tests/test_embedding_cross_entropy.py -k test_equals_reference",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "!is_done && !rows.has_slot_rows() && blockIdx.x",
        "!is_done && blockIdx.x",
        "tests/test_embedding_cross_entropy.py -k few_rows_occur",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "    if (!is_ahead) wait_for_kernel_before();\n",
        "",
        "tests/test_embedding_cross_entropy.py -k few_rows_occur",
    ),
    Mutation(
        "cuda/embedding_cross_entropy_kernels.cu",
        "*total = *total + loss;",
        "*total = loss;",
        "tests/test_embedding_cross_entropy.py -k more_long_rows",
    ),
    Mutation(
        "cuda/adamw_kernels.cu",
        "if (k < count) to[k]",
        "if (k <= count) to[k]",
        "tests/test_adamw.py -k equals_reference",
    ),
    Mutation(
        "cuda/adamw_kernels.cu",
        "    counted.counts = false;\n",
        "",
        "tests/test_adamw.py -k steps_of_any_size",
    ),
    Mutation(
        "cuda/sampling/weighted_row.cuh",
        f"        {BARRIER}            begin = memory_",
        "            begin = memory_",
        "tests/test_multinomial.py -k philox_hard_rows",
    ),
    Mutation(
        "cuda/sampling/filtered_row.cuh",
        "= found;\n        __threadfence();\n",
        "= found;\n",
        "tests/test_generate.py -k many_kinds",
    ),
    Mutation(
        "cuda/sampling/filtered_row.cuh",
        "        __threadfence();\n        *found",
        "        *found",
        "tests/test_generate.py -k many_kinds",
    ),
]


def make(root: Path, target: str) -> Path:
    """Builds a target of tests/simt/Makefile in this copy of the repository."""
    command = ["make", "--silent", "-C", str(root / "tests" / "simt"), f"PYTHON={sys.executable}"]
    (root / BUILD).mkdir(parents=True, exist_ok=True)
    with open(root / BUILD / "lock", "w") as lock:  # while another process of the suite builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = processes.run([*command, Path("..", "..", BUILD, target)], seconds=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    return root / BUILD / target


class InjectedFaults:
    """The kernels of injected_faults.cu."""

    def __init__(self, path: Path) -> None:
        self.kernels = ctypes.CDLL(str(path))
        self.kernels.run_fault.restype = ctypes.c_char_p
        self.kernels.run_fault.argtypes = [ctypes.c_char_p, ctypes.c_bool, ctypes.c_uint64]
        self.kernels.run_order.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p]

    def run(self, name: str, seed: int, broken: bool = False) -> str:
        """The error that the emulator reports; empty if none."""
        message = self.kernels.run_fault(name.encode(), broken, seed)
        assert message is not None, f"injected_faults.cu has no {name}"
        return bytes(message).decode()

    def order(self, blocks: int, threads: int, seed: int) -> list[int]:
        """The indices of the threads within the grid, in the order in which they run."""
        order = torch.empty(blocks * threads, dtype=torch.int32)
        self.kernels.run_order(blocks, threads, seed, order.data_ptr())
        return list(order.tolist())


@pytest.fixture(scope="module")
def faults() -> InjectedFaults:
    return InjectedFaults(make(ROOT, "injected_faults.so"))


@pytest.mark.parametrize("name", FAULTS)
def test_finds_fault(faults: InjectedFaults, name: str) -> None:
    for seed in SEEDS:
        assert faults.run(name, seed) == ""
        assert re.search(FAULTS[name], faults.run(name, seed, broken=True))


@pytest.mark.parametrize("name", CORRECT)
def test_finds_no_fault(faults: InjectedFaults, name: str) -> None:
    for seed in SEEDS:
        assert faults.run(name, seed) == ""


def test_order_is_random(faults: InjectedFaults) -> None:
    orders = [faults.order(3, 64, seed) for seed in SEEDS]
    assert orders[0] == faults.order(3, 64, SEEDS[0])
    assert len({tuple(order) for order in orders}) == len(orders)
    for order in orders:
        assert sorted(order) == list(range(3 * 64))
        blocks = [thread // 64 for thread in order]
        assert blocks == sorted(blocks, key=blocks.index), "a block ends before the next begins"
    assert {faults.order(3, 1, seed)[0] for seed in range(20)} == {0, 1, 2}


def same_bits(values: Tensor, expected: Tensor) -> bool:
    """Whether the values are the same, where one NaN is as good as another."""
    integers = torch.int16 if values.dtype.itemsize == 2 else torch.int32
    equal = values.view(integers) == expected.view(integers)
    return bool((equal | (values.isnan() & expected.isnan())).all())


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_narrow_types(faults: InjectedFaults, name: str, dtype: torch.dtype) -> None:
    widen, narrow = faults.kernels[f"{name}_to_float"], faults.kernels[f"float_to_{name}"]
    widen.restype, widen.argtypes = ctypes.c_float, [ctypes.c_uint16]
    narrow.restype, narrow.argtypes = ctypes.c_uint16, [ctypes.c_float]
    bits = range(2**16)
    values = torch.tensor(bits, dtype=torch.uint16).view(dtype)
    assert same_bits(torch.tensor([widen(pattern) for pattern in bits], dtype=torch.float32), values.float())
    # Each number, the midpoint between it and the next, and the two floats beside that.
    numbers = values[values.isfinite()].float().sort().values
    middles = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-torch.inf, torch.inf)]
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 3.4e38, 1e-45, 2**-25, -0.0])
    floats = torch.cat([values.float(), middles, *beside, ends])
    narrowed = torch.tensor([narrow(value) for value in floats.tolist()], dtype=torch.uint16).view(dtype)
    assert same_bits(narrowed, floats.to(dtype))


def run_tests(module: Path, *arguments: str) -> CompletedProcess[str]:
    """Runs pytest in the emulator, with the CUDA kernels of the module."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "BIGRAMX_EXTENSION": str(module), "OMP_NUM_THREADS": "1"}
    return processes.run(command, cwd=ROOT, env=environment, seconds=3600)


OF_KERNELS = {f"test_{op}.py" for op in tree.OPS} | {"test_graph_steps.py"}
SHORT = [name for name in tree.cuda_tests() if name in OF_KERNELS]
OTHERS = [name for name in tree.cuda_tests() if name not in OF_KERNELS]


@pytest.mark.parametrize("names", [SHORT[::2], SHORT[1::2], pytest.param(OTHERS, marks=pytest.mark.long)], ids=" ".join)
def test_kernels_pass(names: list[str], pytestconfig: pytest.Config) -> None:
    short_form = [] if pytestconfig.getoption("--long") else ["--every=32", "--hypothesis-profile=few"]
    result = run_tests(make(ROOT, "_C.so"), *short_form, *(f"tests/{name}" for name in names))
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_first_run_on_a_gpu_comes_to_its_end(tmp_path: Path) -> None:
    make(ROOT, "_C.so")
    command = [sys.executable, "benchmarks/first_gpu_run.py", "--emulator", "--out", str(tmp_path)]
    result = processes.run(command, cwd=ROOT, seconds=1800)
    assert result.returncode == 0, result.stdout
    summary = (tmp_path / "summary.txt").read_text()
    assert summary == result.stdout
    steps = [line.partition(":")[0] for line in summary.splitlines()]
    assert [step for step in steps if not step.startswith("op-")] == ["versions", "build", "tests", "table"]
    assert {"op-embedding_cross_entropy", "op-multinomial"} <= set(steps)
    for name in ("op-embedding_cross_entropy", "table"):
        assert (tmp_path / f"{name}.log").read_text().startswith("kernels of build/simt/_C.so\n")
    assert " passed, 0 failed" in (tmp_path / "tests.log").read_text()


@pytest.mark.short_form(24)  # of a kernel that compiles in seconds
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_finds_mutation(mutation: Mutation, tmp_path: Path) -> None:
    on_injected_faults = not mutation.tests.startswith("tests/")
    target = "injected_faults.so" if on_injected_faults else "_C.so"
    make(ROOT, target)
    # Copies of what the build reads; they keep their times, so that make builds only what the mutation affects.
    for part in (Path("csrc"), Path("tests", "simt"), BUILD):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "build" / "objects").symlink_to(ROOT / "build" / "objects")
    path = tmp_path / "csrc" / mutation.file
    source = path.read_text()
    assert source.count(mutation.text) == 1, (
        f"{mutation.file} has changed: it contains the text {source.count(mutation.text)} times"
    )
    path.write_text(source.replace(mutation.text, mutation.replacement))
    module = make(tmp_path, target)
    if on_injected_faults:
        mutant = InjectedFaults(module)
        assert any(mutant.run(mutation.tests, seed) for seed in SEEDS)
    else:
        result = run_tests(module, "--hypothesis-profile=first-failure", *mutation.tests.split())
        assert result.returncode == 1, result.stdout[-3000:]
