"""The processes that share a job: what they agree on, what each does next, and what ends them all.

A process waits for others in Python, so that signals are handled, and looks meanwhile for what another has raised: the
first error, or the loss of a connection, is written into the process group's store, and all ranks raise it. None hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_FAILED, _ENDED = "failed", "ended"
_CHECK_INTERVAL = 0.25  # seconds between two looks into the store
_LAST_WORDS = 5.0  # seconds in which the others read why the job ended
_PROBE_TAG = 2**16 + 1


class RankError(RuntimeError):
    """What ended the job on another rank, by its name."""


class Ranks:
    """The process alone, or the ranks of a process group whose tensors are on the CPU.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        on_wait: Called again and again while this rank waits for others.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, store: Store | None = None) -> None:
        self._group, self._store = group, store
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.on_wait: Callable[[], object] = lambda: None
        self._claims: dict[str, Iterator[int]] = {}
        self._totals: dict[str, int] = {}
        self._next_check = 0.0
        self._lost_store: RankError | None = None

    # ------------------------------------------------------------------------------------------ without waiting

    def claim(self, name: str) -> int:
        """0, 1, 2, ... of this name, each to one rank: which piece of work it does next."""
        if self._store is None:
            return next(self._claims.setdefault(name, itertools.count()))
        with self._reaching_store():
            return int(self._store.add(f"claim/{name}", 1)) - 1

    def add(self, name: str, amount: int) -> int:
        """Adds to a total of this name, which all ranks have in common, and returns it."""
        if self._store is None:
            self._totals[name] = self._totals.get(name, 0) + amount
            return self._totals[name]
        with self._reaching_store():
            return int(self._store.add(f"total/{name}", amount))

    def check(self) -> None:
        """Raises what another rank has raised; looks a few times a second.

        Raises:
            RankError: Another rank has failed.
        """
        if self._store is not None and (now := time.monotonic()) >= self._next_check:
            self._next_check = now + _CHECK_INTERVAL
            with self._reaching_store():
                if self._store.check([_FAILED]):
                    raise RankError(json.loads(self._store.get(_FAILED))["reason"])

    # ------------------------------------------------------------------------------------------ all ranks together

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor of the same shape."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over the ranks of a tensor of the same shape."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        total = tensor.clone()
        if self._group is not None:
            self._wait(dist.all_reduce(total, operation, group=self._group, async_op=True))
        return total

    def all_to_all(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Sends one 1-D tensor of the same dtype to each rank; returns those received, whose lengths are known."""
        sent = torch.cat(list(tensors))
        if self._group is None:
            return [sent]
        received = sent.new_empty(sum(lengths))
        self._wait(
            dist.all_to_all_single(
                received, sent, list(lengths), [len(each) for each in tensors], group=self._group, async_op=True
            )
        )
        return list(received.split(list(lengths)))

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order. Each hears of each, so that it knows whose connection is lost."""
        content = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8)
        lengths = self.all_to_all([torch.tensor([len(content)], device="cpu")] * self.size, [1] * self.size)
        contents = self.all_to_all([content] * self.size, [int(length) for length in lengths])
        return [bytes(each.numpy()).decode()[:-1] for each in contents]

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None
        num_waits = self.add(f"waits/{self.rank}", 1)
        pause = 1e-4
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            self.check()
            self.on_wait()
        try:
            work.wait()
        except RuntimeError as error:  # what gloo raises
            self._raise_lost(num_waits, error)

    # ------------------------------------------------------------------------------------------ the end of a job

    def _raise_lost(self, num_waits: int, error: RuntimeError) -> NoReturn:
        """Names the ranks that are gone, unless the job has ended for another reason, which then is theirs."""
        self._next_check = 0.0
        self.check()
        late = [rank for rank in range(self.size) if self.add(f"waits/{rank}", 0) < num_waits]
        cut_off = [rank for rank in range(self.size) if rank != self.rank and not self._can_send(rank)]
        # Who is late may still count; where time was over, gloo has cut off all.
        lost = [rank for rank in cut_off if rank in late] or cut_off
        names = " and ".join(f"rank {rank}" for rank in lost) or "a rank"
        what = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]  # without the place in gloo, and its advice
        self._post(f"{names} died, or does not answer: {what}", lost)
        self._next_check = 0.0
        self.check()
        raise AssertionError("unreachable")

    def _can_send(self, rank: int) -> bool:
        """Whether a message can be sent; none is read, but then the group is of no use any more."""
        try:
            dist.isend(torch.zeros(1, device="cpu"), group=self._group, group_dst=rank, tag=_PROBE_TAG)
        except RuntimeError:
            return False
        return True

    def _post(self, reason: str, lost: Sequence[int] = ()) -> list[int]:
        """Makes this the reason for which the job ends, if there is none yet; returns the ranks that are lost."""
        assert self._store is not None
        with self._reaching_store():
            posted = self._store.compare_set(_FAILED, "", json.dumps({"reason": reason, "lost": lost}))
            return list(json.loads(posted)["lost"])

    def _fail(self, error: BaseException) -> None:
        """Lets the other ranks raise what this one raises."""
        with contextlib.suppress(RankError):  # the store is gone
            is_interrupt = isinstance(error, KeyboardInterrupt)
            what = " was interrupted" if is_interrupt else f": {type(error).__name__}: {error}"
            lost = self._post(f"rank {self.rank}{what}")
            self._leave(set(range(self.size)).difference(lost))

    def _leave(self, alive: Iterable[int]) -> None:
        """The last look into the store, which may be within rank 0: that waits until the others have had theirs."""
        assert self._store is not None
        with self._reaching_store():
            self._store.set(f"{_ENDED}/{self.rank}", "")
            latest = time.monotonic() + _LAST_WORDS
            while self.rank == 0 and time.monotonic() < latest:
                if self._store.check([f"{_ENDED}/{rank}" for rank in alive]):
                    break
                time.sleep(0.01)

    @contextlib.contextmanager
    def _reaching_store(self) -> Iterator[None]:
        if self._lost_store is not None:
            raise self._lost_store
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            reason = f"rank 0, or what started the ranks, died: the store does not answer ({error})"
            self._lost_store = RankError(reason)
            raise self._lost_store from None


@contextlib.contextmanager
def join(timeout: timedelta | None = None) -> Iterator[Ranks]:
    """The ranks of this process: itself, or those of the process group that exists or that the environment describes.

    torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from which a group with the backend gloo is made, and
    ended with the job. An error that leaves the block is raised on all ranks; none leaves it before all have ended it.

    Args:
        timeout: How long a rank waits for the others; None: PyTorch's default, 30 minutes.
    """
    is_described = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not dist.is_available() or not (dist.is_initialized() or is_described):
        yield Ranks()
        return
    is_own = not dist.is_initialized()
    if is_own:
        _init_process_group(timeout)
    is_gloo = dist.get_backend() == "gloo"
    group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo", timeout=timeout)
    ranks = Ranks(group, _store_of(group))
    try:
        yield ranks
        ranks.gather("")
        ranks._leave(range(ranks.size))
    except BaseException as error:
        ranks._fail(error)
        raise
    finally:
        ranks._group = ranks._store = None  # their threads end with them, and not while Python ends
        if is_own:
            dist.destroy_process_group()
        elif not is_gloo:
            dist.destroy_process_group(group)


def _init_process_group(timeout: timedelta | None) -> None:
    """As the environment describes it; torchrun may keep its store when it starts the ranks again."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"bigramx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _store_of(group: dist.ProcessGroup | None) -> Store:
    """The group's store, under a prefix that no other job has."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # no public function gives it

    prefix = [secrets.token_hex(8)]
    dist.broadcast_object_list(prefix, group=group, group_src=0)
    return PrefixStore(f"bigramx/{prefix[0]}", _get_default_store())
