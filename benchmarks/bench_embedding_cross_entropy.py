"""Forward and backward of the loss: the model's step at the lecture's size, large tables, many tokens, sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bigramx
from benchmarks import floors, peers
from benchmarks.machine import lacks_memory
from benchmarks.race import (
    OURS,
    Effort,
    Race,
    Reach,
    Result,
    assert_equal,
    assert_means_within,
    assert_within,
    faster_than,
    ns_a_token,
    within,
)
from benchmarks.timing import Function, peak_bytes, peak_resident_bytes
from bigramx import functional, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def through_the_model(effort: Effort) -> Result:
    """The lecture's size, the logits returned."""
    no_op = "a no-op C++ autograd function"
    race = Race(
        "forward + backward through the model, logits returned, V=65 B=32 T=8",
        [
            faster_than("eager", 4.5),
            faster_than("JAX jit(value_and_grad)", 3),
            faster_than("torch.compile", 8),
            within(no_op, 1.5),
        ],
    )
    idx, targets = peers.lecture_get_batch(peers.text_tokens(10_000), 32, 8)
    eager = reference.BigramLanguageModel(65)

    def step(model: nn.Module, *, compiled: bool = False) -> Function:
        model.load_state_dict(eager.state_dict())
        weight = model.get_parameter("token_embedding_table.weight")
        forward = torch.compile(model) if compiled else model

        def run() -> object:
            _logits, loss = forward(idx, targets)
            loss.backward()
            return loss.detach(), taken_gradient(weight)

        return run

    race.add(OURS, step(bigramx.BigramLanguageModel(65)))
    race.add("eager", step(eager))
    race.add("torch.compile", step(reference.BigramLanguageModel(65), compiled=True))
    weight = eager.token_embedding_table.weight
    race.add_peer("JAX jit(value_and_grad)", lambda: peers.jax_value_and_grad(idx, weight, targets, return_logits=True))
    race.add_floor(no_op, step(floors.NoopModel(65)))
    return race.run(effort, memory=peak_bytes, memory_of=(OURS, "eager"))


def large_table(effort: Effort) -> Result:
    """V = 8192, every row present: one read of the table, one write of the gradient."""
    vocab_size = 8192
    copy = "copying the table into fresh memory, huge pages advised"
    weight = torch.randn(vocab_size, vocab_size, requires_grad=True)
    idx, targets = torch.randperm(vocab_size), torch.randint(vocab_size, (vocab_size,))
    race = Race(
        "forward + backward, no logits, V=8192, every row present",
        [faster_than("eager", 25), within(copy, 1.3)],
        bytes_moved=2 * weight.nbytes,
    )
    race.add(OURS, backward(functional.embedding_cross_entropy, idx, weight, targets))
    race.add("eager", backward(peers.eager_loss, idx, weight, targets))
    if not effort.quick:
        race.add("torch.compile", backward(torch.compile(peers.eager_loss), idx, weight, targets))
    race.add_peer("JAX jit(value_and_grad)", lambda: peers.jax_value_and_grad(idx, weight, targets))
    table, in_use = weight.detach(), torch.zeros(vocab_size, vocab_size)
    race.add_floor(copy, lambda: floors.empty(vocab_size, vocab_size).copy_(table))
    race.add_floor("weight.clone()", lambda: table.clone())
    race.add_floor("copying the table into memory in use", lambda: in_use.copy_(table))
    return race.run(
        effort, memory=peak_resident_bytes, memory_of=(OURS, "eager", "torch.compile", "JAX jit(value_and_grad)")
    )


def more_tokens(effort: Effort) -> Result:
    """V = 8192: what each further token costs once every row is present."""
    vocab_size, few, many = 8192, 8192, 524_288
    weight = torch.randn(vocab_size, vocab_size, requires_grad=True)

    def step(num_tokens: int) -> Function:
        idx = torch.cat((torch.randperm(vocab_size), torch.randint(vocab_size, (num_tokens - vocab_size,))))
        targets = torch.randint(vocab_size, (num_tokens,))
        return backward(functional.embedding_cross_entropy, idx, weight, targets)

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
    race.add(OURS, backward(functional.embedding_cross_entropy, idx, weight, targets))
    race.add("eager", backward(peers.eager_loss, idx, weight, targets))
    race.add_peer("JAX jit(value_and_grad)", lambda: peers.jax_value_and_grad(idx, weight, targets))
    race.add_floor("reading the tokens", lambda: floors.read(idx, targets))
    return race.run(effort, memory=peak_bytes, memory_of=(OURS, "eager"))


def sparse(effort: Effort) -> Result:
    """V = 32000, N = 4096: only the rows that occur."""
    vocab_size, num_tokens = 32_000, 4096
    copy = "copying the touched rows"
    race = Race(
        "forward + backward, sparse gradient, V=32000 N=4096",
        [faster_than("eager, dense gradient", 50), within(copy, 1.5)],
        same=assert_same_rows,
    )
    if reason := lacks_memory(15):
        return race.skip(reason)
    idx, targets = torch.randint(vocab_size, (num_tokens,)), torch.randint(vocab_size, (num_tokens,))
    table = torch.empty(vocab_size, vocab_size)
    table[idx] = torch.randn(num_tokens, vocab_size)  # nobody reads another row
    rows, weight = idx.unique(), table.requires_grad_()
    ours = partial(functional.embedding_cross_entropy, sparse=True)
    race.add(OURS, backward(ours, idx, weight, targets))
    race.add("eager, dense gradient", backward(peers.eager_loss, idx, weight, targets))

    def copy_rows() -> object:
        touched = floors.empty(len(rows), vocab_size)
        return torch.index_select(weight.detach(), 0, rows, out=touched)

    race.add_floor(copy, copy_rows)
    return race.run(effort, memory=peak_resident_bytes, memory_of=(OURS, "eager, dense gradient"))


def sixteen_bits(effort: Effort) -> Result:
    """A bfloat16 table moves half the bytes."""
    vocab_size = 8192
    weight = torch.randn(vocab_size, vocab_size, dtype=torch.bfloat16, requires_grad=True)
    wide = weight.detach().float().requires_grad_()
    idx, targets = torch.randperm(vocab_size), torch.randint(vocab_size, (vocab_size,))
    race = Race(
        "forward + backward, no logits, V=8192, every row present, bfloat16",
        [faster_than("bigramx float32", 1.6)],
        bytes_moved=2 * weight.nbytes,
        same=assert_within(1e-2),
    )
    race.add(OURS, backward(functional.embedding_cross_entropy, idx, weight, targets))
    race.add("bigramx float32", backward(functional.embedding_cross_entropy, idx, wide, targets))
    race.add("eager bfloat16", backward(peers.eager_loss, idx, weight, targets))
    table = weight.detach()
    race.add_floor(
        "copying the table into fresh memory, huge pages advised",
        lambda: floors.empty(vocab_size, vocab_size, dtype=torch.bfloat16).copy_(table),
    )
    return race.run(effort)


def backward(loss_of: Loss, idx: Tensor, weight: Tensor, targets: Tensor) -> Function:
    """Forward and backward: the loss and the gradient, in fresh memory as a training loop has it."""

    def run() -> object:
        loss = loss_of(idx, weight, targets)
        loss.backward()
        return loss.detach(), taken_gradient(weight)

    return run


def taken_gradient(weight: Tensor) -> Tensor | None:
    gradient, weight.grad = weight.grad, None
    return gradient


def assert_same_rows(actual: Any, expected: Any) -> None:
    """Of a dense gradient and a sparse one."""
    assert_equal(actual[0], expected[0])
    gradient = expected[1].coalesce()
    assert_equal(actual[1][gradient.indices()[0]], gradient.values())


JOBS = [through_the_model, large_table, more_tokens, small_table, sparse, sixteen_bits]
