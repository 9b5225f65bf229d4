"""With BIGRAMX_EXTENSION, loads that extension in place of the package's own.

Those are built into a folder of their own in build/: simt for the GPU emulator (tests/simt), asan, tsan and others for
the sanitizers (tests/trust/sanitizers.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys

if extension := os.environ.get("BIGRAMX_EXTENSION"):
    import torch  # noqa: F401  (loads the libraries that the extension needs)

    spec = importlib.util.spec_from_file_location("bigramx._C", extension)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bigramx._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bigramx._C"])
