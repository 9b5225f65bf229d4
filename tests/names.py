"""Names of tests' parameters that are the same in each process, as pytest-xdist compares them between its workers."""

from __future__ import annotations

import re

from torch import Tensor


def name_of(value: object) -> str:
    """What str gives, without addresses and the numbers of tensors."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={name_of(entry)}" for key, entry in value.items())
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
