"""Writes what was measured into the README: the tables between its markers, and the pictures of the cost curves.

python benchmarks/report.py           # from benchmarks/results/cpu.json and, where it is there, cuda.json
python benchmarks/report.py --check   # writes nothing, fails where the README is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.race import OURS, Reached, Result  # noqa: E402

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Section:
    """The part of the README that tells what was measured on a device.

    Attributes:
        name: Of the device and its file of results.
        begin: Marks where it begins.
        end: And where it ends.
        method: How the times were taken.
        everything: What measures all of it again.
        one_line: What measures a line again, before the last column.
    """

    name: str
    begin: str
    end: str
    method: str
    everything: str
    one_line: str


SECTIONS = [
    Section(
        "cpu",
        "<!-- measured -->",
        "<!-- /measured -->",
        "Medians of alternating rounds, all of a line in one run, on this machine",
        "make bench",
        ".venv/bin/python benchmarks/run.py",
    ),
    Section(
        "cuda",
        "<!-- measured on cuda -->",
        "<!-- /measured on cuda -->",
        "Medians of CUDA-event times in alternating rounds, the inputs rotated past the L2, all of a line in one run, "
        "on this GPU",
        "make bench-cuda",
        ".venv/bin/python benchmarks/run.py --device cuda",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where the README is out of date")
    arguments = parser.parse_args()

    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = old
    measured = [section for section in SECTIONS if results_of(section).exists()]
    for section in measured:
        new = replaced(new, markdown(*read(results_of(section)), section), section)
    if not arguments.check:
        path.write_text(new, encoding="utf-8")
        for section in measured:
            draw_curves(results_of(section))
    elif new != old:
        sys.exit("README.md is not what benchmarks/results says; type: python benchmarks/report.py")


def results_of(section: Section) -> Path:
    """The file that run.py writes."""
    return RESULTS / f"{section.name}.json"


def read(file: Path) -> tuple[dict[str, str], list[Result]]:
    """The machine and the results that run.py wrote."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["machine"], [Result.from_json(result) for result in content["results"]]


def replaced(text: str, block: str, section: Section) -> str:
    """The text with the block between the section's markers."""
    before, _, rest = text.partition(section.begin)
    _, end, after = rest.partition(section.end)
    if not end:
        raise ValueError(f"expected the markers {section.begin} and {section.end} in README.md")
    return f"{before}{section.begin}\n{block}\n{section.end}{after}"


def markdown(machine: dict[str, str], results: Sequence[Result], section: Section) -> str:
    """What the README says of the results."""
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    times = [
        [
            result.job,
            ours(result),
            fastest_peer(result),
            "; ".join(reached(reach) for reach in result.reaches),
            "; ".join(over_other_floors(result)),
            f"`--only {result.bench}`",
        ]
        for result in results
        if not result.series
    ]
    memory = [
        [result.job, bandwidth(result), peak(result, OURS), "; ".join(peak_of_peers(result))]
        for result in results
        if result.bytes_per_second is not None or result.peak_bytes
    ]
    curves = [f"![{r.job}](benchmarks/results/{picture(r, section.name)})" for r in results if r.series]
    head = ["Job", "bigramx", "the fastest peer", "reach (bold: missed)", "other floors", "command"]
    return "\n\n".join(
        [
            f"{section.method}: {described}.",
            f"`{section.everything}` measures all; `{section.one_line}` with the last column measures one again.",
            table(head, times),
            "What a call moves through memory at least, over its time, and the most memory it held at once:",
            table(["Job", "bytes a second", "memory at once", "that of others"], memory),
            *curves,
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(results: Sequence[Result]) -> str:
    """A line for each reach: the job, the figure, the reach, whether it was met, and the floors."""
    head = ["job", "figure", "reach", "met", "bigramx", "times the floor"]
    rows = [
        [result.job, figure(reach), target(reach), met(reach), ours(result), "; ".join(over_floors(result).values())]
        for result in results
        for reach in result.reaches
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows])
    return "\n".join(line.rstrip() for line in lines)


def details(result: Result) -> Iterator[str]:
    """Every time of a result, a line each."""
    for name, seconds in result.seconds.items():
        ratio = "" if name == OURS else f", {seconds / result.seconds[OURS]:.3g}x"
        memory = f", {peak(result, name)} at once" if name in result.peak_bytes else ""
        yield f"{name}: {format_seconds(seconds)} {spread(result, name)}{ratio}{memory}"
    for name, seconds in result.floors.items():
        multiple = f"bigramx takes {result.seconds[OURS] / seconds:.3g} times that"
        yield f"floor: {name}: {format_seconds(seconds)} {spread(result, name)}, {multiple}"
    if result.bytes_per_second is not None:
        yield bandwidth(result)
    for name, reason in result.skipped.items():
        yield f"{name} skipped: {reason}"


def spread(result: Result, name: str) -> str:
    lower, upper = result.quartiles[name]
    return f"({format_seconds(lower)} to {format_seconds(upper)})"


def ours(result: Result) -> str:
    """Our time, or why there is none."""
    if OURS in result.seconds:
        return format_seconds(result.seconds[OURS])
    return result.skipped.get(OURS, "")


def fastest_peer(result: Result) -> str:
    """Its time, its name, and how often ours goes into it."""
    peers = {name: seconds for name, seconds in result.seconds.items() if not name.startswith(OURS)}
    if not peers:
        return ""
    name = min(peers, key=lambda name: peers[name])
    return f"{format_seconds(peers[name])}, {name}: {peers[name] / result.seconds[OURS]:.3g}x"


def reached(reach: Reached) -> str:
    """In Markdown."""
    said = f"{figure(reach)} ({target(reach)})"
    return f"**{said}**" if reach.met is False else said


def figure(reach: Reached) -> str:
    return "not measured" if reach.figure is None else f"{reach.figure:.3g}{reach.unit}"


def target(reach: Reached) -> str:
    return f"{reach.relation} {reach.target:g}" + (reach.unit if reach.figure is None else "")


def met(reach: Reached) -> str:
    return {True: "yes", False: "NO", None: "-"}[reach.met]


def over_floors(result: Result) -> dict[str, str]:
    """Our time over each floor."""
    if OURS not in result.seconds:
        return {}
    return {name: f"{result.seconds[OURS] / seconds:.3g}x {name}" for name, seconds in result.floors.items()}


def over_other_floors(result: Result) -> list[str]:
    """Those that no reach names."""
    units = [reach.unit for reach in result.reaches]
    return [said for name, said in over_floors(result).items() if not any(unit.endswith(name) for unit in units)]


def bandwidth(result: Result) -> str:
    return "" if result.bytes_per_second is None else f"{format_bytes(result.bytes_per_second)}/s"


def peak(result: Result, name: str) -> str:
    return format_bytes(result.peak_bytes[name]) if name in result.peak_bytes else ""


def peak_of_peers(result: Result) -> list[str]:
    return [f"{name} {peak(result, name)}" for name in result.peak_bytes if name != OURS]


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_bytes(count: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def picture(result: Result, name: str) -> str:
    """The file of a cost curve among the results of this name."""
    prefix = "" if name == SECTIONS[0].name else f"{name}_"
    return f"{prefix}cost_over_{next(iter(result.series)).lower()}.png"


def draw_curves(file: Path) -> None:
    """Draws the cost curves of these results beside them, where there is something to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print("no cost curves are drawn: matplotlib is not installed")
        return
    _machine, results = read(file)
    for result in results:
        if result.series:
            draw(result, file.with_name(picture(result, file.stem)))


def draw(result: Result, path: Path) -> None:
    """A cost curve on two logarithmic axes."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.add_subplot()
    (over, sizes), *series = result.series.items()
    for (name, seconds), color in zip(series, ("#2563a8", "#d9772b", "#9aa3ad"), strict=False):
        sized = sizes[: len(seconds)]  # the largest may not have fitted into memory
        axes.loglog(sized, [1e3 * second for second in seconds], color=color, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(over)
    axes.set_ylabel("milliseconds")
    axes.set_title(result.job)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    canvas.savefig(path, dpi=144)


if __name__ == "__main__":
    main()
