"""What each target of `make trust` tried, and what fell: printed, kept beside the machine, shown as one table.

python -m tests.trust.report            # writes results/README.md from results/*.json
python -m tests.trust.report --check    # writes nothing, fails if that page is out of date
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tests.tree import ROOT

RESULTS = Path(__file__).parent / "results"
KEEP = "BIGRAMX_TRUST_KEEP"  # set by make trust: what comes out is kept in RESULTS
INTRODUCTION = """# What was tried

`make trust` runs all of it again, and writes this page; each line is one target of the Makefile. A finding is a case
that broke a promise of [SECURITY.md](../../../SECURITY.md)."""


@dataclass
class Trial:
    """What one target did.

    Attributes:
        target: The command, such as "make fuzz".
        tried: How often what was tried: {"calls": 120000, "ops": 9}.
        findings: One line for each case that broke a promise.
        seconds: How long it took.
        machine: Where.
        date: When, in UTC.
    """

    target: str
    tried: dict[str, int]
    findings: list[str]
    seconds: float
    machine: dict[str, str] = field(default_factory=dict)
    date: str = ""


def run(target: str, trial: Callable[[], tuple[Mapping[str, int], Sequence[str]]]) -> None:
    """Runs what a target tries, which returns what was tried how often and the findings; exits with 1 if there are any.

    The process's standard output ends with the summary.
    """
    begin = time.perf_counter()
    tried, findings = trial()
    done = Trial(target, dict(tried), list(findings), round(time.perf_counter() - begin, 1))
    for finding in done.findings:
        print(f"{target}: finding: {finding}", flush=True)
    print(f"{target}: {_counts(done)} in {done.seconds:.0f} s; findings: {len(done.findings) or 'none'}", flush=True)
    if KEEP in os.environ:
        _keep(done)
    sys.exit(1 if done.findings else 0)


def _counts(trial: Trial) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in trial.tried.items())


def _keep(trial: Trial) -> None:
    trial.machine, trial.date = _machine(), time.strftime("%Y-%m-%d", time.gmtime())
    trial.findings = [without_places(finding) for finding in trial.findings]
    name = trial.target.removeprefix("make ").replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(asdict(trial), indent=2) + "\n", encoding="utf-8")


def without_places(finding: str) -> str:
    """Names the machine's own folders by what they are: a finding that is kept says nothing of where it was made."""
    places = {"the checkout": ROOT, "the environment": Path(sys.prefix), "python": Path(sys.base_prefix)}
    places |= {"temporary": Path(tempfile.gettempdir()), "home": Path.home()}
    for name, place in places.items():
        finding = finding.replace(f"{place}{os.sep}", f"<{name}>{os.sep}")
    return finding


def _machine() -> dict[str, str]:
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def page() -> str:
    """The table of all trials that are kept."""
    trials = [Trial(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))]
    rows = ["| target | tried | time | findings |", "| --- | --- | --- | --- |"]
    for trial in trials:
        findings = "<br>".join(finding.splitlines()[0] for finding in trial.findings) or "none"
        rows.append(f"| `{trial.target}` | {_counts(trial)} | {_duration(trial.seconds)} | {findings} |")
    places = sorted({f"{trial.date}: {', '.join(f'{k} {v}' for k, v in trial.machine.items())}." for trial in trials})
    return "\n\n".join([INTRODUCTION, "\n".join(rows), *places]) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    path = RESULTS / "README.md"
    if not parser.parse_args().check:
        path.write_text(page(), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != page():
        sys.exit(f"out of date: {path}; run: python -m tests.trust.report")


if __name__ == "__main__":
    main()
