"""With BIGRAMX_SIMT, loads the extension built for the GPU emulator (tests/simt) in place of the package's own."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (loads the libraries that the extension needs)

if simt_module := os.environ.get("BIGRAMX_SIMT"):
    spec = importlib.util.spec_from_file_location("bigramx._C", simt_module)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bigramx._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bigramx._C"])
