from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests import processes
from tests.tree import ROOT
from tests.trust import report


def test_the_page_is_that_of_the_results() -> None:
    assert (report.RESULTS / "README.md").read_text(encoding="utf-8") == report.page()


@pytest.mark.parametrize("findings", [[], ["a crash", "a hang"]])
def test_a_trial(
    findings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setenv(report.KEEP, "1")
    with pytest.raises(SystemExit) as ended:
        report.run("make fuzz-files", lambda: ({"files": 12_345, "kinds": 3}, findings))
    assert ended.value.code == (1 if findings else 0)
    assert "12,345 files, 3 kinds" in capsys.readouterr().out
    kept = json.loads((tmp_path / "results" / "fuzz-files.json").read_text(encoding="utf-8"))
    assert kept["findings"] == findings
    assert kept["machine"]["cores"]
    assert f"| `make fuzz-files` | 12,345 files, 3 kinds | 0 s | {'<br>'.join(findings) or 'none'} |" in report.page()


def test_what_is_kept_names_no_place_of_the_machine() -> None:
    places = [
        ROOT / "tests/x.py",
        Path(os.__file__),
        Path(pytest.__file__),
        Path.home() / "y",
        Path(tempfile.gettempdir(), "z"),
    ]
    finding = report.without_places("\n".join(f'File "{place}", line 1' for place in places))
    for place in (ROOT, sys.prefix, sys.base_prefix, Path.home(), tempfile.gettempdir()):
        assert f"{place}{os.sep}" not in finding
    assert finding.startswith('File "<the checkout>/tests/x.py", line 1\nFile "<python>/')


def test_nothing_is_kept_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.delenv(report.KEEP, raising=False)
    with pytest.raises(SystemExit):
        report.run("make fuzz", lambda: ({"calls": 1}, []))
    assert not (tmp_path / "results").exists()


def test_make_knows_each_target() -> None:
    """Each of make trust is a module here, and says its own name to the report."""
    (targets,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TRUST := ")]
    for target in targets.removeprefix("TRUST := ").split():
        planned = processes.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, check=True).stdout
        *_, module = [line.split(" -m ")[1].split()[0] for line in planned.splitlines() if " -m tests.trust." in line]
        source = ROOT / f"{module.replace('.', '/')}.py"
        assert "report.run(" in source.read_text(), target
