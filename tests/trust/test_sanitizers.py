"""The sanitizers find faults that are planted, in the kernels of each CPU target."""

from __future__ import annotations

import functools

import pytest

from tests.test_capability import CAPABILITIES, can_run
from tests.trust import sanitizers
from tests.trust.sanitizers import ASAN_QUICK, TSAN_QUICK, Sanitizer

HERE = next(capability for capability in reversed(CAPABILITIES) if can_run(capability))
PLANTED = """
import tests
import ctypes
import torch
from bigramx import _C, ops

planted = ctypes.CDLL(_C.__file__)
values = torch.zeros(8, dtype=torch.int64)
torch.set_num_threads(2)
"""
# A gradient that claims to have a vector more than what was allocated: masked loads of less are not instrumented.
READ_OUT_OF_BOUNDS = """
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_float * 10_016).from_address(libc.malloc(ctypes.c_size_t(40_000)))
ctypes.memset(memory, 0, 40_000)
grad = torch.frombuffer(memory, dtype=torch.float32)
param, exp_avg, exp_avg_sq = torch.zeros(3, 10_016)
ops.adamw_(param, grad, exp_avg, exp_avg_sq, None, torch.ones(()), 0.1, 0.9, 0.99, 1e-8, 0.0, False)
"""
# Two threads of Python change the same tensors, without waiting for each other.
RACES = """
import threading
tensors = [torch.ones(10_000) for _ in range(4)]
both = threading.Barrier(2)  # on a busy machine one might be done before the other begins

def update(step):
    both.wait()
    for _ in range(100):
        ops.adamw_(*tensors, None, step, 0.1, 0.9, 0.99, 1e-8, 0.0, False)

threads = [threading.Thread(target=update, args=[torch.ones(())]) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
planted.race(ctypes.c_void_p(values.data_ptr()))
"""
OVERFLOWS = """
planted.overflow(ctypes.c_int64(2**63 - 1))
planted.to_integer(ctypes.c_double(1e30))
"""


@functools.cache
def build_once(name: str) -> None:
    """Builds at the first test that needs it."""
    sanitizer = sanitizers.SANITIZERS[name]
    if reason := sanitizers.missing(sanitizer):
        pytest.skip(reason)
    sanitizers.build(sanitizer)


def findings(sanitizer: Sanitizer, capability: str, script: str) -> list[str]:
    """What is reported of a script."""
    build_once(sanitizer.name)
    return sanitizers.run(sanitizer, capability, ["-c", PLANTED + script])[1]


@pytest.mark.short_form(3)
@pytest.mark.parametrize("capability", [*filter(can_run, CAPABILITIES)])
def test_finds_undefined_behaviour_and_a_read_out_of_bounds_in_a_kernel(capability: str) -> None:
    found = findings(ASAN_QUICK, capability, OVERFLOWS + READ_OUT_OF_BOUNDS)  # the last ends the process
    undefined = [message for line in found if (message := line.partition(": runtime error: ")[2])]
    assert {message.partition(":")[0] for message in undefined} == {
        "signed integer overflow",
        "1e+30 is outside the range of representable values of type 'long int'",
    }
    (read,) = (line for line in found if "runtime error" not in line)
    target = {"default": "portable"}.get(capability, capability)
    assert "AddressSanitizer: heap-buffer-overflow " in read
    assert f" bigramx::cpu::{target}::" in read


def test_finds_races() -> None:
    found = findings(TSAN_QUICK, HERE, RACES)
    planted = [line for line in found if "ThreadSanitizer: data race tests/trust/planted_faults.cpp" in line]
    in_kernels = [line for line in found if "ThreadSanitizer: data race" in line and " bigramx::cpu::" in line]
    assert planted
    assert in_kernels
    assert len(planted) + len(in_kernels) == len(found)


def test_knows_what_happens_before_and_after_a_parallel_region() -> None:
    assert findings(TSAN_QUICK, HERE, "for _ in range(1000): planted.sum_in_parallel()") == []


@pytest.mark.parametrize(
    ("sanitizer", "name", "chosen"),
    [
        (ASAN_QUICK, "tests/test_adamw.py", "any_size or overlap"),
        (TSAN_QUICK, "tests/test_adamw.py", "more_elements_than_threads or any_size"),
    ],
    ids=["asan", "tsan"],
)
def test_quick_tests_are_clean(sanitizer: Sanitizer, name: str, chosen: str) -> None:
    build_once(sanitizer.name)
    passed, found = sanitizers.run_tests(sanitizer, HERE, name, chosen)
    assert found == []
    assert passed > 5
