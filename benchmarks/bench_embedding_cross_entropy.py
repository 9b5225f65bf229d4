"""Forward and backward of the loss: the model's step at the lecture's size, large tables, many tokens, sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bigramx
from benchmarks import floors, peers
from benchmarks.device import COPY, Device
from benchmarks.race import (
    OURS,
    Effort,
    Race,
    Reach,
    Reached,
    Result,
    assert_equal,
    assert_means_within,
    assert_within,
    faster_than,
    ns_a_token,
    percent_of,
    within,
)
from benchmarks.timing import Function, launched, rotating
from bigramx import functional, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Pairs = tuple[Tensor, Tensor, Tensor]  # idx, weight, targets

NO_OP = "a no-op C++ autograd function"
FRESH = "copying the table into fresh memory, huge pages advised"
JAX = "JAX jit(value_and_grad)"
LIGER = "Liger-Kernel"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # eager's bfloat16 log-probabilities have errors of 1/32


def through_the_model(effort: Effort, reaches: Sequence[Reach], captured: bool = False) -> Result:
    """The lecture's size, the logits returned; the table is in the cache, where a loop's last step left it.

    Captured, the host does nothing but launch a graph.
    """
    device = effort.device
    race = Race(
        "forward + backward through the model, logits returned, V=65 B=32 T=8" + captured * ", captured", reaches
    )
    batch = peers.lecture_get_batch(peers.text_tokens(10_000), 32, 8)
    idx, targets = (tensor.to(device.name) for tensor in batch)
    eager = reference.BigramLanguageModel(65).to(device.name)

    def step(model: nn.Module, *, compiled: bool = False) -> Function:
        model.to(device.name).load_state_dict(eager.state_dict())
        weight = model.get_parameter("token_embedding_table.weight")
        forward = peers.compiled(model) if compiled else model

        def run() -> object:
            _logits, loss = forward(idx, targets)
            loss.backward()
            return loss.detach(), taken_gradient(weight)

        return device.captured(run) if captured else run

    race.add(OURS, step(bigramx.BigramLanguageModel(65)))
    race.add("eager", step(eager))
    race.add_peer("torch.compile", lambda: step(reference.BigramLanguageModel(65), compiled=True))
    weight = eager.token_embedding_table.weight
    if not device.is_gpu:
        race.add_peer(JAX, lambda: peers.jax_value_and_grad(idx, weight, targets, return_logits=True))
        race.add_floor(NO_OP, step(floors.NoopModel(65)))
    elif not captured:  # Liger-Kernel waits for the GPU, which no graph can
        race.add_peer(LIGER, lambda: backward(peers.liger_loss(), [(idx.flatten(), weight, targets.flatten())]))
    return race.run(effort, memory=device.peak_bytes, memory_of=() if captured else (OURS, "eager"))


def launches(effort: Effort) -> Result:
    """V = 65, B = 32, T = 8: what the GPU is told to do."""
    device, result = effort.device, Result("kernels of forward + backward, no logits, V=65 B=32 T=8")
    pairs = random_pairs(device, 65, 256)

    def count(loss_of: Loss) -> tuple[int, int]:
        step = backward(loss_of, [pairs])
        step()
        names = launched(step)
        moves = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        return len(names) - moves, moves

    kernels, moves = count(functional.embedding_cross_entropy)
    of_eager, _moves = count(peers.eager_loss)
    if of_eager == 0:
        result.skipped[OURS] = "the profiler saw nothing on the GPU"
    unit = f" kernels, beside {moves} copies and memsets; eager {of_eager}"
    result.reaches = [Reached(unit, "<=", 3, kernels if of_eager > 0 else None)]
    return result


def large_table(
    effort: Effort,
    vocab_size: int,
    reaches: Sequence[Reach],
    num_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Every row present, and random ones up to N: one read of the table, one write of the gradient."""
    device = effort.device
    size = f"V={vocab_size}" + (f" N={num_tokens}" if num_tokens else "")
    bits = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    table_bytes = vocab_size**2 * dtype.itemsize
    race = Race(
        f"forward + backward, no logits, {size}, every row present{bits}",
        reaches,
        bytes_moved=2 * table_bytes,
        same=assert_within(TOLERANCES[dtype]),
    )
    if reason := device.lacks_memory(6 * table_bytes / 2**30):
        return race.skip(reason)
    sets = device.input_sets(lambda: random_pairs(device, vocab_size, num_tokens or vocab_size, dtype))
    race.add(OURS, backward(functional.embedding_cross_entropy, sets))
    race.add("eager", backward(peers.eager_loss, sets))
    if not effort.quick:
        race.add_peer("torch.compile", lambda: backward(peers.compiled(peers.eager_loss), sets))
    table = sets[0][1].detach()
    if device.is_gpu:
        race.add_peer(LIGER, lambda: backward(peers.liger_loss(), sets))
        race.add_copy(device, 2 * table_bytes)
    else:
        race.add_peer(JAX, lambda: peers.jax_value_and_grad(*sets[0]))
        in_use = torch.zeros_like(table)
        race.add_floor(FRESH, lambda: device.fresh(*table.shape, dtype=dtype).copy_(table))
        race.add_floor("weight.clone()", lambda: table.clone())
        race.add_floor("copying the table into memory in use", lambda: in_use.copy_(table))
    return race.run(effort, memory=device.peak_resident_bytes, memory_of=(OURS, "eager", "torch.compile", JAX, LIGER))


def more_tokens(effort: Effort) -> Result:
    """V = 8192: what each further token costs once every row is present."""
    vocab_size, few, many = 8192, 8192, 524_288
    _idx, weight, _targets = random_pairs(effort.device, vocab_size, vocab_size)

    def step(num_tokens: int) -> Function:
        idx, targets = random_tokens(effort.device, vocab_size, num_tokens)
        return backward(functional.embedding_cross_entropy, [(idx, weight, targets)])

    losses_alike = assert_means_within(0.1)
    growth = Reach(
        " ns a token more",
        "<=",
        1.5,
        lambda seconds: (seconds[OURS] - seconds["bigramx, N=8192"]) / (many - few) * 1e9,
    )
    race = Race(
        "forward + backward, no logits, V=8192, from N=8192 to N=524288",
        [growth],
        same=lambda actual, expected: losses_alike(actual[0], expected[0]),
    )
    race.add(OURS, step(many))
    race.add("bigramx, N=8192", step(few))
    return race.run(effort)


def small_table(effort: Effort) -> Result:
    """V = 65, N = 2^20."""
    num_tokens = 2**20
    tokens = peers.text_tokens(num_tokens + 1)
    weight = torch.randn(65, 65, requires_grad=True)
    idx, targets = tokens[:-1].clone(), tokens[1:].clone()
    race = Race(
        "forward + backward, no logits, V=65 N=2^20",
        [ns_a_token(num_tokens, 1.5)],
        bytes_moved=idx.nbytes + targets.nbytes,
        same=assert_within(1e-3),  # eager adds a million numbers to few cells, one after another
    )
    race.add(OURS, backward(functional.embedding_cross_entropy, [(idx, weight, targets)]))
    race.add("eager", backward(peers.eager_loss, [(idx, weight, targets)]))
    race.add_peer(JAX, lambda: peers.jax_value_and_grad(idx, weight, targets))
    race.add_floor("reading the tokens", lambda: floors.read(idx, targets))
    return race.run(effort, memory=effort.device.peak_bytes, memory_of=(OURS, "eager"))


def sparse(effort: Effort, vocab_size: int, num_tokens: int, target: float) -> Result:
    """Only the rows that occur: more bytes than a cache holds."""
    device = effort.device
    copy = "copying the touched rows"
    race = Race(
        f"forward + backward, sparse gradient, V={vocab_size} N={num_tokens}",
        [faster_than("eager, dense gradient", target), within(copy, 1.5)],
        same=assert_same_rows,
    )
    if reason := device.lacks_memory(15):
        return race.skip(reason)
    idx, targets = (torch.randint(vocab_size, (num_tokens,), device=device.name) for _ in range(2))
    table = torch.empty(vocab_size, vocab_size, device=device.name)
    table[idx] = torch.randn(num_tokens, vocab_size, device=device.name)  # nobody reads another row
    rows, weight = idx.unique(), table.requires_grad_()
    ours = partial(functional.embedding_cross_entropy, sparse=True)
    race.add(OURS, backward(ours, [(idx, weight, targets)]))
    race.add("eager, dense gradient", backward(peers.eager_loss, [(idx, weight, targets)]))

    def copy_rows() -> object:
        return torch.index_select(weight.detach(), 0, rows, out=device.fresh(len(rows), vocab_size))

    race.add_floor(copy, copy_rows)
    return race.run(effort, memory=device.peak_resident_bytes, memory_of=(OURS, "eager, dense gradient"))


def sixteen_bits(effort: Effort) -> Result:
    """A bfloat16 table moves half the bytes."""
    device, vocab_size = effort.device, 8192
    idx, weight, targets = random_pairs(device, vocab_size, vocab_size, torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    race = Race(
        "forward + backward, no logits, V=8192, every row present, bfloat16",
        [faster_than("bigramx float32", 1.6)],
        bytes_moved=2 * weight.nbytes,
        same=assert_within(1e-2),
    )
    race.add(OURS, backward(functional.embedding_cross_entropy, [(idx, weight, targets)]))
    race.add("bigramx float32", backward(functional.embedding_cross_entropy, [(idx, wide, targets)]))
    race.add("eager bfloat16", backward(peers.eager_loss, [(idx, weight, targets)]))
    table = weight.detach()
    race.add_floor(FRESH, lambda: device.fresh(*table.shape, dtype=table.dtype).copy_(table))
    return race.run(effort)


def random_pairs(device: Device, vocab_size: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> Pairs:
    """Idx, weight, targets."""
    weight = torch.randn(vocab_size, vocab_size, dtype=dtype, device=device.name, requires_grad=True)
    idx, targets = random_tokens(device, vocab_size, num_tokens)
    return idx, weight, targets


def random_tokens(device: Device, vocab_size: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Idx, in which every token occurs, and targets; (N) each, N >= V."""
    more = torch.randint(vocab_size, (num_tokens - vocab_size,), device=device.name)
    idx = torch.cat((torch.randperm(vocab_size, device=device.name), more))
    return idx, torch.randint(vocab_size, (num_tokens,), device=device.name)


def backward(loss_of: Loss, sets: Sequence[Pairs]) -> Function:
    """Forward and backward: the loss and the gradient, in fresh memory as a training loop has it."""

    def run(idx: Tensor, weight: Tensor, targets: Tensor) -> object:
        loss = loss_of(idx, weight, targets)
        loss.backward()
        return loss.detach(), taken_gradient(weight)

    return rotating(run, sets)


def taken_gradient(weight: Tensor) -> Tensor | None:
    gradient, weight.grad = weight.grad, None
    return gradient


def assert_same_rows(actual: Any, expected: Any) -> None:
    """Of a dense gradient and a sparse one."""
    assert_equal(actual[0], expected[0])
    gradient = expected[1].coalesce()
    assert_equal(actual[1][gradient.indices()[0]], gradient.values())


JOBS = [
    partial(
        through_the_model,
        reaches=[
            faster_than("eager", 4.5),
            faster_than(JAX, 3),
            faster_than("torch.compile", 8),
            within(NO_OP, 1.5),
        ],
    ),
    partial(large_table, vocab_size=8192, reaches=[faster_than("eager", 25), within(FRESH, 1.3)]),
    more_tokens,
    small_table,
    partial(sparse, vocab_size=32_000, num_tokens=4096, target=50),
    sixteen_bits,
]

FOR_ALL_ROWS = [percent_of(COPY, 85)]
FOR_MANY_TOKENS = [faster_than("eager", 10), faster_than(LIGER, 5)]

CUDA_JOBS = [
    partial(through_the_model, reaches=[faster_than("eager", 2)]),
    partial(through_the_model, reaches=[faster_than("eager", 2)], captured=True),
    launches,
    *(
        partial(large_table, vocab_size=vocab_size, dtype=dtype, num_tokens=num_tokens, reaches=reaches)
        for num_tokens, reaches in ((None, FOR_ALL_ROWS), (65_536, FOR_MANY_TOKENS))
        for vocab_size in (8192, 32_000)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    partial(sparse, vocab_size=32_000, num_tokens=4096, target=5),
]
