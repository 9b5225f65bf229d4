"""What importing bigramx adds to importing torch, in whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.race import OURS, Effort, Race, Reach, Result


def start(script: str) -> None:
    """Runs a script in a new process."""
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": root})


def importing(effort: Effort) -> Result:
    """Import torch, bigramx."""
    beyond = Reach(" ms more", "<=", 60, lambda seconds: (seconds[OURS] - seconds["import torch"]) * 1e3)
    race = Race("import torch, bigramx: beyond import torch", [beyond])
    race.add(OURS, partial(start, "import torch, bigramx"))
    race.add("import torch", partial(start, "import torch"))
    return race.run(effort)


JOBS = [importing]
