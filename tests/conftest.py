"""Fixtures and settings that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

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
