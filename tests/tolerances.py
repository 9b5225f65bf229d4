"""Tolerances anchored to the error of eager PyTorch itself."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_close_as_eager(actual: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> None:
    """Fails if the error against the float64 result exceeds twice eager's own error plus a rounding.

    Where eager itself overflows, as float16 sums do, only the rounding of the result counts. `terms`: the largest
    magnitude among the terms of a sum that may cancel.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape == exact.shape
    if exact.numel() == 0:
        return
    exact = exact.double()
    finite = exact.isfinite()
    torch.testing.assert_close(actual.double()[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max()
    eager_error = (eager.double() - exact)[finite].abs().nan_to_num(0, 0, 0).max()
    rounding = 4 * torch.finfo(actual.dtype).eps * max(float(exact[finite].abs().max()), terms)
    assert error <= 2 * eager_error + rounding, f"error {error:.3g}, eager's {eager_error:.3g}, rounding {rounding:.3g}"
