"""Ranks of a process group on this machine, as forks of a process: they need not import PyTorch again."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

LOCALHOST = "127.0.0.1"


def start(size: int, work: Callable[[int], object]) -> list[int]:
    """Starts ranks, each of which does the work, given its number, and exits; returns their processes' ids.

    They have in their environment what torchrun sets there. This process must have no other threads: a fork has none.
    """
    with socket.create_server((LOCALHOST, 0)) as server:
        port = server.getsockname()[1]
    ids = []
    for rank in range(size):
        if (process := os.fork()) == 0:
            group = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": LOCALHOST, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in group.items()}
            _work_and_exit(rank, work)
        ids.append(process)
    return ids


def _work_and_exit(rank: int, work: Callable[[int], object]) -> None:
    """Without the end of Python, in which a thread of Gloo may abort the process (pytorch/pytorch#179291)."""
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(ids: list[int]) -> list[int]:
    """The exit statuses of processes, minus the signals that ended them."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ids]
