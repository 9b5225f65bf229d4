"""Steps of fit on a GPU as CUDA graphs: many steps a launch, without a word between host and device in between.

A graph repeats kernels at fixed addresses. So the host draws the batches of all its steps beforehand, as it does for a
table on the CPU, and counts them; the losses stay on the device until the last step is done. Only kernels run: the
gradient is the loss kernel's, and autograd has no part in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bigramx import ops

NOT_TAKEN = -1.0  # in place of a loss
MOST_STEPS = 1 << 7  # of a graph
_MOST_TOKENS = 1 << 20  # in the batches of a graph
_MAX_SECONDS = 0.05  # for which a graph may run, as Ctrl-C waits for its end


def runs_graphs(weight: Tensor) -> bool:
    """Whether the kernels of this table can be captured."""
    return ops.HAS_CUDA_KERNELS and weight.is_cuda


class _Graphs:
    """Captures graphs, which share memory: one runs at a time, and leaves nothing there."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], object]:
        """What replays ``run``, which runs on the host alone here.

        Raises:
            RuntimeError: It cannot be captured, or needs more memory than there is.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(self._stream),  # left in any case, where torch.cuda.graph may stay
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


class GraphSteps:
    """Steps of AdamW, a power of two of them at a time.

    Args:
        weight: (V, V) float32 or float64.
        exp_avg: (V, V), as exp_avg_sq: AdamW's moments.
        options: lr, beta1, beta2, eps, weight_decay.
        padding_idx: The row without gradient, or ops.NO_PADDING.
        batch_size: B.
        block_size: T.
    """

    def __init__(
        self,
        weight: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        options: tuple[float, ...],
        padding_idx: int,
        batch_size: int,
        block_size: int,
    ) -> None:
        self._tensors = weight.detach(), exp_avg, exp_avg_sq  # alive as long as the graphs have their addresses
        self._options, self._padding_idx, self._batch_size = options, padding_idx, batch_size
        self._most = _power_of_two(min(MOST_STEPS, _MOST_TOKENS // (batch_size * block_size)))
        self._usual = 1  # steps that end in time
        device = weight.device
        shape = self._most * batch_size, block_size
        self._pairs = [torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2)]  # idx, targets
        self._counts = torch.empty(self._most, dtype=torch.float64, device=device)
        self._losses = torch.empty(self._most, dtype=weight.dtype, device=device)
        self._graphs = _Graphs(device)
        # One step is no graph: it loads the kernels, which a capture may not, and those of large tables take long.
        self._replays: dict[int, Callable[[], object]] = {1: partial(self._run, 1)}
        self._begin = 0.0

    def fits(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *others: object) -> bool:
        """Whether these are steps of the same memory with the same numbers."""
        given = zip(self._tensors, (weight, exp_avg, exp_avg_sq), strict=True)
        are_same = all((old.data_ptr(), old.dtype) == (new.data_ptr(), new.dtype) for old, new in given)
        return are_same and others == (self._options, self._padding_idx)

    def prepare(self, most: int) -> int:
        """How many steps, ``most`` at most, ``launch`` is to take; captures them.

        Raises:
            RuntimeError: They cannot be captured.
        """
        num_steps = _power_of_two(min(most, self._usual))
        if num_steps not in self._replays:
            self._replays[num_steps] = self._graphs.capture(partial(self._run, num_steps))
        self._losses[:num_steps].fill_(NOT_TAKEN)
        self._begin = time.monotonic()
        return num_steps

    def launch(self, pairs: tuple[Tensor, Tensor], count: int) -> None:
        """Takes prepared steps, on batches (num_steps B, T) each of idx and targets; waits for nothing.

        Args:
            pairs: On the device.
            count: How many steps were taken before.
        """
        num_steps = len(pairs[0]) // self._batch_size
        for kept, given in zip(self._pairs, pairs, strict=True):
            kept[: len(given)].copy_(given)
        counts = self._counts[:num_steps]
        torch.arange(count + 1, count + num_steps + 1, dtype=counts.dtype, device=counts.device, out=counts)
        self._replays[num_steps]()
        torch.autograd.graph.increment_version(self._tensors)

    def losses(self, num_steps: int) -> list[float]:
        """Those of the steps, NOT_TAKEN of one that was not taken; waits for their end."""
        losses: list[float] = self._losses[:num_steps].tolist()
        seconds = time.monotonic() - self._begin
        if seconds > _MAX_SECONDS:
            self._usual = max(1, num_steps // 2)
        elif num_steps == self._usual and 2 * seconds < _MAX_SECONDS:
            self._usual = min(2 * self._usual, self._most)
        return losses

    def _run(self, num_steps: int) -> None:
        """What a graph repeats. A loss is written once its step is taken."""
        weight, exp_avg, exp_avg_sq = self._tensors
        idx, targets = (pairs.split(self._batch_size) for pairs in self._pairs)
        for k in range(num_steps):
            loss, _no_logits, _all_rows, grad = ops.embedding_cross_entropy_forward(
                idx[k], weight, targets[k], padding_idx=self._padding_idx, compute_grad=True
            )
            ops.adamw_(weight, grad, exp_avg, exp_avg_sq, None, self._counts[k], *self._options, False)
            self._losses[k].copy_(loss)


def _power_of_two(number: int) -> int:
    """The largest that is not larger; 1 for less."""
    return 1 << max(0, number.bit_length() - 1)
