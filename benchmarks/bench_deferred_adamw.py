"""A training loop in Python with a sparse gradient, whose optimizer leaves alone the rows that no batch meets."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench_fit import COPIES, TOKENS, LargeFit
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, Target, assert_means_within, faster_than


def steps(config: RunConfig, vocab_size: int, num_steps: int, kind: str, targets: Sequence[Target]) -> Result:
    """Batch, forward, backward, optimizer: B = 32, T = 8. The table is up to date at the end."""
    comparison = Comparison(
        f"{num_steps} steps of a loop, sparse gradient, DeferredAdamW, V={vocab_size} B=32 T=8, {kind} tokens",
        targets,
        check=assert_means_within(0.2),
    )
    if reason := config.device.lacks_memory(3 * 4 * 4 * vocab_size**2):
        return comparison.skip(reason)
    try:
        runs = LargeFit(TOKENS[kind](vocab_size), vocab_size, num_steps)
    except ImportError as error:
        return comparison.skip(str(error))
    comparison.add(OURS, runs.deferred())
    comparison.add("eager, dense, AdamW fused", runs.eager())
    comparison.add(f"{OURS}, dense, three imports changed", runs.three_imports())
    comparison.add_lower_bound(COPIES, runs.copies())
    return comparison.run(config)


CASES = [
    Case(
        steps,
        headline=f"a loop with sparse gradients, V={vocab_size}" if kind == "uniform" else "",
        vocab_size=vocab_size,
        num_steps=20,
        kind=kind,
        targets=[faster_than("eager, dense, AdamW fused", 6)],
    )
    for vocab_size, kind in ((8192, "uniform"), (8192, "BPE"))
]
