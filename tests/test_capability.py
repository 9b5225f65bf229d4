"""Each CPU capability that this machine can run passes the tests of the vectorised kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigramx

CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
VECTORISED = [
    "test_embedding_cross_entropy.py",
    "test_adamw.py",
    "test_fit.py",
    "test_count_bigrams.py",
    "test_multinomial.py",
    "test_generate.py",
]


def can_run(capability: str) -> bool:
    levels = list(CAPABILITIES.values())
    here = torch.backends.cpu.get_cpu_capability()
    return here in levels and levels.index(CAPABILITIES[capability]) <= levels.index(here)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_under(capability: str) -> None:
    if not can_run(capability):
        pytest.skip(f"this machine cannot run {capability}")
    if CAPABILITIES[capability] == bigramx.build_info()["cpu_capability"]:
        return  # what all other tests run under
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    script = "import bigramx; print(bigramx.build_info()['cpu_capability'])"
    in_use = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert in_use.stdout.strip() in {CAPABILITIES[capability], "NO AVX"}
    tests = [str(Path(__file__).with_name(name)) for name in VECTORISED]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
