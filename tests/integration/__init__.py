"""Frameworks that train a model, each with the lecture's class and with ours.

`make integration` installs them into an environment of its own, and runs these files there. In an environment without a
framework its file is skipped.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest


def framework(name: str) -> Any:
    """The module; whoever imports it is skipped where it is not installed, except by `make integration`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what frameworks say while they are imported
        if os.environ.get("BIGRAMX_INTEGRATION"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} is not installed here: make integration", exc_type=ImportError)
