"""The benchmarks' own machinery: turns, checks of the peers, targets, what is kept and written."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bigramx
from benchmarks import bench_embedding_cross_entropy, comparison, peers, report, run, timing
from benchmarks.comparison import OURS, Case, Comparison, Outcome, Result, RunConfig, faster_than
from benchmarks.device import CPU, CUDA, Device
from benchmarks.timing import Function, Times
from tests import processes
from tests.tree import ROOT

OPS = ("adamw", "count_bigrams", "embedding_cross_entropy", "fit", "generate", "get_batch", "multinomial")
ONCE = RunConfig(seconds=0, min_rounds=3, quick=True)
TIMES = [(OURS, 2e-6, 1e-6, 3e-6), ("bigramx, no logits", 1e-6, 1e-6, 1e-6), ("JAX", 5e-6, 5e-6, 5e-6)]
RESULT = Result(
    "a case",
    "adamw",
    "a headline",
    {name: Times(t, lower, upper) for name, t, lower, upper in TIMES},
    lower_bounds={"a copy": Times(1e-6, 1e-6, 1e-6)},
    targets=[Outcome(2.5, "x JAX", ">=", 2), Outcome(2.0, "x a copy", "<=", 1.5), Outcome(None, "x peer", ">=", 4)],
    skipped={"NumPy": "is not installed"},
    bytes_moved=4000,
    peak_bytes={OURS: 1500, "JAX": 2_000_000},
)

PERPLEXITIES = [
    Result(
        "of a text",
        headline="V=3",
        bench="perplexity",
        targets=[
            Outcome(1.23, " perplexity, one", "<=", 2),
            Outcome(2.0, " perplexity, another", ">=", 1.23),
        ],
    ),
    Result("of another", headline="V=4", bench="perplexity", skipped={OURS: "is not installed"}),
]


class Clock:
    """A fake time.perf_counter, which only the timed functions advance."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def takes(self, name: str, *seconds: float) -> Function:
        """A function that takes so many seconds at its first, second, ... call, and the last of them from then on."""
        left = list(seconds)

        def function() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.calls += name

        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def side_by_side(functions: dict[str, Function], min_rounds: int, seconds: float = 0) -> dict[str, Times]:
    return timing.side_by_side(functions, CPU.elapsed, seconds=seconds, min_rounds=min_rounds)


class TestTiming:
    def test_takes_turns_and_gives_medians_and_quartiles(self, clock: Clock) -> None:
        uncounted = 9.0
        seconds = [second for counted in (1.0, 2.0, 3.0, 4.0, 5.0) for second in (uncounted, counted)]
        times = side_by_side({"a": clock.takes("a", uncounted, *seconds), "b": clock.takes("b", 1.0)}, min_rounds=5)
        assert clock.calls == "ab" + "aabb" * 5  # the first call of each finds out how many fill a turn
        assert times == {"a": Times(median=3, lower=2, upper=4), "b": Times(median=1, lower=1, upper=1)}

    def test_repeats_what_is_short_until_it_fills_a_turn(self, clock: Clock) -> None:
        times = side_by_side({"a": clock.takes("a", 0.003)}, min_rounds=1)
        assert len(clock.calls) == 1 + 2 + 4 + (1 + 4)  # 3, 6 and 12 ms to find out, 12 ms in the turn
        assert times["a"].median == times["a"].upper == pytest.approx(0.003)

    def test_goes_on_until_the_time_is_over(self, clock: Clock) -> None:
        side_by_side({"a": clock.takes("a", 1.0)}, min_rounds=1, seconds=10)
        assert len(clock.calls) == 1 + 10


class TestComparison:
    def test_figures_and_targets(self, clock: Clock) -> None:
        targets = [
            faster_than("peer", 4),
            comparison.within("bound", 2),
            comparison.percent_of("bound", 85),
            comparison.ns_per_token(1000, 2e6),
        ]
        compared = Comparison("case", targets)
        compared.add(OURS, clock.takes("o", 2.0))
        compared.add("peer", clock.takes("p", 6.0))
        compared.add_lower_bound("bound", clock.takes("b", 1.0))
        result = compared.run(ONCE, memory=lambda _function: 7, memory_of=(OURS, "absent"))
        assert {name: times.median for name, times in result.implementations.items()} == {OURS: 2, "peer": 6}
        outcomes = [(target.figure, target.met) for target in result.targets]
        assert outcomes == [(3, False), (2, True), (50, False), (2e6, True)]
        assert result.peak_bytes == {OURS: 7}

    @pytest.mark.parametrize("wrong", [torch.tensor([1e-9, 2e-9]), torch.tensor([1e-9]), (torch.ones(2),), "text"])
    def test_all_must_return_the_same_from_the_same_seed(self, wrong: object) -> None:
        compared = Comparison("case")
        compared.add(OURS, lambda: 1e-9 * torch.rand(2))
        compared.add("same", lambda: 1e-9 * torch.rand(2))
        compared.add_peer("wrong", lambda: lambda: wrong)
        with pytest.raises(AssertionError, match="case: wrong returns something else"):
            compared.run(ONCE)

    def test_peers_that_are_missing_or_do_not_work_are_skipped(self, clock: Clock) -> None:
        def fails(error: Exception) -> Any:
            raise error

        compared = Comparison("case", [faster_than("missing", 4)])
        compared.add(OURS, clock.takes("o", 1.0))
        compared.add_peer("missing", lambda: fails(ModuleNotFoundError("No module named 'fast'", name="fast")))
        compared.add_peer("broken", lambda: lambda: fails(RuntimeError("no compiler\nmore of it")))
        compared.add("large", lambda: fails(torch.OutOfMemoryError("tried to allocate 32 GiB")))
        result = compared.run(ONCE)
        assert result.skipped == {
            "missing": "fast is not installed",
            "broken": "does not work here: RuntimeError: no compiler",
            "large": "needs more memory: OutOfMemoryError: tried to allocate 32 GiB",
        }
        assert list(result.implementations) == [OURS]
        assert result.targets == [Outcome(None, "x missing", ">=", 4)]
        assert result.targets[0].met is None
        compared.add("torch", lambda: fails(RuntimeError("wrong")))  # which is always there
        with pytest.raises(RuntimeError, match="wrong"):
            compared.run(ONCE)


class TestDevice:
    def test_peak_of_the_allocator(self) -> None:
        def function() -> None:
            first = torch.empty(1000)
            del first
            torch.empty(3000), torch.empty(500)

        assert CPU.peak_bytes(function) == 4 * 3500

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
    def test_peak_of_the_process(self) -> None:
        size = 64 << 20
        # The system may take other memory of this process meanwhile.
        peaks = (CPU.peak_resident_bytes(lambda: torch.ones(size, dtype=torch.uint8)) for _ in range(10))
        assert any(size * 0.9 < peak < size * 1.1 for peak in peaks)

    @pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
    def test_freed_memory_counts(self) -> None:
        """That glibc keeps, below a block of the heap that is in use."""
        script = """
import ctypes, torch
from benchmarks.device import CPU
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
free(malloc(31 << 20))  # from now on blocks up to this size lie on the heap
*blocks, used = [malloc(16 << 20) for _ in range(7)]
for block in blocks:
    ctypes.memset(block, 1, 16 << 20)
    free(block)
print(CPU.peak_resident_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8)))
"""
        printed = processes.run([sys.executable, "-c", script], cwd=ROOT, check=True).stdout
        assert int(printed) > 32 << 20

    @pytest.mark.parametrize(
        ("set_bytes", "free_bytes", "num_sets"),
        [(52, 1e9, 8), (400, 1e9, 1), (396, 1e9, 2), (1000, 1e9, 1), (52, 1000, 4), (52, 100, 1)],
    )
    def test_inputs_are_rotated(
        self, monkeypatch: pytest.MonkeyPatch, set_bytes: int, free_bytes: float, num_sets: int
    ) -> None:
        emulated, numbers = EmulatedGpu(), iter(range(10))
        monkeypatch.setattr(emulated, "rotated_bytes", lambda: 400)
        monkeypatch.setattr(emulated, "free_bytes", lambda: free_bytes)
        sets = emulated.input_sets(lambda: (torch.full((set_bytes // 4,), float(next(numbers))),))
        called = timing.rotating(lambda tensor: int(tensor[0]), sets)
        assert [called() for _ in range(2 * num_sets)] == [*range(num_sets)] * 2
        assert len(CPU.input_sets(lambda: (torch.ones(1),))) == 1

    def test_the_gpu_times_between_events_and_replays_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []

        def function() -> str:
            calls.append("call")
            return "returned"

        event = SimpleNamespace(
            record=lambda: calls.append("event"),
            synchronize=lambda: calls.append("wait"),
            elapsed_time=lambda _end: 6.0,
        )
        stream = SimpleNamespace(wait_stream=lambda _other: None)
        graph = SimpleNamespace(replay=lambda: calls.append("replay"))
        for name, fake in {"Event": event, "Stream": stream, "current_stream": stream, "CUDAGraph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, lambda fake=fake, **_options: fake)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
        assert CUDA.elapsed(function, 2) == pytest.approx(6e-3)
        assert CUDA.capture(function)() == "returned"
        assert calls == ["event", "call", "call", "event", "wait", *["call"] * 4, "replay"]

    def test_memory_and_description_of_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        card = SimpleNamespace(name="a card", total_memory=80 << 30, L2_cache_size=50 << 20)
        memory = {"memory_reserved": 3000, "memory_allocated": 1000, "mem_get_info": (7000, 9000)}
        peak = {"max_memory_allocated": 1700, "reset_peak_memory_stats": None, "synchronize": None}
        for name, value in {**memory, **peak, "current_device": 0}.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
        assert CUDA.free_bytes() == 7000 + 3000 - 1000  # what the allocator keeps is free
        assert CUDA.peak_bytes(lambda: None) == 700  # beyond what was held before
        assert CUDA.rotated_bytes() == 200 << 20
        described = CUDA.describe()
        assert (described["card"], described["memory"], described["L2"]) == ("a card", "80 GiB", "50 MiB")

    def test_without_a_gpu_or_its_kernels_a_run_ends_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda"])
        monkeypatch.setattr(bigramx, "build_info", lambda: {"cuda_architectures": ""})
        for available, message in (
            (False, "PyTorch finds no CUDA device here"),
            (True, "this build of bigramx has no"),
        ):
            monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
            with pytest.raises(SystemExit, match=f"^benchmarks/run.py --device cuda: {message}"):
                run.main()


class TestReport:
    def test_readme_and_results_are_up_to_date(self) -> None:
        for path, text in report.pages().items():
            assert path.read_text(encoding="utf-8") == text, "run: python benchmarks/report.py"

    def test_a_row_of_each_page(self) -> None:
        row = (
            "| a headline | 2 us | 5 us, JAX: 2.5x | `.venv/bin/python benchmarks/run.py --device cuda --only adamw` |"
        )
        assert row in report.headlines("cuda", {}, [RESULT])
        section = report.section("cpu", {"processor": "P", "cores": "2"}, [RESULT])
        assert "each line from one run: processor P, cores 2." in section
        assert section.splitlines()[-1].split(" | ") == [
            "| a case",
            "2 us (1 us to 3 us)",
            "bigramx, no logits 1 us (1 us to 1 us): 0.5x<br>JAX 5 us (5 us to 5 us): 2.5x<br>NumPy: is not installed",
            "a copy 1 us (1 us to 1 us): 2x",
            "2.5x JAX (>= 2)<br>2x a copy (<= 1.5, missed)<br>not measured: x peer (>= 4)",
            "2 GB/s",
            "bigramx 1.5 KB<br>JAX 2 MB |",
        ]

    def test_pages_and_pictures_are_written_and_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        curve = Result("a curve", bench="cost_curves", series={"N": [1.0, 2.0], OURS: [0.1, 0.2], "eager": [0.1]})
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["report.py"])
        blocks = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("perplexities", "measured"))
        (tmp_path / "README.md").write_text(f"before\n{blocks}after\n")
        results = {"adamw": [RESULT], "cost_curves": [curve], "perplexity": PERPLEXITIES}
        run.write(tmp_path / "results" / "cpu.json", {"processor": "P"}, results)
        report.main()
        text = (tmp_path / "README.md").read_text()
        assert (text[:7], text.count("a headline"), text.count("old"), text[-6:]) == ("before\n", 1, 0, "after\n")
        assert "| vocabulary | one | another |\n| --- | --- | --- |\n| V=3 | 1.2 | 2.0 |\n<!--" in text
        assert "![a curve](cpu_cost_curves_over_n.png)" in (tmp_path / "results" / "README.md").read_text()
        assert (tmp_path / "results" / "cpu_cost_curves_over_n.png").stat().st_size > 0
        monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
        report.main()
        run.write(tmp_path / "results" / "cpu.json", {"processor": "another"}, {"adamw": [RESULT]})
        with pytest.raises(SystemExit, match="out of date"):
            report.main()
        (tmp_path / "README.md").write_text("<!-- perplexities -->")
        with pytest.raises(ValueError, match="expected the markers <!-- perplexities --> and <!-- /perplexities -->"):
            report.main()

    def test_units(self) -> None:
        texts = [report.in_units(seconds, report.SECONDS) for seconds in (12.34, 0.0123, 1.5e-8, 1.5e-10)]
        assert texts == ["12.3 s", "12.3 ms", "15 ns", "0.15 ns"]
        assert [report.in_units(count, report.BYTES) for count in (12, 3.01e12)] == ["12 bytes", "3.01 TB"]


class TestRun:
    def test_every_op_has_a_bench(self) -> None:
        assert set(OPS) <= set(run.BENCHES)
        assert all(run.cases_of(bench, CPU) for bench in run.BENCHES)

    @pytest.mark.parametrize("place", [CPU, CUDA], ids=["cpu", "cuda"])
    def test_few_cases_are_headlines(self, place: Device) -> None:
        headlines = [case.headline for bench in run.BENCHES for case in run.cases_of(bench, place) if case.headline]
        assert len(set(headlines)) == len(headlines) <= 14
        _machine, results = report.read(report.RESULTS / f"{place.name}.json")
        assert {result.headline for result in results} <= {"", *headlines}

    def test_the_file_is_written_after_each_case(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, seen = tmp_path / "cpu.json", []

        def kept() -> list[str]:
            return [result.case for result in report.read(out)[1]]

        def measured(_config: RunConfig, name: str) -> Result:
            seen.append(kept() if out.exists() else [])
            if name == "fails":
                raise RuntimeError("no such luck")
            return replace(RESULT, case=name)

        def cases(bench: str, *names: str) -> list[tuple[str, Case]]:
            return [(bench, Case(measured, name=name)) for name in names]

        assert run.run(cases("adamw", "a", "fails", "b"), ONCE, out) == 1
        assert seen == [[], ["a"], ["a"]]
        assert kept() == ["a", "b"]
        assert "no such luck" in capsys.readouterr().out
        assert run.run(cases("fit", "c"), ONCE, out) == 0
        assert run.run(cases("adamw", "new"), ONCE, out) == 0
        assert kept() == ["new", "c"]  # by bench; those of another bench stay
        run.write(out, {"processor": "another"}, {"fit": [replace(RESULT, bench="fit")]})
        run.run(cases("adamw", "here"), ONCE, out)
        assert kept() == ["here"]

    def test_a_failure_is_the_exit_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "cuda.json"
        monkeypatch.setattr(run, "DEVICES", {"cuda": EmulatedGpu()})
        cases = [Case(lambda _config: RESULT, headline="kept"), Case(lambda: RESULT)]
        monkeypatch.setattr("benchmarks.bench_adamw.CUDA_CASES", cases)
        monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--only", "adamw", "--out", str(out)])
        with pytest.raises(SystemExit, match="1 of 2 cases failed"):
            run.main()
        machine, results = report.read(out)
        assert (machine, results) == ({"card": "none"}, [replace(RESULT, headline="kept")])


class TestPeers:
    def test_tokens(self) -> None:
        text, drawn = peers.text_tokens(1_000_000, 65), peers.zipf_tokens(100_000, 1000)
        assert (len(text), int(text.min()), int(text.max())) == (1_000_000, 0, 64)
        shares, ranks = torch.bincount(drawn, minlength=1000) / len(drawn), torch.arange(1, 1001)
        expected = torch.log((ranks + 1) / ranks) / math.log(1001)
        torch.testing.assert_close(shares[:9], expected[:9], rtol=0.05, atol=0)
        assert len(shares) == 1000
        assert [peers.in_powers_of_ten(count) for count in (2 * 10**7, 10**8)] == ["2*10^7", "10^8"]

    @pytest.mark.parametrize("library", ["numpy", "jax"])
    def test_they_do_what_they_say(self, library: str) -> None:
        pytest.importorskip(library)
        probs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
        forced = torch.full((3, 3), -1e4).scatter_(1, torch.tensor([[2], [0], [1]]), 1e4)  # 0 -> 2 -> 1 -> 0
        if library == "numpy":
            assert comparison.as_tensor(peers.numpy_multinomial(probs, 2)()).tolist() == [[1, 1], [2, 2]]
            assert peers.numpy_generate(forced, 4)() == [[0, 2, 1, 0, 2]]
        else:
            assert comparison.as_tensor(peers.jax_multinomial(probs)()).tolist() == [[1], [2]]
            assert (comparison.as_tensor(peers.jax_choice(probs[0], 100)()) == 1).all()
            assert comparison.as_tensor(peers.jax_generate(forced, 2, 4)()).tolist() == [[2, 1, 0, 2]] * 2


class EmulatedGpu(Device):
    """What the cases for a GPU take for one: it computes on the processor, and rotates a few kilobytes."""

    is_gpu = True

    def describe(self) -> dict[str, str]:
        return {"card": "none"}

    def free_bytes(self) -> float:
        return 2.0**40

    def rotated_bytes(self) -> int:
        return 1 << 14

    peak_resident_bytes = Device.peak_bytes


TINY = {
    "vocab_size": 11,
    "num_tokens": 50,
    "num_rows": 5,
    "batch_size": 3,
    "num_steps": 9,
    "short": 20,
    "sizes": [8, 16, 32],
}
CUDA_CASES = [pytest.param(case, id=bench) for bench in run.BENCHES for case in run.cases_of(bench, CUDA)]


class TestCudaCases:
    @pytest.fixture(autouse=True)
    def _emulated(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Peers that are there wherever the tests run, short turns, one thread: enough for small sizes."""
        monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
        liger = SimpleNamespace(LigerCrossEntropyLoss=torch.nn.CrossEntropyLoss)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
        monkeypatch.setattr(timing, "_TURN_SECONDS", 0.0)
        names = ["kernel", "another kernel", "Memset (Device)"]
        monkeypatch.setattr(bench_embedding_cross_entropy, "launched", lambda _step: names)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(num_threads)

    @pytest.mark.parametrize("case", CUDA_CASES)
    def test_all_run_at_small_sizes(self, case: Case) -> None:
        sizes = {name: size for name, size in TINY.items() if case.arguments.get(name) is not None}
        tiny = Case(case.function, headline=case.headline, **{**case.arguments, **sizes})
        result = tiny.run(RunConfig(seconds=0, min_rounds=1, quick=False, device=EmulatedGpu()))
        assert result.skipped == {}
        assert all(target.figure is not None for target in result.targets), "a target names what is not there"
        assert {len(values) for values in result.series.values()} <= {3}
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
        assert result.case in report.section("cuda", {}, [result])

    def test_kernels_are_counted_apart_from_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = replace(ONCE, device=EmulatedGpu())
        (target,) = bench_embedding_cross_entropy.launches(config).targets
        assert report.outcome(target) == "2 kernels, beside 1 copies and memsets; eager 2 (<= 3)"
        monkeypatch.setattr(bench_embedding_cross_entropy, "launched", lambda _step: [])
        assert bench_embedding_cross_entropy.launches(config).skipped == {OURS: "the profiler saw nothing on the GPU"}

    def test_every_row_is_present(self) -> None:
        idx, _weight, _targets = bench_embedding_cross_entropy.random_pairs(CPU, vocab_size=50, num_tokens=60)
        assert (len(idx), idx.unique().numel()) == (60, 50)

    def test_what_does_not_fit_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = EmulatedGpu()
        monkeypatch.setattr(small, "free_bytes", lambda: 0.0)
        config = replace(ONCE, device=small)
        result = bench_embedding_cross_entropy.large_table(config, 11, [faster_than("eager", 10)])
        assert result.skipped == {OURS: "needs 2.7e-06 GiB of memory, 0.0 are free"}
        assert result.targets[0].met is None
