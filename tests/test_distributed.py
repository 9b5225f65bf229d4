"""DTensor tables, and models and optimizers under PyTorch's wrappers, on four ranks of this machine."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import torch.distributed as dist

from tests import processes
from tests.tree import ROOT, TESTS

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

CHECKS = re.findall(r"^@check\ndef (\w+)", (TESTS / "distributed_checks.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each rank raised, by check."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.distributed_checks", str(folder)]
    ended = processes.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    path = folder / "problems.json"
    found: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    if ended.returncode != 0:
        found[[*CHECKS, "the end"][len(found)]] = [ended.stdout + ended.stderr]
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_on_all_ranks(name: str, problems: dict[str, list[str]]) -> None:
    assert name in problems, "the ranks did not get this far"
    assert [problem for problem in problems[name] if problem] == []


def test_the_ranks_end(problems: dict[str, list[str]]) -> None:
    assert "the end" not in problems
