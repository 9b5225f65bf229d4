"""The loss, generate and multinomial on DTensors: each rank works on the rows of the table that it holds.

Over each dimension of its mesh a table (R, C) is replicated or sharded by rows, ``Shard(0)``. So is a batch; over the
dimensions that shard the table it becomes whole. A rank takes the pairs whose row it holds, and one sum over the ranks
joins their losses, what a mean divides by, and what went wrong: all ranks raise what one of them has to. No rank holds
more of the table, or of its gradient, than its rows. Tensors placed otherwise are placed so first.

A plain tensor beside a DTensor must be the same on every rank, or all raise. A rank's own part of a batch is
``DTensor.from_local(part, mesh, [Shard(0)])``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from bigramx import evaluation, functional, reference
from bigramx.functional import Reduction, Sampler

_Groups = list[dist.ProcessGroup]
_16_BITS = (torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------------ over the ranks


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of each group in turn; the gradient of a rank's part is that of the sum."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor, groups: _Groups) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _InCommon(torch.autograd.Function):
    """A tensor that the ranks of each group have in common; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: _Groups) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(grads[0], ctx.groups), None


class _Local(torch.autograd.Function):
    """``_local``; the gradient is placed as the tensor, and differentiable, which to_local's is not in torch 2.11."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, shard_dims: Sequence[int]) -> Tensor:
        ctx.shard_dims, ctx.mesh, ctx.shape = shard_dims, tensor.device_mesh, tensor.shape
        ctx.placements = [Replicate() if kind.is_partial() else kind for kind in tensor.placements]
        return _local(tensor, shard_dims)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = _place(grads[0], ctx.mesh, ctx.shard_dims, ctx.shape)
        return grad.redistribute(placements=ctx.placements), None


def _sum_over_ranks(part: Tensor, groups: _Groups) -> Tensor:
    total: Tensor = _SumOverRanks.apply(part, groups)  # type: ignore[no-untyped-call]
    return total


def _in_common(tensor: Tensor, groups: _Groups) -> Tensor:
    common: Tensor = _InCommon.apply(tensor, groups)  # type: ignore[no-untyped-call]
    return common


def _differentiable_local(tensor: Tensor, shard_dims: Sequence[int]) -> Tensor:
    local: Tensor = _Local.apply(tensor, shard_dims)  # type: ignore[no-untyped-call]
    return local


def _groups(mesh: DeviceMesh, dims: Iterable[int]) -> _Groups:
    return [mesh.get_group(dim) for dim in dims]


def _sum_and_agree(
    part: Tensor, mesh: DeviceMesh, dims: Sequence[int], alike: Sequence[Tensor] = (), error: Exception | None = None
) -> Tensor:
    """The sum of ``part``, (n) float64, over the ranks along these dimensions of the mesh.

    Raises:
        Exception: ``error``; on the other ranks one that tells of it.
        ValueError: The tensors ``alike`` are not the same on all ranks of the mesh.
    """
    fingerprint = _fingerprint(alike, part.device)
    failed = torch.tensor([isinstance(error, IndexError), error is not None], dtype=torch.float64, device=part.device)
    checks = torch.cat([failed, torch.stack([fingerprint, fingerprint**2])])
    joined = _sum_over_ranks(torch.cat([part, checks]), _groups(mesh, dims))
    total, checks = joined[: len(part)], joined[len(part) :]
    other_dims = [dim for dim in range(mesh.ndim) if dim not in dims] if alike else []
    checks = _sum_over_ranks(checks.detach(), _groups(mesh, other_dims))
    index_errors, errors, fingerprints, squares = checks.unbind()
    if error is not None:
        raise error
    num_ranks = prod(mesh.size(dim) for dim in (*dims, *other_dims))
    # Equal, by Cauchy and Schwarz, only if all fingerprints are; whole numbers, which float64 holds exactly.
    are_alike = fingerprints**2 == num_ranks * squares
    if not part.is_cpu:  # nothing waits for the host
        torch._assert_async(are_alike, "expected plain tensors beside a DTensor to be the same on every rank")
        return total
    if index_errors > 0:
        raise IndexError("an index or a target is out of range on another rank")
    if errors > 0:
        raise RuntimeError("another rank raised an error, which says why")
    if not are_alike:
        raise ValueError(
            "expected plain tensors beside a DTensor, and the states of generators, to be the same on every rank; a "
            "rank's own part of a batch is DTensor.from_local(part, mesh, [Shard(0)])"
        )
    return total


def _agree(mesh: DeviceMesh, alike: Sequence[Tensor] = (), error: Exception | None = None) -> None:
    """Raises as ``_sum_and_agree``."""
    nothing = torch.empty(0, dtype=torch.float64, device=mesh.device_type)
    _sum_and_agree(nothing, mesh, range(mesh.ndim), alike, error)


def _fingerprint(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """A number below 2^16 that is the same on all ranks if the tensors are, and hardly ever otherwise."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).to(device)
        bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
        total = total * 31 + len(bits) + (bits * torch.arange(1, 2 * len(bits), 2, device=device)).sum()
    return total.remainder(65521).double()


def _attempt(compute: Callable[[], Tensor], otherwise: Tensor) -> tuple[Tensor, Exception | None]:
    """What a rank computes; or its error, of which the others are to learn before it raises."""
    try:
        return compute(), None
    except Exception as error:
        return otherwise, error


# ---------------------------------------------------------------------------------------------------------- placements


def _shard_dims(tensor: DTensor) -> list[int]:
    """The dimensions of the mesh over which the first dimension of the tensor is sharded."""
    return [dim for dim, kind in enumerate(tensor.placements) if type(kind) is Shard and kind.dim == 0]


def _placements(mesh: DeviceMesh, shard_dims: Sequence[int]) -> list[Placement]:
    return [Shard(0) if dim in shard_dims else Replicate() for dim in range(mesh.ndim)]


def _local(tensor: Tensor, shard_dims: Sequence[int]) -> Tensor:
    """The rank's part of the tensor when that is sharded over these dimensions of the mesh alone."""
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.redistribute(placements=_placements(tensor.device_mesh, shard_dims)).to_local()
    return local


def _place(local: Tensor, mesh: DeviceMesh, shard_dims: Sequence[int] = (), shape: Sequence[int] = ()) -> DTensor:
    """The DTensor of which the ranks have these parts; sharded over no dimension of the mesh, each has all of it."""
    shape = torch.Size(shape) if shard_dims else local.shape
    stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    placed: DTensor = DTensor.from_local(
        local, mesh, _placements(mesh, shard_dims), run_check=False, shape=shape, stride=stride
    )
    return placed


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a Tensor, got {type(tensor).__name__}")
    if tensor.device.type != mesh.device_type:
        raise RuntimeError(
            f"expected all tensors to be on the same device, got {tensor.device} and a mesh on {mesh.device_type}"
        )
    if not isinstance(tensor, DTensor):
        return _place(tensor, mesh)
    if tensor.device_mesh != mesh:
        raise RuntimeError(f"expected all DTensors to be on the same mesh, got {tensor.device_mesh} and {mesh}")
    return tensor


def _plain(*tensors: Tensor | None) -> list[Tensor]:
    """Those that each rank has for itself."""
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor)]


class _Table:
    """The rows of a table (R, C) that this rank holds, from ``start`` to before ``stop``."""

    def __init__(self, weight: DTensor) -> None:
        self.mesh: DeviceMesh = weight.device_mesh
        self.row_dims = _shard_dims(weight)
        self.rows = _differentiable_local(weight, self.row_dims)
        self.num_rows = weight.size(0)
        self.start, self.stop = 0, self.num_rows
        for dim in self.row_dims:  # as Shard divides them
            chunk = -(-(self.stop - self.start) // self.mesh.size(dim))
            self.start = min(self.start + chunk * self.mesh.get_local_rank(dim), self.stop)
            self.stop = min(self.start + chunk, self.stop)

    def check(self, idx: Tensor) -> Tensor:
        """Idx; raises if a row is out of range."""
        is_valid = ((idx >= 0) & (idx < self.num_rows)).all()
        if not idx.is_cpu:
            torch._assert_async(is_valid, f"expected 0 <= idx < {self.num_rows}")
        elif not is_valid:
            raise IndexError(f"expected 0 <= idx < {self.num_rows}, got {idx.min().item()} to {idx.max().item()}")
        return idx

    def own(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Where in idx, (n), this rank's rows are, and which they are, counted from ``start``."""
        if not self.row_dims:
            return torch.arange(len(idx), device=idx.device), idx
        positions = ((idx >= self.start) & (idx < self.stop)).nonzero().squeeze(1)
        return positions, idx[positions] - self.start

    def own_padding(self, padding_idx: int | None) -> int | None:
        """Which of this rank's rows gets no gradient."""
        if padding_idx is None:
            return None
        if not -self.num_rows <= padding_idx < self.num_rows:
            raise AssertionError(
                f"Padding_idx must be within num_embeddings: expected -{self.num_rows} <= padding_idx < "
                f"{self.num_rows}, got {padding_idx}"
            )
        row = padding_idx % self.num_rows - self.start
        return row if 0 <= row < len(self.rows) else None

    def join(self, positions: Tensor, found: Tensor, length: int) -> Tensor:
        """What the ranks found for their rows in idx, (length), which they have in common."""
        own = found.new_zeros(length, *found.shape[1:]).index_put((positions,), found)
        return _sum_over_ranks(own, _groups(self.mesh, self.row_dims))

    def lookup(self, idx: Tensor, rows: Tensor, padding_row: int | None = None) -> Tensor:
        """The logits of idx, (n): (n, C)."""
        positions, own = self.own(idx)
        found = F.embedding(own, rows, padding_row) if len(own) > 0 else rows[:0]  # as in losses
        return self.join(positions, found, len(idx))


# ------------------------------------------------------------------------------------------------------------ the loss


@dataclass
class _Criterion:
    """The options of the loss."""

    class_weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    z_loss: float

    def losses(self, idx: Tensor, rows: Tensor, targets: Tensor, padding_row: int | None, **changed: Any) -> Tensor:
        """The loss of some pairs, or what it were with other options."""
        options = {**vars(self), **changed}
        if len(idx) == 0:  # an embedding of no rows cannot be differentiated twice
            return rows[:0].sum(dim=1 if options["reduction"] == "none" else None)
        return functional.embedding_cross_entropy(idx, rows, targets, padding_idx=padding_row, **options)

    def sums(self, idx: Tensor, rows: Tensor, targets: Tensor, padding_row: int | None) -> Tensor:
        """Of some pairs, (4) float64: the losses; the z-losses apart, where these have another mean; both divisors."""
        has_16_bits, class_weight = rows.dtype in _16_BITS, self.class_weight
        if class_weight is not None and has_16_bits:
            class_weight = class_weight.float()
        losses_of = partial(self.losses, idx, rows, targets, padding_row, reduction="sum", class_weight=class_weight)
        # Autocast gives the sums of 16-bit rows in float32.
        with torch.autocast(rows.device.type, rows.dtype if has_16_bits else None, enabled=has_16_bits):
            if class_weight is not None and self.z_loss > 0 and self.reduction == "mean":
                losses = losses_of(z_loss=0.0)
                z_losses = losses_of(class_weight=torch.zeros_like(class_weight))
            else:
                losses = losses_of()
                z_losses = torch.zeros_like(losses)
        is_counted = weights = torch.ones_like(idx, dtype=torch.bool)
        if not targets.is_floating_point():
            targets = targets.long()  # as uint8 -100 is 156
            is_counted = weights = targets != self.ignore_index
            if class_weight is not None:
                weights = is_counted * class_weight[torch.where(is_counted, targets, 0)]
        return torch.stack([losses.double(), z_losses.double(), weights.double().sum(), is_counted.double().sum()])

    def loss(self, sums: Tensor) -> Tensor:
        """The loss of all pairs."""
        losses, z_losses, weight, count = sums.unbind()
        if self.reduction == "sum":
            return losses + z_losses
        # The mean over no pairs is NaN, and its gradient zero.
        inverse_weight, inverse_count = (torch.where(count > 0, 1 / divisor, 0.0) for divisor in (weight, count))
        return losses * inverse_weight + z_losses * inverse_count + torch.where(count > 0, 0.0, float("nan"))


class _Call:
    """What both forms of the loss begin with. All that is wrong with more than the tokens raises on every rank."""

    def __init__(
        self,
        idx: Tensor,
        weight: DTensor,
        targets: Tensor,
        *,
        class_weight: Tensor | None = None,
        padding_idx: int | None = None,
        sparse: bool = False,
        **options: Any,
    ) -> None:
        if sparse:
            raise NotImplementedError("sparse gradients are not implemented for a DTensor as weight, nor in PyTorch")
        self.alike = _plain(idx, targets, class_weight)
        self.table = table = _Table(weight)
        self.idx, self.targets = _as_dtensor(idx, table.mesh), _as_dtensor(targets, table.mesh)
        is_soft = targets.is_floating_point() and targets.dim() == idx.dim() + 1
        expected = (*idx.shape, *([weight.size(1)] if is_soft else []))
        if targets.shape != expected:
            raise ValueError(f"expected targets to have the shape {expected}, got {tuple(targets.shape)}")
        self.padding_row = table.own_padding(padding_idx)
        class_weight = class_weight.full_tensor() if isinstance(class_weight, DTensor) else class_weight
        self.criterion = _Criterion(class_weight, **options)
        self.shard_dims = [dim for dim in _shard_dims(self.idx) if dim not in table.row_dims]
        nothing = torch.empty(0, dtype=idx.dtype, device=table.rows.device)
        no_targets = torch.empty(0, *expected[idx.dim() :], dtype=targets.dtype, device=table.rows.device)
        with torch.no_grad():
            functional.embedding_cross_entropy(nothing, table.rows, no_targets, **vars(self.criterion))

    def rows(self) -> Tensor:
        """Those of this rank, as the ranks with other pairs have them too."""
        return _in_common(self.table.rows, _groups(self.table.mesh, self.shard_dims))


def embedding_cross_entropy(idx: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """See functional.embedding_cross_entropy: the loss of the joined batch.

    Returns:
        A DTensor, the same on every rank; with ``reduction="none"`` placed as idx. The gradient is placed as weight.

    Raises:
        NotImplementedError: ``sparse`` is True, for which a DTensor has no gradient, in PyTorch neither.
        ValueError: A plain tensor is not the same on every rank.
        RuntimeError: The DTensors are on different meshes; or ``weight`` is none, where PyTorch raises.
    """
    if not isinstance(weight, DTensor):
        return reference.embedding_cross_entropy(idx, weight, targets, **options)
    call = _Call(idx, weight, targets, **options)
    table, mesh, criterion, shard_dims = call.table, call.table.mesh, call.criterion, call.shard_dims
    local_idx, local_targets = _local(call.idx, shard_dims), _local(call.targets, shard_dims)
    flat_idx = local_idx.reshape(-1)
    flat_targets = local_targets.reshape(*flat_idx.shape, *local_targets.shape[local_idx.dim() :])
    positions, own = table.own(flat_idx)
    rows = call.rows()

    def compute() -> Tensor:
        table.check(flat_idx)
        of_pairs = criterion.losses if criterion.reduction == "none" else criterion.sums
        return of_pairs(own, rows, flat_targets[positions], call.padding_row)

    part, error = _attempt(compute, otherwise=rows.new_zeros(4, dtype=torch.float64))
    if criterion.reduction == "none":
        _agree(mesh, call.alike, error)
        losses = table.join(positions, part, len(flat_idx)).view(local_idx.shape)
        return _place(losses, mesh, shard_dims, idx.shape)
    loss = criterion.loss(_sum_and_agree(part, mesh, [*table.row_dims, *shard_dims], call.alike, error))
    in_float32 = rows.dtype in _16_BITS and torch.is_autocast_enabled(rows.device.type)  # as F.cross_entropy
    return _place(loss.to(torch.float32 if in_float32 else rows.dtype), mesh)


def embedding_cross_entropy_with_logits(
    idx: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """See functional.embedding_cross_entropy_with_logits: the loss is that of a table of logits, a row for each pair.

    Returns:
        The loss, which is the same on every rank; and the logits, (N, C), sharded as idx if its shards are of one size,
        otherwise the same on every rank.

    Raises:
        NotImplementedError: As ``embedding_cross_entropy``; ValueError and RuntimeError, too.
    """
    if not isinstance(weight, DTensor):
        return reference.embedding_cross_entropy_with_logits(idx, weight, targets, **options)
    call = _Call(idx, weight, targets, **options)
    table, mesh = call.table, call.table.mesh
    if call.shard_dims and len(idx) % prod(mesh.size(dim) for dim in call.shard_dims) != 0:
        call.shard_dims = []
    flat_idx = _local(call.idx, call.shard_dims).reshape(-1)
    _agree(mesh, call.alike, _attempt(lambda: table.check(flat_idx), otherwise=flat_idx)[1])
    logits = _place(
        table.lookup(flat_idx, call.rows(), call.padding_row), mesh, call.shard_dims, (idx.numel(), weight.size(1))
    )
    pairs = torch.arange(idx.numel(), device=flat_idx.device)
    all_targets = _local(call.targets, []).reshape(idx.numel(), *targets.shape[idx.dim() :])
    loss = embedding_cross_entropy(_place(pairs, mesh), logits, _place(all_targets, mesh), **vars(call.criterion))
    if call.criterion.reduction == "none":
        loss = _place(_differentiable_local(loss, []).view(idx.shape), mesh)
    return loss, logits


@torch.no_grad()
def loss_of_counts(weight: Tensor, counts: Tensor) -> float:
    """See evaluation.loss_of_counts; counts are the same on every rank.

    Raises:
        ValueError: They are not.
    """
    assert isinstance(weight, DTensor)
    table = _Table(weight)
    own = counts[table.start : table.stop]
    num_pairs = own.sum()
    own_loss = evaluation.loss_of_counts(table.rows, own) * num_pairs if num_pairs > 0 else num_pairs
    part = torch.stack([own_loss, num_pairs]).double()
    total, num_pairs = _sum_and_agree(part, table.mesh, table.row_dims, [counts]).unbind()
    return (total / num_pairs).item()


# ------------------------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def generate(
    idx: Tensor,
    weight: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """See functional.generate: every rank draws the tokens of all sequences, from the same state of its generator.

    Where the table is sharded, a step of the reference's loop looks up one row for each sequence over the ranks.

    Returns:
        A plain tensor; where idx is a DTensor one sharded by sequences as it is.

    Raises:
        ValueError: idx, where it is plain, or the state of the generator is not the same on every rank.
        RuntimeError: The DTensors are on different meshes; or ``weight`` is none, where PyTorch raises.
    """
    generator = torch.default_generator if generator is None else generator
    if sampler is None:
        sampler = "torch" if weight.is_cpu else "philox"
    options |= {"temperature": temperature, "sampler": sampler, "generator": generator}
    if not isinstance(weight, DTensor):
        return reference.generate(idx, weight, max_new_tokens, **options)
    table = _Table(weight)
    prompt = _as_dtensor(idx, table.mesh).full_tensor()
    # The errors of the kernel, which draws nothing, from a table of this size in no memory.
    no_table = table.rows.new_zeros(()).expand(weight.shape)
    check = partial(functional.generate, prompt, no_table, min(max_new_tokens, 0), **options)
    _same_prompt, error = _attempt(check, otherwise=prompt)
    _agree(table.mesh, [*_plain(idx), *([generator.get_state()] if temperature > 0 else [])], error)
    if table.row_dims:
        tokens = reference.continue_by(
            lambda idx: table.lookup(idx[:, -1], table.rows), prompt, max_new_tokens, **options
        )
    else:
        tokens = functional.generate(prompt, table.rows, max_new_tokens, **options)
    return _as_sharded(tokens, idx)


@torch.no_grad()
def multinomial(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """See functional.multinomial: every rank draws the samples of all rows, from the same state of its generator.

    Returns:
        A DTensor; of (B, V) probabilities sharded by rows as these are.

    Raises:
        ValueError: The state of the generator is not the same on every rank.
    """
    assert isinstance(probs, DTensor)
    generator = torch.default_generator if generator is None else generator
    _agree(probs.device_mesh, [generator.get_state()])
    samples = functional.multinomial(
        probs.full_tensor(), num_samples, replacement, sampler=sampler, generator=generator
    )
    return _as_sharded(samples, probs)


def _as_sharded(result: Tensor, like: Tensor) -> Tensor:
    """What each rank has all of: as it is, or where ``like`` is a DTensor of rows, sharded by rows as that."""
    if not isinstance(like, DTensor):
        return result
    mesh, shard_dims = like.device_mesh, _shard_dims(like) if like.dim() == 2 else []
    return _place(result, mesh).redistribute(placements=_placements(mesh, shard_dims))


# --------------------------------------------------------------------------------------------------------------- files


def write_once(weight: DTensor, write: Callable[[Tensor], object]) -> None:
    """Gives the whole table to ``write`` on the mesh's first rank; the others wait for it.

    Raises:
        Exception: What ``write`` raises; on the other ranks a RuntimeError that tells of it.
    """
    mesh, whole = weight.device_mesh, weight.full_tensor()
    error = None
    if not any(mesh.get_local_rank(dim) for dim in range(mesh.ndim)):
        try:
            write(whole)
        except Exception as raised:
            error = raised
    _agree(mesh, error=error)
