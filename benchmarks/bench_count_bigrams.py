"""The counts of pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    COPY,
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    Target,
    assert_equal,
    faster_than,
    ns_per_token,
    percent_of,
    within,
)
from benchmarks.timing import Function, rotating
from bigramx import BigramCounts, data, functional, reference
from bigramx.shards import TokenShards


def count(
    config: RunConfig,
    num_tokens: int,
    vocab_size: int,
    targets: Sequence[Target],
    dtype: torch.dtype = torch.int64,
    draw: Callable[[int, int], Tensor] = peers.text_tokens,
) -> Result:
    """Tokens of a text; for a large V, which the text does not have, drawn as words are distributed."""
    device = config.device
    drawn = draw(num_tokens, vocab_size).to(dtype)
    sets = device.input_sets(lambda: (drawn.to(device.name, copy=True),))
    tokens = sets[0][0]
    name = str(dtype).removeprefix("torch.")
    comparison = Comparison(
        f"count_bigrams, {peers.in_powers_of_ten(num_tokens)} tokens of {name}, V={vocab_size}",
        targets,
        bytes_moved=tokens.nbytes + 8 * vocab_size**2,
    )
    comparison.add(OURS, rotating(lambda tokens: functional.count_bigrams(tokens, vocab_size), sets))
    comparison.add("torch.bincount", rotating(lambda tokens: reference.count_bigrams(tokens, vocab_size), sets))
    if device.is_gpu:
        comparison.add_copy(device, tokens.nbytes + 8 * vocab_size**2)
    else:
        comparison.add_peer("NumPy", lambda: peers.numpy_count_bigrams(tokens, vocab_size))
        comparison.add_peer("JAX", lambda: peers.jax_count_bigrams(tokens, vocab_size))
        comparison.add_lower_bound("reading the tokens", partial(lower_bounds.native().read_words, tokens))
    return comparison.run(config)


UNIQUE, NUMPY, SCIPY = "torch.unique", "NumPy's unique", "SciPy's COO to CSR"
IN_MEMORY = "the same, in memory"


def count_sparse(
    config: RunConfig,
    num_tokens: int,
    quick_tokens: int,
    targets: Callable[[int], Sequence[Target]],
    peers_of: Sequence[str] = (),
    vocab_size: int = 50257,
) -> Result:
    """The pairs of a real vocabulary as a CSR tensor; peers give the pairs' numbers, or a form of their own."""
    num_tokens = quick_tokens if config.quick else num_tokens
    tokens = peers.chain_tokens(num_tokens, vocab_size)

    def unique() -> object:
        wide = tokens.long()
        return (wide[:-1] * vocab_size + wide[1:]).unique(return_counts=True)

    others: dict[str, Callable[[], Function]] = {
        UNIQUE: lambda: unique,
        NUMPY: lambda: peers.numpy_unique(tokens, vocab_size),
        SCIPY: lambda: peers.scipy_count_bigrams(tokens, vocab_size),
        "Polars": lambda: peers.polars_count_bigrams(tokens),
        "Counter": lambda: peers.counter_of_pairs(tokens),
    }
    name = f"count_bigrams, sparse, {peers.in_powers_of_ten(num_tokens)} tokens of uint16, V={vocab_size}"
    comparison = Comparison(name, targets(num_tokens), bytes_moved=tokens.nbytes, check=_same_counts)
    comparison.add(OURS, lambda: functional.count_bigrams(tokens, vocab_size, torch.sparse_csr))
    for peer in peers_of:
        comparison.add_peer(peer, others[peer])
    return comparison.run(config, memory=config.device.peak_resident_bytes, memory_of=(OURS, *peers_of))


def _same_counts(actual: Any, csr: Tensor) -> None:
    """Whether a peer's counts, in whatever form, have the sum and the number of ours, or are the same counts."""
    values = csr.values()
    if hasattr(actual, "indptr"):
        assert_equal((actual.indptr, actual.indices, actual.data), (csr.crow_indices(), csr.col_indices(), values))
    elif isinstance(actual, tuple):
        rows = torch.repeat_interleave(torch.arange(csr.size(0)), csr.crow_indices().diff())
        assert_equal(actual, (rows * csr.size(1) + csr.col_indices(), values))
    else:
        counts = list(actual.values()) if isinstance(actual, dict) else actual["len"].to_list()
        assert sorted(counts) == values.sort()[0].tolist()


def count_shards(config: RunConfig, num_tokens: int, quick_tokens: int, vocab_size: int = 50257) -> Result:
    """From ten memory-mapped files, which the system has in memory as they were just written."""
    num_tokens = quick_tokens if config.quick else num_tokens
    in_memory = TokenShards(peers.chain_tokens(num_tokens, vocab_size).chunk(10))
    comparison = Comparison(
        f"count_bigrams, sparse, 10 memory-mapped shards of {peers.in_powers_of_ten(num_tokens // 10)} tokens",
        [within(IN_MEMORY, 1.3)],
        bytes_moved=2 * num_tokens,
    )

    def count_of(shards: TokenShards) -> BigramCounts:
        counts = BigramCounts(vocab_size)
        counts.update(shards)
        return counts

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k}.bin") for k in range(10)]
        for path, shard in zip(paths, in_memory.shards, strict=True):
            path.write_bytes(shard.numpy().tobytes())
        mapped = data.read_tokens(paths, dtype=torch.uint16)
        assert count_of(mapped) == count_of(in_memory)
        comparison.add(OURS, lambda: count_of(mapped).num_pairs)
        comparison.add_lower_bound(IN_MEMORY, lambda: count_of(in_memory).num_pairs)
        return comparison.run(config, memory=config.device.peak_resident_bytes, memory_of=(OURS,))


CASES = [
    Case(
        count,
        headline="`count_bigrams`: the pairs of 20 million tokens, V=65",
        num_tokens=2 * 10**7,
        vocab_size=65,
        targets=[faster_than("torch.bincount", 20)],
    ),
    Case(
        count,
        num_tokens=2 * 10**7,
        vocab_size=65,
        dtype=torch.uint16,
        targets=[faster_than("torch.bincount", 20), ns_per_token(2 * 10**7, 0.6)],
    ),
    Case(
        count_sparse,
        num_tokens=10**6,
        quick_tokens=10**5,
        targets=lambda _n: [],
        peers_of=("Counter", NUMPY, SCIPY, "Polars"),
    ),
    Case(
        count_sparse,
        headline="sparse counts of the pairs of 10 million tokens, V=50257",
        num_tokens=10**7,
        quick_tokens=2 * 10**6,
        targets=lambda _n: [faster_than(NUMPY, 20), faster_than(SCIPY, 20), faster_than(UNIQUE, 12)],
        peers_of=(NUMPY, SCIPY, UNIQUE, "Polars"),
    ),
    Case(
        count_sparse,
        num_tokens=10**8,
        quick_tokens=10**7,
        targets=lambda n: [faster_than(UNIQUE, 12), ns_per_token(n, 8)],
        peers_of=(UNIQUE,),
    ),
    Case(count_shards, num_tokens=10**8, quick_tokens=10**7),
]

CUDA_CASES = [
    Case(
        count,
        headline="`count_bigrams`: the pairs of 100 million tokens, V=65",
        num_tokens=10**8,
        vocab_size=65,
        targets=[percent_of(COPY, 50)],
    ),
    Case(
        count,
        num_tokens=2 * 10**7,
        vocab_size=8192,
        draw=peers.zipf_tokens,
        targets=[faster_than("torch.bincount", 3)],
    ),
]
