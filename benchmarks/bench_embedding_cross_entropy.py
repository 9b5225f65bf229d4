"""Forward and backward of the loss: the model's step at the lecture's size, large tables, many tokens, sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bigramx
from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    COPY,
    OURS,
    Case,
    Comparison,
    Outcome,
    Result,
    RunConfig,
    Target,
    assert_equal,
    assert_means_within,
    assert_within,
    at_most,
    faster_than,
    ns_per_token,
    percent_of,
    within,
)
from benchmarks.device import Device
from benchmarks.timing import Function, rotating
from bigramx import functional, ops, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Pairs = tuple[Tensor, Tensor, Tensor]  # idx, weight, targets

NO_OP = "a no-op C++ autograd function"
IN_USE = "copying the table into memory in use"
FRESH = "copying the table into fresh memory, huge pages advised"
JAX = "JAX jit(value_and_grad)"
LIGER = "Liger-Kernel"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # eager's bfloat16 log-probabilities have errors of 1/32


class NoopModel(reference.BigramLanguageModel):
    """The model around a C++ autograd function that computes nothing."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        native = lower_bounds.native().noop  # compiled first: it defines the op
        self.noop = ops.direct(torch.ops.bigramx_lower_bounds.noop.default, native)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns uninitialised memory of the right shapes."""
        loss, logits = self.noop(idx, self.token_embedding_table.weight, targets)
        return logits, loss


def through_the_model(config: RunConfig, targets: Sequence[Target], captured: bool = False) -> Result:
    """The lecture's size, the logits returned; the table is in the cache, where the previous step of a loop left it.

    Captured, the host only launches a graph.
    """
    device = config.device
    comparison = Comparison(
        "forward + backward through the model, logits returned, V=65 B=32 T=8" + captured * ", captured", targets
    )
    batch = peers.lecture_get_batch(peers.text_tokens(10_000), 32, 8)
    idx, next_tokens = (tensor.to(device.name) for tensor in batch)
    eager = reference.BigramLanguageModel(65).to(device.name)

    def step(model: nn.Module, *, compiled: bool = False) -> Function:
        model.to(device.name).load_state_dict(eager.state_dict())
        weight = model.get_parameter("token_embedding_table.weight")
        forward = peers.compiled(model) if compiled else model

        def run() -> object:
            _logits, loss = forward(idx, next_tokens)
            loss.backward()
            return loss.detach(), taken_gradient(weight)

        return device.capture(run) if captured else run

    comparison.add(OURS, step(bigramx.BigramLanguageModel(65)))
    comparison.add("eager", step(eager))
    comparison.add_peer("torch.compile", lambda: step(reference.BigramLanguageModel(65), compiled=True))
    weight = eager.token_embedding_table.weight
    if not device.is_gpu:
        comparison.add_peer(JAX, lambda: peers.jax_value_and_grad(idx, weight, next_tokens, return_logits=True))
        comparison.add_lower_bound(NO_OP, step(NoopModel(65)))
    elif not captured:  # Liger-Kernel waits for the GPU, which a graph cannot
        pairs = (idx.flatten(), weight, next_tokens.flatten())
        comparison.add_peer(LIGER, lambda: backward(peers.liger_loss(), [pairs]))
    return comparison.run(config, memory=device.peak_bytes, memory_of=() if captured else (OURS, "eager"))


def launches(config: RunConfig) -> Result:
    """V = 65, B = 32, T = 8: what runs on the GPU."""
    device, result = config.device, Result("kernels of forward + backward, no logits, V=65 B=32 T=8")
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
    result.targets = [Outcome(kernels if of_eager > 0 else None, unit, "<=", 3)]
    return result


def launched(function: Function) -> list[str]:
    """The names of the kernels, copies and memsets that a call runs on the GPU; of a function called before."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True) as profile:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return [event.name for event in on_gpu if not event.is_user_annotation]


def large_table(
    config: RunConfig,
    vocab_size: int,
    targets: Sequence[Target],
    num_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Every row present, and random ones up to N: one read of the table, one write of the gradient."""
    device = config.device
    size = f"V={vocab_size}" + (f" N={num_tokens}" if num_tokens else "")
    bits = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    table_bytes = vocab_size**2 * dtype.itemsize
    comparison = Comparison(
        f"forward + backward, no logits, {size}, every row present{bits}",
        targets,
        bytes_moved=2 * table_bytes,
        check=assert_within(TOLERANCES[dtype]),
    )
    if reason := device.lacks_memory(6 * table_bytes):
        return comparison.skip(reason)
    sets = device.input_sets(lambda: random_pairs(device, vocab_size, num_tokens or vocab_size, dtype))
    comparison.add(OURS, backward(functional.embedding_cross_entropy, sets))
    comparison.add("eager", backward(peers.eager_loss, sets))
    if not config.quick:
        comparison.add_peer("torch.compile", lambda: backward(peers.compiled(peers.eager_loss), sets))
    table = sets[0][1].detach()
    if device.is_gpu:
        comparison.add_peer(LIGER, lambda: backward(peers.liger_loss(), sets))
        comparison.add_copy(device, 2 * table_bytes)
    else:
        comparison.add_peer(JAX, lambda: peers.jax_value_and_grad(*sets[0]))
        in_use = torch.zeros_like(table)
        comparison.add_lower_bound(FRESH, lambda: lower_bounds.empty(*table.shape, dtype=dtype).copy_(table))
        comparison.add_lower_bound("weight.clone()", lambda: table.clone())
        comparison.add_lower_bound(IN_USE, lambda: in_use.copy_(table))
    return comparison.run(
        config, memory=device.peak_resident_bytes, memory_of=(OURS, "eager", "torch.compile", JAX, LIGER)
    )


def more_tokens(config: RunConfig) -> Result:
    """V = 8192: what each additional token costs once every row is present."""
    vocab_size, few, many = 8192, 8192, 524_288
    _idx, weight, _targets = random_pairs(config.device, vocab_size, few)

    def step(num_tokens: int) -> Function:
        idx, _weight, targets = random_pairs(config.device, vocab_size, num_tokens)
        return backward(functional.embedding_cross_entropy, [(idx, weight, targets)])

    check_means = assert_means_within(0.1)
    per_token = at_most(
        1.5,
        " ns per additional token",
        lambda medians: (medians[OURS] - medians["bigramx, N=8192"]) / (many - few) * 1e9,
    )
    comparison = Comparison(
        "forward + backward, no logits, V=8192, from N=8192 to N=524288",
        [per_token],
        check=lambda actual, expected: check_means(actual[0], expected[0]),
    )
    comparison.add(OURS, step(many))
    comparison.add("bigramx, N=8192", step(few))
    return comparison.run(config)


def small_table(config: RunConfig) -> Result:
    """V = 65, N = 2^20."""
    num_tokens = 2**20
    tokens = peers.text_tokens(num_tokens + 1)
    weight = torch.randn(65, 65, requires_grad=True)
    idx, targets = tokens[:-1].clone(), tokens[1:].clone()
    comparison = Comparison(
        "forward + backward, no logits, V=65 N=2^20",
        [ns_per_token(num_tokens, 1.5)],
        bytes_moved=idx.nbytes + targets.nbytes,
        check=assert_within(1e-3),  # eager adds a million numbers to few cells, one after another
    )
    comparison.add(OURS, backward(functional.embedding_cross_entropy, [(idx, weight, targets)]))
    comparison.add("eager", backward(peers.eager_loss, [(idx, weight, targets)]))
    comparison.add_peer(JAX, lambda: peers.jax_value_and_grad(idx, weight, targets))
    comparison.add_lower_bound(
        "reading the tokens", lambda: [lower_bounds.native().read_words(tokens) for tokens in (idx, targets)]
    )
    return comparison.run(config, memory=config.device.peak_bytes, memory_of=(OURS, "eager"))


def sparse(config: RunConfig, vocab_size: int, num_tokens: int, target: float) -> Result:
    """Only the rows that occur: more bytes than a cache holds."""
    device = config.device
    copy = "copying the touched rows"
    comparison = Comparison(
        f"forward + backward, sparse gradient, V={vocab_size} N={num_tokens}",
        [faster_than("eager, dense gradient", target), within(copy, 1.5)],
        check=assert_same_rows,
    )
    if reason := device.lacks_memory(15 * 2**30):
        return comparison.skip(reason)
    idx, targets = (torch.randint(vocab_size, (num_tokens,), device=device.name) for _ in range(2))
    table = torch.empty(vocab_size, vocab_size, device=device.name)
    table[idx] = torch.randn(num_tokens, vocab_size, device=device.name)  # no other row is read
    rows, weight = idx.unique(), table.requires_grad_()
    ours = partial(functional.embedding_cross_entropy, sparse=True)
    comparison.add(OURS, backward(ours, [(idx, weight, targets)]))
    comparison.add("eager, dense gradient", backward(peers.eager_loss, [(idx, weight, targets)]))

    def copy_rows() -> object:
        size = len(rows), vocab_size
        fresh = torch.empty(size, device=device.name) if device.is_gpu else lower_bounds.empty(*size)
        return torch.index_select(weight.detach(), 0, rows, out=fresh)

    comparison.add_lower_bound(copy, copy_rows)
    return comparison.run(config, memory=device.peak_resident_bytes, memory_of=(OURS, "eager, dense gradient"))


def sixteen_bits(config: RunConfig) -> Result:
    """A bfloat16 table moves half the bytes."""
    vocab_size = 8192
    idx, weight, targets = random_pairs(config.device, vocab_size, vocab_size, torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    comparison = Comparison(
        "forward + backward, no logits, V=8192, every row present, bfloat16",
        [faster_than("bigramx float32", 1.6)],
        bytes_moved=2 * weight.nbytes,
        check=assert_within(1e-2),
    )
    comparison.add(OURS, backward(functional.embedding_cross_entropy, [(idx, weight, targets)]))
    comparison.add("bigramx float32", backward(functional.embedding_cross_entropy, [(idx, wide, targets)]))
    comparison.add("eager bfloat16", backward(peers.eager_loss, [(idx, weight, targets)]))
    table = weight.detach()
    comparison.add_lower_bound(FRESH, lambda: lower_bounds.empty(*table.shape, dtype=table.dtype).copy_(table))
    return comparison.run(config)


def random_pairs(
    device: Device, vocab_size: int, num_tokens: int, dtype: torch.dtype = torch.float32, every_row: bool = True
) -> Pairs:
    """Idx (N), weight (V, V), targets (N); in idx, if ``every_row``, every token occurs: N >= V."""
    weight = torch.randn(vocab_size, vocab_size, dtype=dtype, device=device.name, requires_grad=True)
    idx, targets = (torch.randint(vocab_size, (num_tokens,), device=device.name) for _ in range(2))
    if every_row:
        idx[:vocab_size] = torch.randperm(vocab_size, device=device.name)
    return idx, weight, targets


def backward(loss_of: Loss, sets: Sequence[Pairs]) -> Function:
    """Forward and backward: the loss and the gradient, the latter in fresh memory as in a training loop."""

    def run(idx: Tensor, weight: Tensor, targets: Tensor) -> object:
        loss = loss_of(idx, weight, targets)
        loss.backward()
        return loss.detach(), taken_gradient(weight)

    return rotating(run, sets)


def taken_gradient(weight: Tensor) -> Tensor | None:
    gradient, weight.grad = weight.grad, None
    return gradient


def assert_same_rows(actual: Any, expected: Any) -> None:
    """Compares a dense gradient with a sparse one."""
    assert_equal(actual[0], expected[0])
    gradient = expected[1].coalesce()
    assert_equal(actual[1][gradient.indices()[0]], gradient.values())


HEADLINE = "loss and gradient through the model, V=65, B=32, T=8"

CASES = [
    Case(
        through_the_model,
        headline=HEADLINE,
        targets=[
            faster_than("eager", 4.5),
            faster_than(JAX, 3),
            faster_than("torch.compile", 8),
            within(NO_OP, 1.5),
        ],
    ),
    Case(
        large_table,
        headline="loss and gradient, V=8192, every row present",
        vocab_size=8192,
        targets=[faster_than("eager", 40), within(IN_USE, 1.1)],
    ),
    Case(more_tokens),
    Case(small_table),
    Case(sparse, vocab_size=32_000, num_tokens=4096, target=50),
    Case(sparse, vocab_size=16_384, num_tokens=2048, target=60),
    Case(sixteen_bits),
]

FOR_ALL_ROWS = [percent_of(COPY, 85)]
FOR_MANY_TOKENS = [faster_than("eager", 10), faster_than(LIGER, 5)]

CUDA_CASES = [
    Case(through_the_model, headline=HEADLINE, targets=[faster_than("eager", 2)]),
    Case(through_the_model, targets=[faster_than("eager", 2)], captured=True),
    Case(launches),
    *(
        Case(large_table, vocab_size=vocab_size, dtype=dtype, num_tokens=num_tokens, targets=targets)
        for num_tokens, targets in ((None, FOR_ALL_ROWS), (65_536, FOR_MANY_TOKENS))
        for vocab_size in (8192, 32_000)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Case(sparse, vocab_size=32_000, num_tokens=4096, target=5),
]
