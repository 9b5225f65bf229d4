"""Generation of text: the lecture's loop and the native chain, the same tokens from the same seed."""

from __future__ import annotations

from typing import Any

import torch

import bigramx
from benchmarks.timing import side_by_side
from bigramx import reference


def one_start(rounds: int) -> dict[str, Any]:
    """500 tokens from one start, sampler "torch", V = 65."""
    eager = reference.BigramLanguageModel(65)
    ours = bigramx.BigramLanguageModel(65)
    ours.load_state_dict(eager.state_dict())
    idx = torch.zeros((1, 1), dtype=torch.long)
    seconds = side_by_side(
        {
            "bigramx": lambda: ours.generate(idx, 500, sampler="torch"),
            "eager": lambda: eager.generate(idx, 500),
        },
        rounds=rounds,
    )
    return {
        "job": 'generate 500 tokens from one start, sampler "torch", V=65',
        "seconds": seconds,
        "ratio": seconds["eager"] / seconds["bigramx"],
        "reach": 30.0,
    }
