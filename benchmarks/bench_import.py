"""What importing bigramx adds to importing torch, in whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.comparison import OURS, Case, Comparison, Result, RunConfig, at_most


def start(script: str) -> None:
    """Runs a script in a new process."""
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": root})


def importing(config: RunConfig) -> Result:
    """Import torch, bigramx."""
    more = at_most(60, " ms more", lambda medians: (medians[OURS] - medians["import torch"]) * 1e3)
    comparison = Comparison("import torch, bigramx: beyond import torch", [more])
    comparison.add(OURS, partial(start, "import torch, bigramx"))
    comparison.add("import torch", partial(start, "import torch"))
    return comparison.run(config)


CASES = [Case(importing)]
