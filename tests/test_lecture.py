"""The lecture's script prints the same output with either model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bigramx import data
from tests import processes

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lecture.py"


def run(model: str, text: Path, seed: int) -> tuple[list[float], str]:
    """The losses that the script prints, and the text after them."""
    options = ["--model", model, "--data", str(text), "--seed", str(seed), "--steps", "301"]
    output = processes.run([sys.executable, SCRIPT, *options], check=True).stdout
    losses = re.findall(r"^step \d+: train loss (\S+), val loss (\S+)$", output, flags=re.MULTILINE)
    written = output.split(f"val loss {losses[-1][1]}\n")[-1]
    return [float(loss) for pair in losses for loss in pair], written


def test_same_losses_and_text(tmp_path: Path) -> None:
    text = tmp_path / "input.txt"
    text.write_text(data.default_text(), encoding="utf-8")
    losses, written = run("bigramx", text, seed=1)
    expected_losses, expected = run("reference", text, seed=1)
    assert len(losses) == 6
    assert losses == pytest.approx(expected_losses, abs=1.0001e-4)
    assert len(written) > 500
    assert written == expected
