"""The error of the vector exponential that all kernels share."""

from __future__ import annotations

from benchmarks.comparison import Case, Outcome, Result, RunConfig
from benchmarks.lower_bounds import compile_module

CAPABILITIES = ["plain vectors", "AVX2", "AVX-512"]
SAMPLE = 1009  # a prime, so that the sample has every exponent


def error(config: RunConfig) -> Result:
    """Against std::exp in double, over all 2^32 float32 numbers or a sample of them."""
    errors = compile_module("exp_error").exp_error(SAMPLE if config.quick else 1)
    what = f"every {SAMPLE}th of" if config.quick else "all"
    targets = [
        Outcome(error, f" ulp, {capability}", "<=", 2.0)
        for capability, error in zip(CAPABILITIES, errors, strict=False)
    ]
    return Result(f"the exponential's error over {what} 2^32 float32 numbers", targets=targets)


CASES = [Case(error)]
