"""The vectorised kernels pass their tests under each CPU capability that this machine has.

This is the short form: under another capability than the machine's one case of 32 of each test; make asan runs all
under each.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

import bigramx
from tests import processes, tree

SHORT_FORM = ["--every=32", "--hypothesis-profile=few"]
CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


def can_run(capability: str) -> bool:
    levels = list(CAPABILITIES.values())
    here = torch.backends.cpu.get_cpu_capability()
    return here in levels and levels.index(CAPABILITIES[capability]) <= levels.index(here)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_under(capability: str) -> None:
    if not can_run(capability):
        pytest.skip(f"this machine cannot run {capability}")
    if CAPABILITIES[capability] == bigramx.build_info()["cpu_capability"]:
        return  # all other tests run under it
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    script = "import bigramx; print(bigramx.build_info()['cpu_capability'])"
    in_use = processes.run([sys.executable, "-c", script], env=environment, check=True).stdout.strip()
    assert in_use in {CAPABILITIES[capability], "NO AVX"}
    tests = [str(tree.TESTS / name) for name in tree.vectorised_tests()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SHORT_FORM, *tests]
    result = processes.run(command, env=environment, seconds=3600)
    assert result.returncode == 0, result.stdout[-3000:]
