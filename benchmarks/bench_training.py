"""The lecture's whole step, and the loop of 3000 of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import bigramx
from benchmarks import floors, peers
from benchmarks.race import (
    OURS,
    Effort,
    Race,
    Reach,
    Result,
    as_tensor,
    assert_means_within,
    assert_within,
    faster_than,
)
from benchmarks.timing import Function
from bigramx import data, optim, reference

STEPS = 3000


def step(effort: Effort, target: float) -> Result:
    """Batch, forward, backward, optimizer: the same lines with three imports changed."""
    device = effort.device
    race = Race(
        "the lecture's step: get_batch, forward, backward, AdamW, V=65 B=32 T=8", [faster_than("the lecture's", target)]
    )
    tokens = peers.text_tokens(10**6).to(device.name)
    ours, eager = bigramx.BigramLanguageModel(65), reference.BigramLanguageModel(65)
    ours.load_state_dict(eager.state_dict())
    our_optimizer = optim.AdamW(ours.to(device.name).parameters(), lr=1e-2)
    eager_optimizer = torch.optim.AdamW(eager.to(device.name).parameters(), lr=1e-2)
    race.add(OURS, partial(peers.lecture_step, ours, our_optimizer, data.get_batch, tokens))
    race.add("the lecture's", partial(peers.lecture_step, eager, eager_optimizer, peers.lecture_get_batch, tokens))
    return race.run(effort)


def captured_step(effort: Effort, vocab_size: int) -> Result:
    """Forward, backward, optimizer as one launch: the lecture's lines on a batch that lies still."""
    device = effort.device
    race = Race(
        f"a captured step: forward, backward, AdamW, V={vocab_size} B=32 T=8",
        [Reach(" us", "<=", 12, lambda seconds: seconds[OURS] * 1e6), faster_than("eager", 2)],
        same=assert_within(1e-3),
    )
    tokens = peers.text_tokens(10_000, vocab_size)
    idx, targets = (tensor.to(device.name) for tensor in peers.lecture_get_batch(tokens, 32, 8))
    start = reference.BigramLanguageModel(vocab_size).state_dict()

    def captured(
        model: nn.Module, make_optimizer: Callable[..., torch.optim.Optimizer], forward: Any = None
    ) -> Function:
        model.load_state_dict(start)
        optimizer = make_optimizer(model.to(device.name).parameters(), lr=1e-2, capturable=device.captures)
        step = partial(peers.lecture_step, forward or model, optimizer, lambda *_sizes: (idx, targets), tokens)
        return device.captured(step)

    def compiled() -> Function:
        model = reference.BigramLanguageModel(vocab_size)
        return captured(model, fused, peers.compiled(model))

    ours, without_logits = (bigramx.BigramLanguageModel(vocab_size) for _ in range(2))
    fused, foreach = partial(torch.optim.AdamW, fused=True), partial(torch.optim.AdamW, foreach=True)
    race.add(OURS, captured(ours, optim.AdamW))
    race.add("bigramx, no logits", captured(without_logits, optim.AdamW, partial(without_logits, return_logits=False)))
    race.add("eager", captured(reference.BigramLanguageModel(vocab_size), fused))
    race.add("eager, foreach=True", captured(reference.BigramLanguageModel(vocab_size), foreach))
    if not effort.quick:
        race.add_peer("torch.compile", compiled)
    return race.run(effort)


def fit(effort: Effort) -> Result:
    """3000 steps, the loss of each kept; the last 500 must come out alike."""
    last_losses_alike = assert_means_within(0.03)
    race = Race(
        "fit, 3000 steps, V=65 B=32 T=8",
        [faster_than("the lecture's loop", 80), faster_than("JAX lax.scan", 8)],
        same=lambda actual, expected: last_losses_alike(as_tensor(actual)[-500:], as_tensor(expected)[-500:]),
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

    race.add(OURS, ours)
    race.add("the lecture's loop", lecture_loop)
    race.add_peer("JAX lax.scan", jax_scan)
    race.add_floor("the exponentials and AdamW's arithmetic", lambda: floors.exp_and_adamw(STEPS * 65 * 65))
    return race.run(effort)


JOBS = [partial(step, target=10), fit]

CUDA_JOBS = [partial(step, target=5), partial(captured_step, vocab_size=65)]
