"""Writes what was measured: the headlines into README.md, all of it into benchmarks/results/README.md, with pictures.

python benchmarks/report.py            # from benchmarks/results/cpu.json and, if it exists, cuda.json
python benchmarks/report.py --check    # writes nothing, fails if either file is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import cycle, groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.comparison import OURS, Outcome, Result  # noqa: E402
from benchmarks.timing import Times  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
METHODS = {
    "cpu": "Medians of alternating rounds, each line from one run",
    "cuda": "Medians of CUDA-event times in alternating rounds, inputs rotated past the L2, each line from one run",
}
LINK = (
    "`make bench` measures everything again; [benchmarks/results](benchmarks/results/README.md) shows all cases with "
    "their targets, lower bounds, memory and cost curves."
)
LEGEND = """# Measured

Times are medians, with the quartiles in parentheses. The time of another implementation is followed by its ratio to
that of bigramx, a lower bound by how many times as long bigramx takes, a figure by its target. The rate is the bytes
that must be read and written at least over the time of bigramx; memory is the most that a call held at once beyond its
inputs. `make bench` and `make bench-cuda` measure everything again."""
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3, "bytes": 1.0}
Machine = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if either file is out of date")
    if not parser.parse_args().check:
        write()
    elif stale := [str(path) for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]:
        sys.exit(f"out of date: {', '.join(stale)}; run: python benchmarks/report.py")


def write() -> None:
    """Writes the pages, and draws the cost curves."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for device in METHODS:
        for result in read(RESULTS / f"{device}.json")[1]:
            if result.series:
                draw(result, RESULTS / picture(device, result))


def read(file: Path) -> tuple[Machine, list[Result]]:
    """The machine and the results that run.py wrote; nothing if there is no such file."""
    if not file.exists():
        return {}, []
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["machine"], [Result.from_json(result) for result in content["results"]]


def pages() -> dict[Path, str]:
    """The text of README.md, with its blocks replaced, and of the page of all results."""
    readme = ROOT / "README.md"
    measured = [(device, *read(RESULTS / f"{device}.json")) for device in METHODS]
    blocks = {
        "perplexities": perplexities([result for file in measured for result in file[2]]),
        "measured": "\n\n".join([*(headlines(*file) for file in measured if file[2]), LINK]),
    }
    text = readme.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = with_block(text, name, block)
    page = "\n\n".join([LEGEND, *(section(*file) for file in measured if file[2])])
    return {readme: text, RESULTS / "README.md": f"{page}\n"}


def with_block(text: str, name: str, block: str) -> str:
    """The text with another block between its markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected the markers {begin} and {end} in README.md")
    return f"{before}{begin}\n{block}\n{end}{after}"


def perplexities(results: Sequence[Result]) -> str:
    """The table of README.md: a row for each vocabulary, a column for each method."""
    rows = []
    for result in results:
        if result.bench == "perplexity" and result.targets:
            figures = {target.unit.rpartition(", ")[2]: f"{target.figure:.1f}" for target in result.targets}
            rows.append({"vocabulary": [result.headline], **{method: [figure] for method, figure in figures.items()}})
    return table(rows)


def headlines(device: str, machine: Machine, results: Sequence[Result]) -> str:
    """The table of README.md."""
    rows = [headline(device, result) for result in results if result.headline and OURS in result.implementations]
    return f"{described(device, machine)}\n\n{table(rows)}"


def headline(device: str, result: Result) -> dict[str, list[str]]:
    """A row: our time, and that of the fastest peer with its ratio to ours."""
    ours = result.implementations[OURS].median
    medians = sorted((times.median, name) for name, times in result.implementations.items())
    peers = [(median, name) for median, name in medians if not name.startswith(OURS)]
    return {
        "what": [result.headline],
        OURS: [in_units(ours, SECONDS)],
        "the fastest peer": [f"{in_units(m, SECONDS)}, {name}: {m / ours:.3g}x" for m, name in peers[:1]],
        "command": [f"`{command(device, result.bench)}`"],
    }


def section(device: str, machine: Machine, results: Sequence[Result]) -> str:
    """All that was measured on a device: for each file its command, a table, its cost curves."""
    parts = [f"## {device}", described(device, machine)]
    for bench, group in groupby(results, key=lambda result: result.bench):
        cases = list(group)
        parts.append(f"### {bench}\n\n    {command(device, bench)}")
        parts.append(table([cells(result) for result in cases if not result.series]))
        parts += [f"![{result.case}]({picture(device, result)})" for result in cases if result.series]
    return "\n\n".join(part for part in parts if part)


def described(device: str, machine: Machine) -> str:
    """How it was measured, and where."""
    return f"{METHODS[device]}: {', '.join(f'{name} {value}' for name, value in machine.items())}."


def command(device: str, bench: str) -> str:
    """Measures it again."""
    return f".venv/bin/python benchmarks/run.py{' --device cuda' * (device == 'cuda')} --only {bench}"


def table(rows: Sequence[dict[str, list[str]]]) -> str:
    """In Markdown, the keys as its head; nothing without rows."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(map("<br>".join, row.values()) for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(result: Result) -> dict[str, list[str]]:
    """A row of the results' page, whose LEGEND explains it."""
    skipped, others = dict(result.skipped), dict(result.implementations)
    ours = others.pop(OURS, None)
    median, reason = ours.median if ours else float("nan"), skipped.pop(OURS, None)
    return {
        "case": [result.case],
        OURS: [spread(ours)] if ours else [reason] if reason else [],
        "others": [f"{name} {spread(times)}: {times.median / median:.3g}x" for name, times in others.items()]
        + [f"{name}: {reason}" for name, reason in skipped.items()],
        "lower bounds": [f"{name} {spread(b)}: {median / b.median:.3g}x" for name, b in result.lower_bounds.items()],
        "targets": [outcome(target) for target in result.targets],
        "rate": [f"{in_units(result.bytes_moved / median, BYTES)}/s"] if result.bytes_moved and ours else [],
        "memory": [f"{name} {in_units(peak, BYTES)}" for name, peak in result.peak_bytes.items()],
    }


def spread(times: Times) -> str:
    """The median and the quartiles."""
    median, lower, upper = (in_units(time, SECONDS) for time in (times.median, times.lower, times.upper))
    return f"{median} ({lower} to {upper})"


def outcome(target: Outcome) -> str:
    """The figure, the target, and whether it was missed."""
    figure = "not measured: " if target.figure is None else f"{target.figure:.3g}"
    return f"{figure}{target.unit} ({target.relation} {target.target:g}{', missed' * (target.met is False)})"


def in_units(value: float, units: dict[str, float]) -> str:
    """Three digits and a unit."""
    unit = next((unit for unit, size in units.items() if value >= size), [*units][-1])
    return f"{value / units[unit]:.3g} {unit}"


def picture(device: str, result: Result) -> str:
    """The file of a cost curve, beside the results."""
    return f"{device}_{result.bench}_over_{next(iter(result.series)).lower()}.png"


def draw(result: Result, path: Path) -> None:
    """A cost curve on two logarithmic axes."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 4.5), layout="constrained")
    (over, sizes), *series = result.series.items()
    axes = canvas.add_subplot(title=result.case, xlabel=over, ylabel="milliseconds")
    for (name, seconds), color in zip(series, cycle(("#2563a8", "#d9772b", "#9aa3ad", "#4f9d69")), strict=False):
        milliseconds = [1e3 * second for second in seconds]  # fewer than sizes if the largest did not fit into memory
        axes.loglog(sizes[: len(seconds)], milliseconds, color=color, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    canvas.savefig(path, dpi=144)


if __name__ == "__main__":
    main()
