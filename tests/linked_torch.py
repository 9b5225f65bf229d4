"""Puts the torch of this environment into another of the same Python, by hard links, with what Python compiled of it.

python -m tests.linked_torch ENVIRONMENT

pip then finds there what it would unpack once more, and Python what it would compile: a minute an environment.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import distribution
from importlib.util import cache_from_source
from pathlib import Path


def link_torch(environment: Path) -> None:
    """Into an environment that has no torch yet."""
    torch = distribution("torch")
    here = Path(str(torch.locate_file("")))
    there = environment / here.relative_to(sys.prefix)
    files = {str(path) for path in torch.files or [] if ".." not in path.parts}  # else a script, in bin
    caches = {cache_from_source(path) for path in files if path.endswith(".py") and sys.pycache_prefix is None}
    for path in files | {cache for cache in caches if (here / cache).exists()}:
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(here / path, there / path)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(here / path, there / path)


if __name__ == "__main__":
    link_torch(Path(sys.argv[1]))
