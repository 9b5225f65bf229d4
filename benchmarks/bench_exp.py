"""The error of the vector exponential that all kernels share."""

from __future__ import annotations

from benchmarks.floors import compile_module
from benchmarks.race import Effort, Reached, Result

CAPABILITIES = ["plain vectors", "AVX2", "AVX-512"]
SAMPLE = 1009  # a prime: the sample meets every exponent


def error(effort: Effort) -> Result:
    """Against std::exp in double, over all 2^32 float32 numbers, or a sample of them."""
    errors = compile_module("exp_error").exp_error(SAMPLE if effort.quick else 1)
    what = f"every {SAMPLE}th of" if effort.quick else "all"
    return Result(
        f"the exponential's error over {what} 2^32 float32 numbers",
        reaches=[
            Reached(f" ulp, {capability}", "<=", 2.0, error)
            for capability, error in zip(CAPABILITIES, errors, strict=False)
        ],
    )


JOBS = [error]
