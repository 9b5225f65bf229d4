"""Checks of counting by several ranks. tests/test_distributed_counts.py starts them, and names each as a test."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from bigramx import BigramCounts, distributed_counts, parts, storage
from bigramx.distributed_counts import CountProgress, CountResult, count_shards
from bigramx.ranks import Ranks, join
from tests import forked_ranks

V, EOT = 300, 7
CHECKS: dict[str, Callable[[Path], None]] = {}  # each is given a folder of its own


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


@dataclass
class Outcome:
    """Of a rank: what it returned or raised, what it told the user, how often it showed progress; its exit status."""

    returned: str
    raised: str
    told: list[str]
    saw: int
    status: int


def run_ranks(folder: Path, size: int, output: str = "out", **options: Any) -> list[Outcome]:
    """The shards of the folder, counted by so many ranks.

    ``before_update`` is called by each rank with its number, and how often it has been; ``beside`` by this process.
    """
    before_update, beside = options.pop("before_update", None), options.pop("beside", lambda: None)
    ids = forked_ranks.start(size, lambda rank: run_rank(rank, folder, output, before_update, options))
    begin = time.monotonic()
    beside()
    statuses = forked_ranks.wait(ids)
    assert time.monotonic() - begin < 30, "the ranks took long to end"
    outcomes = []
    for rank, status in enumerate(statuses):
        path = folder / f"outcome-{rank}.json"
        told = json.loads(path.read_text()) if path.exists() else {"returned": "", "raised": "", "told": [], "saw": 0}
        path.unlink(missing_ok=True)
        outcomes.append(Outcome(**told, status=status))
    return outcomes


def run_rank(
    rank: int, folder: Path, output: str, before_update: Callable[[int, int], None] | None, options: Any
) -> None:
    outcome: dict[str, Any] = {"returned": "", "raised": "", "told": [], "saw": 0}
    update, calls = BigramCounts.update, iter(range(1000))

    def update_after(self: BigramCounts, *args: Any, **kwargs: Any) -> None:
        if before_update is not None:
            before_update(rank, next(calls))
        update(self, *args, **kwargs)

    def see(progress: CountProgress) -> None:
        outcome["saw"] += 1

    BigramCounts.update = update_after  # type: ignore[method-assign]
    count = options.pop("count", count_shards)
    try:
        paths = [folder / "shards"]
        result = count(paths, folder / output, report=outcome["told"].append, progress=see, **options)
        outcome["returned"] = repr(result)
    except BaseException as error:
        outcome["raised"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))


def write_shards(folder: Path, sizes: Sequence[int] = (400, 1, 1500, 0, 700, 2, 900)) -> BigramCounts:
    """Shards of tokens; and their counts, by one process, shard by shard."""
    (folder / "shards").mkdir()
    generator = torch.Generator().manual_seed(len(sizes))
    counts = BigramCounts(V, eot=EOT)
    for k, size in enumerate(sizes):
        tokens = (torch.rand(size, generator=generator) ** 4 * V).long()
        tokens[-1:] = V - 1
        dtype = torch.uint16 if k % 2 else torch.int64
        path = folder / "shards" / f"{k}.npy"
        numpy.save(path, tokens.to(dtype).numpy())
        counts.update(tokens)
    return counts


def ended_well(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.status == 0 and outcome.raised == "" for outcome in outcomes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@check
def equal_to_one_process(folder: Path) -> None:
    expected = write_shards(folder)
    alone = count_shards([folder / "shards"], folder / "alone", eot=EOT)
    assert alone == CountResult(
        folder / "alone" / "counts.safetensors", V, EOT, expected.num_pairs, expected.num_distinct, 1, 0
    )
    assert BigramCounts.load(alone.path) == expected
    for size in (2, 4):
        outcomes = run_ranks(folder, size, f"by {size}", eot=EOT)
        assert ended_well(outcomes), outcomes
        index = folder / f"by {size}" / "counts.safetensors.index.json"
        names = [f"counts-{k:05}-of-{size:05}.safetensors" for k in range(1, size + 1)]
        assert sorted(contents(index.parent)) == [*names, index.name]
        for rank, outcome in enumerate(outcomes):
            result = CountResult(index, V, EOT, expected.num_pairs, expected.num_distinct, size, rank)
            assert outcome.returned == repr(result)
            assert (outcome.saw > 0) == (rank == 0)
        counts = BigramCounts.load(index)
        assert counts == expected
        sizes = [part.num_distinct for part in parts.read_index(index)[0]]
        assert max(sizes) <= expected.num_distinct / size + V


@check
def parts_replace_other_parts(folder: Path) -> None:
    """Of the same names, and of others; those that an index names stay whole until the next one is written."""
    expected = write_shards(folder)
    out, seen = folder / "out", []
    for size in (2, 2, 4):
        outcomes = run_ranks(folder, size, eot=EOT)
        assert ended_well(outcomes), outcomes
        assert BigramCounts.load(out) == expected
        seen.append(sorted(path.name for path in out.glob("*[0-9].*safetensors")))
    assert set(seen[0]).isdisjoint(seen[1])
    assert len(seen[2]) == 4


@check
def in_a_process_group_that_exists(folder: Path) -> None:
    """Twice, and the group lives on."""
    expected = write_shards(folder)

    def count(paths: Sequence[Path], output: Path, **options: Any) -> list[CountResult]:
        dist.init_process_group("gloo")
        results = [count_shards(paths, output.with_name(f"out {k}"), **options) for k in range(2)]
        num_ranks = torch.ones(1)
        dist.all_reduce(num_ranks)
        assert num_ranks == 2
        dist.destroy_process_group()
        return results

    outcomes = run_ranks(folder, 2, count=count, eot=EOT)
    assert ended_well(outcomes), outcomes
    for k in range(2):
        assert BigramCounts.load(folder / f"out {k}") == expected


@check
def counts_of_more_than_32_bits(folder: Path) -> None:
    """Of one rank; beside which the other's have to be sent in 64 bits, too."""
    tensors = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 1], dtype=torch.int32)

    def count(_paths: Any, _output: Any, **_options: Any) -> list[Any]:
        with join() as ranks:
            counts = BigramCounts._of_parts(3, None, *tensors, torch.tensor([2**40, 5, 7]) ** (1 - ranks.rank))
            rows = distributed_counts._summed(ranks, counts, progress=lambda _fraction: None)
            rows = distributed_counts._balanced(ranks, rows, 3)
            return [rows.begin, *(tensor.tolist() for tensor in rows.tensors().values())]

    outcomes = run_ranks(folder, 2, count=count)
    expected = [[0, [0, 2], [0, 2], [2**40 + 1, 6]], [1, [0, 0, 1], [1], [8]]]
    assert [outcome.returned for outcome in outcomes] == list(map(repr, expected)), outcomes


@check
def few_shards(folder: Path) -> None:
    """More ranks than pieces; tokens that all are in one row; and no pair at all."""
    for k, sizes in enumerate([(2,), (1, 0), (3000, 0)]):
        own_folder = folder / str(k)
        own_folder.mkdir()
        expected = write_shards(own_folder, sizes)
        outcomes = run_ranks(own_folder, 3, vocab_size=V, eot=EOT)
        assert ended_well(outcomes), outcomes
        assert BigramCounts.load(own_folder / "out" / "counts.safetensors.index.json") == expected


def together(folder: Path, size: int, then: Callable[[int, int], None] = lambda _rank, _k: None) -> Any:
    """No rank counts its second piece before all have their first."""

    def before_update(rank: int, k: int) -> None:
        (folder / f"began-{rank}").touch()
        while k == 1 and len(list(folder.glob("began-*"))) < size:
            time.sleep(0.01)
        then(rank, k)

    return before_update


def die(folder: Path, victim: int, at: int = 1) -> Callable[[int, int], None]:
    """Kills this rank before it counts its second piece; the others wait for that before they go on."""

    def before_update(rank: int, k: int) -> None:
        if rank == victim and k == at:
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while rank != victim and k > 0 and not (folder / "killed").exists():
            time.sleep(0.01)

    return before_update


@check
def a_killed_rank_ends_all_by_its_name(folder: Path) -> None:
    write_shards(folder)
    for victim in (1, 0):
        outcomes = run_ranks(folder, 3, f"without {victim}", before_update=die(folder, victim))
        (folder / "killed").unlink()
        assert outcomes.pop(victim).status == -signal.SIGKILL
        for outcome in outcomes:
            assert outcome.status == 1
            assert f"RankError: rank {victim}" in outcome.raised, outcome
            assert "died" in outcome.raised, outcome
        assert not (folder / f"without {victim}" / "counts.safetensors.index.json").exists()


@check
def a_rank_that_does_not_answer_ends_all(folder: Path) -> None:
    write_shards(folder)
    stopped = folder / "stopped"

    def before_update(rank: int, k: int) -> None:
        if rank == 1 and k == 1:
            stopped.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        while rank != 1 and k > 0 and not stopped.exists():
            time.sleep(0.01)

    def kill_at_last() -> None:
        """Rank 1, when the others have ended."""
        while len(list(folder.glob("outcome-*.json"))) < 2:
            time.sleep(0.01)
        os.kill(int(stopped.read_text()), signal.SIGKILL)

    outcomes = run_ranks(folder, 3, before_update=before_update, timeout=timedelta(seconds=1), beside=kill_at_last)
    assert outcomes.pop(1).status == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.status == 1
        assert re.match("RankError: .*rank 1.* died, or does not answer", outcome.raised), outcome


@check
def a_second_start_counts_what_is_not_on_disk(folder: Path) -> None:
    """Of another number of ranks, too; the files are those of a run that nothing ended."""
    expected = write_shards(folder)
    run_ranks(folder, 4, "whole", eot=EOT)
    for size in (1, 4):
        out = folder / f"out {size}"
        outcomes = run_ranks(folder, 3, out.name, eot=EOT, save_interval=0.0, before_update=die(folder, 1))
        (folder / "killed").unlink()
        assert {path.name for path in out.iterdir()} == {"counts.partial"}

        def count_updates(rank: int, k: int) -> None:
            with open(folder / "updates", "a") as file:
                file.write(".")

        outcomes = run_ranks(folder, size, out.name, eot=EOT, before_update=count_updates)
        assert ended_well(outcomes), outcomes
        (line,) = outcomes[0].told
        assert [outcome.told for outcome in outcomes[1:]] == [[]] * (size - 1)
        taken, of, total, *_words = line.split()
        assert of == "of"
        updates = folder / "updates"
        assert 0 < int(taken) < int(total)
        assert len(updates.read_text()) == int(total) - int(taken)
        updates.unlink()
        assert BigramCounts.load(out) == expected
        if size == 4:
            assert contents(out) == contents(folder / "whole")
        assert not (out / "counts.partial").exists()


@check
def a_rank_killed_in_the_exchange(folder: Path) -> None:
    """What the others have counted is on disk then."""
    expected = write_shards(folder)
    balance = distributed_counts._balanced

    def kill_rank_1(ranks: Ranks, *args: Any) -> Any:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return balance(ranks, *args)

    distributed_counts._balanced = kill_rank_1  # type: ignore[assignment]
    outcomes = run_ranks(folder, 2, eot=EOT, before_update=together(folder, 2))
    distributed_counts._balanced = balance
    assert outcomes[0].raised.startswith("RankError: rank 1 died"), outcomes
    outcomes = run_ranks(folder, 2, eot=EOT)
    assert ended_well(outcomes), outcomes
    assert re.match(r"[1-9]\d* of 34 pieces of shards taken from", outcomes[0].told[0])
    assert BigramCounts.load(folder / "out") == expected


@check
def an_error_ends_all(folder: Path) -> None:
    expected = write_shards(folder)
    path = folder / "shards" / "2.npy"
    tokens = numpy.load(path)
    damaged = tokens.copy()
    damaged[1234] = V
    numpy.save(path, damaged)
    outcomes = run_ranks(folder, 3, vocab_size=V, eot=EOT)
    reason = f"IndexError: {path}: tokens holds {V} at position 1234, expected 0 <= token < {V}"
    raised = [outcome.raised for outcome in outcomes]
    (rank,) = [rank for rank in range(3) if raised[rank] == reason]
    assert raised.count(f"RankError: rank {rank}: {reason}") == 2, raised
    numpy.save(path, tokens)
    outcomes = run_ranks(folder, 2, vocab_size=V, eot=EOT)
    assert ended_well(outcomes), outcomes
    assert "taken from" in outcomes[0].told[0]
    assert BigramCounts.load(folder / "out" / "counts.safetensors.index.json") == expected


@check
def interrupts(folder: Path) -> None:
    """As torchrun has it: each rank gets two, and the second finds it saving."""
    expected = write_shards(folder)
    write_tensors = storage.write_tensors

    def write_while_interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write_tensors(*args)

    def interrupt(rank: int, k: int) -> None:
        if k == 1:
            signal.raise_signal(signal.SIGINT)

    storage.write_tensors = write_while_interrupted  # type: ignore[assignment]
    outcomes = run_ranks(folder, 2, eot=EOT, before_update=together(folder, 2, then=interrupt))
    storage.write_tensors = write_tensors
    for outcome in outcomes:
        assert outcome.raised.startswith("KeyboardInterrupt") or outcome.raised.endswith("was interrupted"), outcome
    assert len(list((folder / "out" / "counts.partial").iterdir())) == 2
    outcomes = run_ranks(folder, 2, eot=EOT)
    assert ended_well(outcomes), outcomes
    assert BigramCounts.load(folder / "out") == expected


def main(folder: Path) -> None:
    """Runs the checks, and writes what went wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this
    distributed_counts._PIECE_BYTES = 1000  # several pieces of a shard
    distributed_counts._BLOCK_PAIRS = 500  # several blocks of an owner
    problems = {}
    for name, function in CHECKS.items():
        own_folder = folder / name
        own_folder.mkdir()
        problems[name] = ""
        try:
            function(own_folder)
        except Exception:
            problems[name] = traceback.format_exc()
        (folder / "problems.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
