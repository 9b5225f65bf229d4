"""A whole training step of the lecture's script, and 3000 of them in `fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bigramx
from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    Target,
    as_tensor,
    assert_means_within,
    assert_within,
    at_most,
    faster_than,
    within,
)
from benchmarks.timing import Function
from bigramx import data, optim, reference
from bigramx.steps import Steps

STEPS = 3000


def step(config: RunConfig, target: float) -> Result:
    """Batch, forward, backward, optimizer: the same lines with three imports changed."""
    device = config.device
    comparison = Comparison(
        "the lecture's step: get_batch, forward, backward, AdamW, V=65 B=32 T=8", [faster_than("eager", target)]
    )
    tokens = peers.text_tokens(10**6).to(device.name)
    ours, eager = bigramx.BigramLanguageModel(65), reference.BigramLanguageModel(65)
    ours.load_state_dict(eager.state_dict())
    our_optimizer = optim.AdamW(ours.to(device.name).parameters(), lr=1e-2)
    eager_optimizer = torch.optim.AdamW(eager.to(device.name).parameters(), lr=1e-2)
    comparison.add(OURS, partial(peers.lecture_step, ours, our_optimizer, data.get_batch, tokens))
    comparison.add("eager", partial(peers.lecture_step, eager, eager_optimizer, peers.lecture_get_batch, tokens))
    return comparison.run(config)


def fit_in_graphs(config: RunConfig, num_steps: int) -> Result:
    """``fit`` with its evaluations and captures, and the lecture's loop, whose host waits for the loss of each step."""
    device = config.device
    comparison = Comparison(
        f"fit, {num_steps} steps in CUDA graphs, V=65 B=32 T=8",
        [
            at_most(30, " us a step", lambda medians: medians[OURS] / num_steps * 1e6),
            faster_than("the lecture's loop", 8),
        ],
        check=assert_means_within(0.03),
    )
    tokens = peers.text_tokens(10**6).to(device.name)
    start = reference.BigramLanguageModel(65).state_dict()

    def last_losses(take: Callable[[nn.Module], list[float]], model: nn.Module) -> Tensor:
        model.load_state_dict(start)
        return torch.tensor(take(model.to(device.name))[-500:])

    def ours(model: nn.Module) -> list[float]:
        return bigramx.fit(model, tokens, max_steps=num_steps, lr=1e-2, eval_interval=num_steps).losses

    def lecture_loop(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        take = partial(peers.lecture_step, model, optimizer, peers.lecture_get_batch, tokens)
        return [take().item() for _ in range(num_steps)]

    comparison.add(OURS, partial(last_losses, ours, bigramx.BigramLanguageModel(65)))
    comparison.add("the lecture's loop", partial(last_losses, lecture_loop, reference.BigramLanguageModel(65)))
    return comparison.run(config)


def captured_step(config: RunConfig, vocab_size: int) -> Result:
    """Forward, backward, optimizer as a single launch: the lecture's lines on a batch that does not change."""
    device = config.device
    comparison = Comparison(
        f"a captured step: forward, backward, AdamW, V={vocab_size} B=32 T=8",
        [at_most(12, " us", lambda medians: medians[OURS] * 1e6), faster_than("eager", 2)],
        check=assert_within(1e-3),
    )
    tokens = peers.text_tokens(10_000, vocab_size)
    idx, targets = (tensor.to(device.name) for tensor in peers.lecture_get_batch(tokens, 32, 8))
    start = reference.BigramLanguageModel(vocab_size).state_dict()

    def captured(
        model: nn.Module, make_optimizer: Callable[..., torch.optim.Optimizer], forward: Any = None
    ) -> Function:
        model.load_state_dict(start)
        optimizer = make_optimizer(model.to(device.name).parameters(), lr=1e-2, capturable=device.name == "cuda")
        step = partial(peers.lecture_step, forward or model, optimizer, lambda *_sizes: (idx, targets), tokens)
        return device.capture(step)

    def compiled() -> Function:
        model = reference.BigramLanguageModel(vocab_size)
        return captured(model, fused, peers.compiled(model))

    ours, without_logits = (bigramx.BigramLanguageModel(vocab_size) for _ in range(2))
    fused, foreach = partial(torch.optim.AdamW, fused=True), partial(torch.optim.AdamW, foreach=True)
    comparison.add(OURS, captured(ours, optim.AdamW))
    comparison.add(
        "bigramx, no logits", captured(without_logits, optim.AdamW, partial(without_logits, return_logits=False))
    )
    comparison.add("eager", captured(reference.BigramLanguageModel(vocab_size), fused))
    comparison.add("eager, foreach=True", captured(reference.BigramLanguageModel(vocab_size), foreach))
    if not config.quick:
        comparison.add_peer("torch.compile", compiled)
    return comparison.run(config)


def fit(config: RunConfig) -> Result:
    """3000 steps, each with its loss; the mean of the last 500 must agree."""
    check_means = assert_means_within(0.03)
    comparison = Comparison(
        "fit, 3000 steps, V=65 B=32 T=8",
        [faster_than("the lecture's loop", 80), faster_than("JAX lax.scan", 8)],
        check=lambda actual, expected: check_means(as_tensor(actual)[-500:], as_tensor(expected)[-500:]),
    )
    tokens = peers.text_tokens(10**6)
    start = reference.BigramLanguageModel(65).state_dict()

    def ours() -> object:
        model = bigramx.BigramLanguageModel(65)
        model.load_state_dict(start)
        return bigramx.fit(
            model, tokens, batch_size=32, block_size=8, max_steps=STEPS, lr=1e-2, eval_interval=STEPS
        ).losses

    def lecture_loop() -> object:
        model = reference.BigramLanguageModel(65)
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = partial(peers.lecture_step, model, optimizer, peers.lecture_get_batch, tokens)
        return [step().item() for _ in range(STEPS)]

    def jax_scan() -> Function:
        return peers.jax_fit(start["token_embedding_table.weight"], tokens, STEPS)

    comparison.add(OURS, ours)
    comparison.add("the lecture's loop", lecture_loop)
    comparison.add_peer("JAX lax.scan", jax_scan)
    comparison.add_lower_bound(
        "the exponentials and AdamW's arithmetic", partial(lower_bounds.native().exp_and_adamw, STEPS * 65 * 65)
    )
    return comparison.run(config)


class LargeFit:
    """What ``fit`` does between two evaluations, and what the lecture's loop does, over and over."""

    def __init__(self, tokens: Tensor, vocab_size: int, num_steps: int) -> None:
        self.tokens, self.vocab_size, self.num_steps = tokens, vocab_size, num_steps

    def ours(self) -> Function:
        """The table is up to date at the end of each call."""
        model = bigramx.BigramLanguageModel(self.vocab_size)
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        steps = Steps(model, model, optimizer, None, None, bigramx.History(), self.tokens, 32, 8, None)

        def run() -> object:
            end = steps.history.step + self.num_steps
            while steps.history.step < end:
                steps.take(end - steps.history.step)
            steps.catch_up()
            return steps.history.losses[-self.num_steps :]

        return run

    def _loop(self, model: nn.Module, optimizer: torch.optim.Optimizer, get_batch: peers.GetBatch) -> Function:
        step = partial(peers.lecture_step, model, optimizer, get_batch, self.tokens)
        return lambda: [step().item() for _ in range(self.num_steps)]

    def eager(self) -> Function:
        """The lecture's loop with the fastest of PyTorch's AdamW."""
        model = reference.BigramLanguageModel(self.vocab_size)
        return self._loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), peers.lecture_get_batch)

    def three_imports(self) -> Function:
        """That loop with our model, batches and optimizer."""
        model = bigramx.BigramLanguageModel(self.vocab_size)
        return self._loop(model, optim.AdamW(model.parameters(), lr=1e-2), data.get_batch)

    def deferred(self) -> Function:
        """A loop with a sparse gradient; the table is up to date at the end of each call."""
        model = bigramx.BigramLanguageModel(self.vocab_size, sparse=True)
        optimizer = optim.DeferredAdamW(model, lr=1e-2)
        loop = self._loop(model, optimizer, data.get_batch)

        def run() -> object:
            losses = loop()
            optimizer.catch_up()
            return losses

        return run

    def copies(self) -> Function:
        """As many copies of the table as there are steps, between two buffers in use."""
        table, other = (torch.randn(self.vocab_size, self.vocab_size) for _ in range(2))

        def run() -> None:
            for _ in range(self.num_steps):
                other.copy_(table)

        return run


def fit_large(config: RunConfig, vocab_size: int, num_steps: int, kind: str, targets: Sequence[Target]) -> Result:
    """Steps of ``fit`` with B = 32, T = 8, after which the table is up to date; and of loops in Python."""
    comparison = Comparison(
        f"fit, {num_steps} steps, V={vocab_size} B=32 T=8, {kind} tokens", targets, check=assert_means_within(0.2)
    )
    if reason := config.device.lacks_memory(4 * 4 * 4 * vocab_size**2):
        return comparison.skip(reason)
    try:
        tokens = TOKENS[kind](vocab_size)
    except ImportError as error:
        return comparison.skip(str(error))
    runs = LargeFit(tokens, vocab_size, num_steps)
    comparison.add(OURS, runs.ours())
    comparison.add("eager, AdamW fused", runs.eager())
    comparison.add(f"{OURS}, three imports changed", runs.three_imports())
    comparison.add(f"{OURS}, sparse, DeferredAdamW", runs.deferred())
    comparison.add_lower_bound(COPIES, runs.copies())
    return comparison.run(config)


def over_vocabulary(config: RunConfig, sizes: Sequence[int]) -> Result:
    """The time of a step; a quick run leaves out the four largest sizes, which take the longest."""
    sizes = sizes[:-4] if config.quick else sizes
    result = Result("fit, a step, B=32 T=8, uniform tokens, over V", series={"V": [float(size) for size in sizes]})
    for size in sizes:
        num_steps = max(1, min(1000, 2**24 // size**2))
        comparison = Comparison(f"V={size}", check=assert_means_within(0.2))
        tokens = TOKENS["uniform"](size)
        runs = LargeFit(tokens, size, num_steps)
        comparison.add(OURS, runs.ours())
        comparison.add(f"{OURS}, sparse, DeferredAdamW", runs.deferred())
        comparison.add("eager, AdamW fused", runs.eager())
        if size <= 8192:  # beyond it, it does not fit beside the others
            comparison.add_peer("JAX lax.scan", partial(peers.jax_fit, torch.randn(size, size), tokens, num_steps))
        point = comparison.run(replace(config, seconds=config.seconds / len(sizes)))
        result.skipped |= point.skipped
        for name, times in point.implementations.items():
            result.series.setdefault(name, []).append(times.median / num_steps)
    return result


COPIES = "a copy of the table a step"
TOKENS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda vocab_size: torch.randint(vocab_size, (10**6,)),
    "BPE": peers.package_tokens,
}
STEP = "a step of the lecture's loop: batch, forward, backward, AdamW"

CASES = [
    Case(step, headline=STEP, target=10),
    Case(fit, headline="`fit`: 3000 steps of that loop"),
    *(
        Case(
            fit_large,
            headline=f"`fit`: {num_steps} steps, V={vocab_size}" if vocab_size == 8192 and kind == "uniform" else "",
            vocab_size=vocab_size,
            num_steps=num_steps,
            kind=kind,
            targets=[faster_than("eager, AdamW fused", target), *more],
        )
        for vocab_size, num_steps, kind, target, more in (
            (256, 1000, "uniform", 25, []),
            (1024, 200, "uniform", 10, []),
            (4096, 20, "uniform", 8, []),
            (8192, 20, "uniform", 10, [within(COPIES, 1.5)]),
            (8192, 20, "BPE", 10, [within(COPIES, 1.5)]),
        )
    ),
    Case(over_vocabulary, sizes=[65, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]),
]

CUDA_CASES = [
    Case(step, headline=STEP, target=5),
    Case(captured_step, headline="forward, backward and AdamW in a CUDA graph", vocab_size=65),
    Case(fit_in_graphs, headline=f"`fit`: {STEPS} steps of that loop", num_steps=STEPS),
]
