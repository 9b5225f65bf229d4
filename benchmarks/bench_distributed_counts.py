"""Counting shards by two ranks, of one thread each."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, faster_than
from benchmarks.timing import Function

ONE = "one rank"


@contextlib.contextmanager
def ranks(size: int, folder: Path, vocab_size: int) -> Iterator[Function]:
    """Processes that are in a group, and count the shards of the folder at each call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    root = str(Path(__file__).parents[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "benchmarks.bench_distributed_counts", str(folder), str(size), str(vocab_size)]
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(size):
            environment = {**os.environ, **group, "RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            workers.append(stack.enter_context(worker))  # which closes its input, its end

        def count() -> Tensor:
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
            answers = [worker.stdout.readline() for worker in workers if worker.stdout is not None]
            return torch.tensor([int(number) for number in answers[0].split()])

        yield count


def work(folder: str, size: str, vocab_size: str) -> None:
    """What each process does: counts once for each line that it reads, and prints how many pairs there are."""
    import torch.distributed as dist

    from bigramx.distributed_counts import count_shards

    if int(size) > 1:
        dist.init_process_group("gloo")
    for _ in sys.stdin:
        result = count_shards([folder], f"{folder}-{size}", vocab_size=int(vocab_size))
        print(result.num_pairs, result.num_distinct, flush=True)
    if int(size) > 1:
        dist.destroy_process_group()


def count(config: RunConfig, tokens_of_shard: int, num_shards: int = 20, vocab_size: int = 50257) -> Result:
    """From files to files, which the system has in memory; without the starting of the processes.

    All shards have the same tokens, so that new pairs are as rare as in a long text: one in 67 of 2*10^8 tokens.
    """
    tokens_of_shard = tokens_of_shard // 20 if config.quick else tokens_of_shard
    size = peers.in_powers_of_ten(tokens_of_shard)
    name = f"count_shards, two ranks, {num_shards} shards of {size} tokens, V={vocab_size}"
    comparison = Comparison(name, [faster_than(ONE, 1.7)])
    with tempfile.TemporaryDirectory() as parent, contextlib.ExitStack() as stack:
        folder = Path(parent, "shards")
        folder.mkdir()
        content = peers.chain_tokens(tokens_of_shard, vocab_size).numpy().tobytes()
        for k in range(num_shards):
            (folder / f"{k}.bin").write_bytes(content)
        comparison.add(OURS, stack.enter_context(ranks(2, folder, vocab_size)))
        comparison.add(ONE, stack.enter_context(ranks(1, folder, vocab_size)))
        return comparison.run(config)


CASES = [Case(count, tokens_of_shard=10**7)]

if __name__ == "__main__":
    work(*sys.argv[1:])
