"""tests/one_by_one.py: each test has an outcome, whatever the others do to their process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import one_by_one

TESTS = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert False, "as it should"
@pytest.mark.skip(reason="as it should")
def test_is_skipped(): pass
def test_aborts(): os.abort()
def test_hangs(): time.sleep(100)
def test_breaks_the_gpu(): raise RuntimeError("CUDA error: an illegal memory access")
def test_process(): print(os.getpid())
@pytest.fixture
def broken(): raise ValueError("in the setup")
def test_setup(broken): pass
"""


def test_outcomes(tmp_path: Path) -> None:
    path, out = tmp_path / "test_these.py", tmp_path / "tests.jsonl"
    path.write_text(TESTS)
    tests = one_by_one.run([str(path)], out, seconds=2, limit=100)
    outcomes = {test["test"].partition("::test_")[2]: test["outcome"] for test in tests}
    assert outcomes == {
        "passes": "passed",
        "fails": "failed",
        "is_skipped": "skipped",
        "aborts": "died",
        "hangs": "died",
        "breaks_the_gpu": "failed",
        "process": "passed",
        "setup": "failed",
    }
    messages = {test["test"].partition("::test_")[2]: test["message"] for test in tests}
    assert "as it should" in messages["fails"]
    assert "time.sleep(100)" in messages["hangs"] or "in test_hangs" in messages["hangs"]
    assert one_by_one.summary(tests).splitlines()[-1] == "2 passed, 3 failed, 2 died, 1 skipped"
    path.write_text(
        TESTS.replace('assert False, "as it should"', "pass").replace(
            "def test_passes(): pass", "def test_passes(): 1 / 0"
        )
    )
    again = {test["test"]: test["outcome"] for test in one_by_one.run([str(path)], out, seconds=2, limit=100)}
    assert again[f"{tests[1]['test']}"] == "passed", "what failed is run again"
    assert again[f"{tests[0]['test']}"] == "passed", "what passed is not"


def test_the_end_of_the_time_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "test_these.py"
    path.write_text("import time\ndef test_first(): pass\ndef test_second(): time.sleep(100)\n")
    tests = one_by_one.run([str(path)], tmp_path / "tests.jsonl", seconds=90, limit=9)
    assert [test["outcome"] for test in tests] == ["passed", "started"]


def test_nothing_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "test_these.py"
    path.write_text("import nowhere\n")
    assert one_by_one.run([str(path)], tmp_path / "tests.jsonl", seconds=2, limit=100) == []
    assert "nowhere" in capsys.readouterr().out
