"""A whole training step of the lecture's script, and 3000 of them in `fit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import bigramx
from benchmarks import lower_bounds, peers
from benchmarks.comparison import (
    OURS,
    Case,
    Comparison,
    Result,
    RunConfig,
    as_tensor,
    assert_means_within,
    assert_within,
    at_most,
    faster_than,
)
from benchmarks.timing import Function
from bigramx import data, optim, reference

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


STEP = "a step of the lecture's loop: batch, forward, backward, AdamW"

CASES = [
    Case(step, headline=STEP, target=10),
    Case(fit, headline="`fit`: 3000 steps of that loop"),
]

CUDA_CASES = [
    Case(step, headline=STEP, target=5),
    Case(captured_step, headline="forward, backward and AdamW in a CUDA graph", vocab_size=65),
]
