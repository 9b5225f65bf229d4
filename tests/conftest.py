"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# What torch.compile keeps for one CPU capability corrupts memory under another: each has a folder of its own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"bigramx_inductor_{torch.backends.cpu.get_cpu_capability()}"),
)

settings.register_profile("bigramx", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("bigramx")


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test lie."""
    return torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine has; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
