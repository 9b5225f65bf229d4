"""The benchmarks' own machinery: turns, checks of the peers, reaches, the README's table."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bigramx
from benchmarks import bench_embedding_cross_entropy, machine, peers, report, run, timing
from benchmarks.device import CPU, CUDA
from benchmarks.race import (
    OURS,
    Effort,
    Job,
    Race,
    Reached,
    Result,
    as_tensor,
    faster_than,
    in_powers_of_ten,
    ns_a_token,
    percent_of,
    within,
)

ONCE = Effort(seconds=0, min_rounds=3, quick=True)


class Clock:
    """Stands in for time.perf_counter: only the functions that are timed let it go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def takes(self, name: str, *seconds: float) -> timing.Function:
        """A function that takes so many seconds at its first, second, ... call, and the last of them from then on."""
        left = list(seconds)

        def function() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.calls.append(name)

        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


class TestSideBySide:
    def test_takes_turns_and_gives_medians_and_quartiles(self, clock: Clock) -> None:
        uncounted = 9.0
        seconds = [second for counted in (1.0, 2.0, 3.0, 4.0, 5.0) for second in (uncounted, counted)]
        functions = {"a": clock.takes("a", uncounted, *seconds), "b": clock.takes("b", 1.0)}
        times = timing.side_by_side(functions, seconds=0, min_rounds=5)
        assert "".join(clock.calls) == "ab" + "aabb" * 5  # the first call of each finds out how many fill a turn
        assert times["a"] == timing.Times(median=3, lower=2, upper=4)
        assert times["b"] == timing.Times(median=1, lower=1, upper=1)

    def test_repeats_what_is_short_until_it_fills_a_turn(self, clock: Clock) -> None:
        times = timing.side_by_side({"a": clock.takes("a", 0.003)}, seconds=0, min_rounds=2)
        assert len(clock.calls) == 1 + 2 + 4 + 2 * (1 + 4)  # 3, 6 and 12 ms to find out, 12 ms in each turn
        assert times["a"].median == pytest.approx(0.003)

    def test_goes_on_until_the_time_is_over(self, clock: Clock) -> None:
        timing.side_by_side({"a": clock.takes("a", 1.0)}, seconds=10, min_rounds=1)
        assert len(clock.calls) == 1 + 10

    def test_one_round(self, clock: Clock) -> None:
        times = timing.side_by_side({"a": clock.takes("a", 1.0)}, seconds=0, min_rounds=1)
        assert times["a"] == timing.Times(median=1, lower=1, upper=1)


class Gpu:
    """Stands in for torch.cuda: a stream that runs what it is given at once, and an allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.milliseconds = 0.0
        self.held, self.peak = 1000, 5000
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.milliseconds
                gpu.calls.append("event")

            def synchronize(self) -> None:
                gpu.calls.append("wait")

            def elapsed_time(self, end: Any) -> float:
                elapsed: float = end.at - self.at
                return elapsed

        class Graph:
            def replay(self) -> None:
                gpu.calls.append("replay")

        def reset_peak() -> None:
            self.peak = self.held

        stream = SimpleNamespace(wait_stream=lambda _other: None)
        card = SimpleNamespace(name="a card", total_memory=80 << 30, L2_cache_size=50 << 20)
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _stream: contextlib.nullcontext(),
            "graph": lambda _graph: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda _index: card,
            "memory_allocated": lambda: self.held,
            "memory_reserved": lambda: 3000,
            "mem_get_info": lambda: (7000, 9000),
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": reset_peak,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def takes(self, milliseconds: float, allocated: int = 0) -> timing.Function:
        """A function that keeps the GPU busy for so long, and holds so much memory meanwhile."""

        def function() -> str:
            self.milliseconds += milliseconds
            self.peak = max(self.peak, self.held + allocated)
            self.calls.append("call")
            return "returned"

        return function


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


class TestGpu:
    def test_a_turn_is_timed_between_events(self, gpu: Gpu) -> None:
        assert timing.cuda_turn(gpu.takes(2.0), 3) == pytest.approx(6e-3)
        assert gpu.calls == ["event", "call", "call", "call", "event", "wait"]

    def test_side_by_side(self, gpu: Gpu) -> None:
        times = CUDA.side_by_side({"a": gpu.takes(12), "b": gpu.takes(3)}, seconds=0, min_rounds=2)
        assert {name: time.median for name, time in times.items()} == pytest.approx({"a": 12e-3, "b": 3e-3})

    def test_peak_memory_beyond_what_was_held(self, gpu: Gpu) -> None:
        assert CUDA.peak_bytes(gpu.takes(1, allocated=700)) == 700
        assert CUDA.peak_resident_bytes(gpu.takes(1, allocated=300)) == 300

    @pytest.mark.usefixtures("gpu")
    def test_what_the_allocator_keeps_is_free(self) -> None:
        assert CUDA.free_bytes() == 7000 + 3000 - 1000

    def test_a_captured_function_is_warmed_up_and_replayed(self, gpu: Gpu) -> None:
        replay = CUDA.captured(gpu.takes(1))
        assert gpu.calls == ["call"] * 4
        assert replay() == "returned"
        assert gpu.calls[4:] == ["replay"]

    @pytest.mark.usefixtures("gpu")
    def test_the_cache_is_the_cards(self) -> None:
        assert CUDA.cache_bytes() == 50 << 20

    @pytest.mark.usefixtures("gpu")
    def test_the_card_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = SimpleNamespace(stdout="580.1\n580.1\n")
        monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: said)
        described = CUDA.machine()
        assert (described["card"], described["memory"], described["L2"]) == ("a card", "80 GiB", "50 MiB")
        assert described["driver"] == "580.1"
        assert described["torch"] == torch.__version__
        assert {"cuda", "triton", "liger-kernel"} <= described.keys()

    def test_a_driver_that_does_not_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert machine._driver() == "unknown"

    @pytest.mark.usefixtures("gpu")
    def test_what_is_lacking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bigramx, "build_info", lambda: {"cuda_architectures": ""})
        assert CUDA.lacks() == "this build of bigramx has no CUDA kernels"
        monkeypatch.setattr(bigramx, "build_info", lambda: {"cuda_architectures": "9.0"})
        assert CUDA.lacks() is None

    def test_without_one_a_run_ends_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda"])
        with pytest.raises(SystemExit, match=r"^benchmarks/run.py --device cuda: PyTorch finds no CUDA device here"):
            run.main()


class TestRotation:
    @pytest.mark.parametrize(
        ("set_bytes", "free_bytes", "num_sets"),
        [
            (50, 1e9, 8),  # four times the cache of 100
            (400, 1e9, 1),
            (399, 1e9, 2),
            (1000, 1e9, 1),
            (50, 1000, 5),  # a quarter of the memory
            (50, 100, 1),
            (0, 1e9, 400),
        ],
    )
    def test_how_many_sets(self, set_bytes: int, free_bytes: float, num_sets: int) -> None:
        cached = replace(CUDA, cache_bytes=lambda: 100, free_bytes=lambda: free_bytes)
        assert cached.num_sets(set_bytes) == num_sets

    def test_none_on_the_processor(self) -> None:
        assert replace(CPU, free_bytes=lambda: math.inf).num_sets(1) == 1

    def test_sets_are_made_one_after_the_other_and_taken_in_turn(self) -> None:
        cached = replace(CUDA, cache_bytes=lambda: 20, free_bytes=lambda: 1e9)
        numbers = iter(range(10))
        sets = cached.input_sets(lambda: (torch.full((8,), next(numbers)),))  # 64 bytes, of 80
        assert len(sets) == 2
        called = timing.rotating(lambda tensor: int(tensor[0]), sets)
        assert [called() for _ in range(5)] == [0, 1, 0, 1, 0]

    def test_a_copy_moves_the_bytes_that_it_says(self) -> None:
        copied = replace(CPU, free_bytes=lambda: math.inf).copy(1000)()
        assert isinstance(copied, torch.Tensor)
        assert 2 * copied.nbytes == 1000
        assert copied.unique().numel() > 1

    def test_what_lacks_memory_says_so(self) -> None:
        small = replace(CPU, free_bytes=lambda: 1.5 * 2**30)
        assert small.lacks_memory(1) is None
        assert small.lacks_memory(2) == "needs 2 GiB of memory, 1.5 are free"


class TestPeaks:
    def test_of_the_allocator(self) -> None:
        def function() -> None:
            first = torch.empty(1000)
            del first
            torch.empty(3000), torch.empty(500)

        assert timing.peak_bytes(function) == 4 * 3500

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
    def test_of_the_process(self) -> None:
        size = 64 << 20
        peak = timing.peak_resident_bytes(lambda: torch.ones(size, dtype=torch.uint8))
        assert size * 0.9 < peak < size * 1.1


class TestRace:
    def test_reaches(self, clock: Clock) -> None:
        race = Race("job", [faster_than("peer", 4), within("floor", 1.5), ns_a_token(1000, 2e6)], bytes_moved=100)
        race.add(OURS, clock.takes("ours", 2.0))
        race.add("peer", clock.takes("peer", 6.0))
        race.add_floor("floor", clock.takes("floor", 1.0))
        result = race.run(ONCE)
        assert result.seconds == {OURS: 2, "peer": 6}
        assert result.floors == {"floor": 1}
        assert result.bytes_per_second == 50
        assert [(reach.figure, reach.met) for reach in result.reaches] == [(3, False), (2, False), (2e6, True)]

    @pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0]), (torch.ones(2),)])
    def test_a_peer_that_does_another_job_is_an_error(self, wrong: object) -> None:
        race = Race("job")
        race.add(OURS, lambda: torch.tensor([1.0, 2.0]))
        race.add("peer", lambda: wrong)
        with pytest.raises(AssertionError, match="job: peer does another job"):
            race.run(ONCE)

    def test_small_numbers_are_compared_by_their_size(self) -> None:
        race = Race("job")
        race.add(OURS, lambda: torch.tensor([1e-9, 2e-9]))
        race.add("peer", lambda: torch.tensor([1e-9, 3e-9]))
        with pytest.raises(AssertionError, match="another job"):
            race.run(ONCE)

    def test_all_draw_from_the_same_seed(self) -> None:
        race = Race("job")
        race.add(OURS, lambda: torch.rand(3))
        race.add("peer", lambda: torch.rand(3))
        race.run(ONCE)

    def test_a_peer_that_is_not_installed_is_skipped_with_its_reach(self, clock: Clock) -> None:
        def make() -> timing.Function:
            raise ModuleNotFoundError("No module named 'fast'", name="fast")

        race = Race("job", [faster_than("peer", 4)])
        race.add(OURS, clock.takes("ours", 1.0))
        race.add_peer("peer", make)
        result = race.run(ONCE)
        assert result.skipped == {"peer": "fast is not installed"}
        assert result.reaches == [Reached("x peer", ">=", 4, None)]
        assert result.reaches[0].met is None

    def test_a_peer_that_does_not_work_is_skipped(self, clock: Clock) -> None:
        def fails() -> None:
            raise RuntimeError("no compiler\nmore of it")

        def cannot_be_made() -> timing.Function:
            raise OSError("no library")

        race = Race("job", [faster_than("peer", 4)])
        race.add(OURS, clock.takes("ours", 1.0))
        race.add_peer("peer", lambda: fails)
        race.add_peer("another", cannot_be_made)
        result = race.run(ONCE)
        assert result.skipped == {
            "peer": "does not work here: RuntimeError: no compiler",
            "another": "does not work here: OSError: no library",
        }
        assert result.seconds == {OURS: 1}

    def test_a_contestant_of_pytorch_must_work_but_may_lack_memory(self, clock: Clock) -> None:
        def lacks_memory() -> None:
            raise torch.OutOfMemoryError("tried to allocate 32 GiB")

        def fails() -> None:
            raise RuntimeError("wrong")

        race = Race("job")
        race.add(OURS, clock.takes("ours", 1.0))
        race.add("eager", lacks_memory)
        assert race.run(ONCE).skipped == {"eager": "needs more memory: tried to allocate 32 GiB"}
        race.add("eager", fails)
        with pytest.raises(RuntimeError, match="wrong"):
            race.run(ONCE)

    def test_the_rate_of_a_copy(self, clock: Clock) -> None:
        race = Race("job", [percent_of("a copy", 85)])
        race.add(OURS, clock.takes("ours", 5.0))
        race.add_floor("a copy", clock.takes("copy", 4.0))
        (reached,) = race.run(ONCE).reaches
        assert report.reached(reached) == "**80 % of a copy (>= 85)**"

    def test_a_race_that_cannot_be_held(self) -> None:
        result = Race("job", [faster_than("peer", 4)]).skip("needs more memory")
        assert "needs more memory" in report.plain_table([result])
        assert list(report.details(result)) == ["bigramx skipped: needs more memory"]


RESULT = Result(
    "a job",
    bench="job",
    seconds={OURS: 2e-6, "eager": 8.5e-6, "JAX": 5e-6},
    quartiles={name: [1e-6, 9e-6] for name in [OURS, "eager", "JAX", "a copy", "a read"]},
    floors={"a copy": 1e-6, "a read": 2e-6},
    reaches=[Reached("x eager", ">=", 4, 4.25), Reached("x a copy", "<=", 1.5, 2.0)],
    bytes_moved=4000,
    bytes_per_second=2e9,
    peak_bytes={OURS: 1500, "eager": 2_000_000},
)


class TestReport:
    def test_results_survive_json(self) -> None:
        content = json.loads(json.dumps(RESULT.to_json()))
        assert [reach["met"] for reach in content["reaches"]] == [True, False]
        assert Result.from_json(content) == RESULT

    def test_markdown(self) -> None:
        text = report.markdown({"processor": "P", "cores": "2"}, [RESULT], report.SECTIONS[0])
        assert text.startswith("Medians of alternating rounds, all of a line in one run, on this machine: processor P")
        assert "processor P, cores 2" in text
        assert (
            "| a job | 2 us | 5 us, JAX: 2.5x | 4.25x eager (>= 4); **2x a copy (<= 1.5)** | 1x a read | `--only job` |"
        ) in text
        assert "| a job | 2 GB/s | 1.5 KB | eager 2 MB |" in text

    def test_cost_curves_are_pictures(self) -> None:
        curve = replace(RESULT, series={"N": [1.0, 2.0], OURS: [0.1, 0.2]})
        cpu, cuda = (report.markdown({}, [curve], section) for section in report.SECTIONS)
        assert "![a job](benchmarks/results/cost_over_n.png)" in cpu
        assert "![a job](benchmarks/results/cuda_cost_over_n.png)" in cuda
        assert "| a job | 2 us |" not in cpu

    def test_plain_table(self) -> None:
        head, first, second = report.plain_table([RESULT]).splitlines()
        assert head.split() == ["job", "figure", "reach", "met", "bigramx", "times", "the", "floor"]
        assert first == "a job  4.25x eager  >= 4    yes  2 us     2x a copy; 1x a read"
        assert second == "a job  2x a copy    <= 1.5  NO   2 us     2x a copy; 1x a read"

    def test_details(self) -> None:
        assert list(report.details(RESULT)) == [
            "bigramx: 2 us (1 us to 9 us), 1.5 KB at once",
            "eager: 8.5 us (1 us to 9 us), 4.25x, 2 MB at once",
            "JAX: 5 us (1 us to 9 us), 2.5x",
            "floor: a copy: 1 us (1 us to 9 us), bigramx takes 2 times that",
            "floor: a read: 2 us (1 us to 9 us), bigramx takes 1 times that",
            "2 GB/s",
        ]

    @pytest.mark.parametrize("section", report.SECTIONS, ids=lambda section: section.name)
    def test_the_block_between_the_markers_is_replaced(self, section: report.Section) -> None:
        text = f"before\n{section.begin}\nold\n{section.end}\nafter\n"
        new = f"before\n{section.begin}\nnew\n{section.end}\nafter\n"
        assert report.replaced(text, "new", section) == new
        with pytest.raises(ValueError, match="expected the markers"):
            report.replaced("no markers", "new", section)

    def test_each_device_has_its_part_of_the_readme(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["report.py"])
        readme = tmp_path / "README.md"
        readme.write_text("".join(f"{section.begin}\nold\n{section.end}\n" for section in report.SECTIONS))
        content = json.dumps({"machine": {"card": "C"}, "results": [RESULT.to_json()]})
        (tmp_path / "cpu.json").write_text(content)
        report.main()
        assert readme.read_text().count("card C") == 1
        assert readme.read_text().endswith("\nold\n<!-- /measured on cuda -->\n")
        (tmp_path / "cuda.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
        with pytest.raises(SystemExit, match="is not what benchmarks/results says"):
            report.main()
        monkeypatch.setattr(sys, "argv", ["report.py"])
        report.main()
        assert readme.read_text().count("card C") == 2
        assert "`.venv/bin/python benchmarks/run.py --device cuda` with the last column" in readme.read_text()

    def test_curves_are_drawn_beside_the_results(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        curve = replace(RESULT, series={"N": [1.0, 2.0], OURS: [0.1, 0.2], "eager": [0.1]})
        file = tmp_path / "cuda.json"
        file.write_text(json.dumps({"machine": {}, "results": [curve.to_json(), RESULT.to_json()]}))
        report.draw_curves(file)
        assert [path.name for path in tmp_path.glob("*.png")] == ["cuda_cost_over_n.png"]

    def test_nothing_to_draw_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        report.draw_curves(tmp_path / "cuda.json")
        assert capsys.readouterr().out == "no cost curves are drawn: matplotlib is not installed\n"

    def test_bytes(self) -> None:
        assert [report.format_bytes(count) for count in (12, 2.5e3, 3.01e12)] == ["12 bytes", "2.5 KB", "3.01 TB"]

    @pytest.mark.parametrize(
        ("seconds", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (1.5e-5, "15 us"), (1.5e-8, "15 ns")]
    )
    def test_seconds(self, seconds: float, text: str) -> None:
        assert report.format_seconds(seconds) == text


def test_every_benchmark_is_run() -> None:
    files = {path.stem.removeprefix("bench_") for path in Path(run.__file__).parent.glob("bench_*.py")}
    assert sorted(run.BENCHES) == sorted(files)


def test_text_tokens() -> None:
    tokens = peers.text_tokens(1_000_000, 65)
    assert tokens.shape == (1_000_000,)
    assert tokens.min() == 0
    assert tokens.max() == 64


def test_numpy_peers_do_what_they_say() -> None:
    pytest.importorskip("numpy")
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    samples = torch.as_tensor(peers.numpy_multinomial(probs, 1000)())
    assert (samples[0] == 1).all()
    assert samples[1].unique().tolist() == [0, 2]
    forced = torch.full((3, 3), -1e4).scatter_(1, torch.tensor([[2], [0], [1]]), 1e4)  # 0 -> 2 -> 1 -> 0
    assert peers.numpy_generate(forced, 4)() == [[0, 2, 1, 0, 2]]


def test_jax_peers_do_what_they_say() -> None:
    pytest.importorskip("jax")
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    assert as_tensor(peers.jax_multinomial(probs)()).tolist() == [[1], [2]]
    assert (as_tensor(peers.jax_choice(probs[0], 100)()) == 1).all()
    forced = torch.full((3, 3), -1e4).scatter_(1, torch.tensor([[2], [0], [1]]), 1e4)  # 0 -> 2 -> 1 -> 0
    assert as_tensor(peers.jax_generate(forced, 2, 4)()).tolist() == [[2, 1, 0, 2]] * 2


def test_zipf_tokens() -> None:
    tokens = peers.zipf_tokens(100_000, 1000)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 1000
    shares = torch.bincount(tokens, minlength=1000) / len(tokens)
    ranks = torch.arange(1, 1001)
    torch.testing.assert_close(shares[:9], (torch.log((ranks + 1) / ranks) / math.log(1001))[:9], rtol=0.05, atol=0)


@pytest.mark.parametrize(("count", "text"), [(2 * 10**7, "2*10^7"), (10**8, "10^8"), (110, "11*10^1")])
def test_in_powers_of_ten(count: int, text: str) -> None:
    assert in_powers_of_ten(count) == text


def test_launched_names_nothing_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert timing.launched(lambda: torch.ones(3).add_(1)) == []


def test_one_file_replaces_its_own_results(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    first = [{"bench": "adamw", "job": "old"}, {"bench": "exp", "job": "kept"}]
    run.write(out, first, CPU, kept=False)
    run.write(out, [{"bench": "adamw", "job": "new"}, {"bench": "adamw", "job": "more"}], CPU, kept=True)
    assert [result["job"] for result in json.loads(out.read_text())["results"]] == ["new", "more", "kept"]
    content = json.loads(out.read_text())
    content["machine"]["processor"] = "another"
    out.write_text(json.dumps(content))
    run.write(out, first[:1], CPU, kept=True)
    assert [result["job"] for result in json.loads(out.read_text())["results"]] == ["old"]


def test_where_a_job_fails_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_effort: Effort) -> Result:
        raise RuntimeError("no such luck")

    out = tmp_path / "cuda.json"
    monkeypatch.setattr(run, "DEVICES", {"cuda": replace(HOST_GPU, name="cuda", lacks=lambda: None)})
    monkeypatch.setattr(run, "BENCHES", ["adamw"])
    monkeypatch.setattr("benchmarks.bench_adamw.CUDA_JOBS", [fails, lambda _effort: replace(RESULT)])
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--out", str(out)])
    with pytest.raises(SystemExit, match="1 of 2 jobs failed"):
        run.main()
    content = json.loads(out.read_text())
    assert content["machine"] == {"card": "none"}
    assert [(result["job"], result["bench"]) for result in content["results"]] == [("a job", "adamw")]
    assert "no such luck" in capsys.readouterr().out


def test_a_file_without_jobs_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "DEVICES", {"cuda": replace(CUDA, lacks=lambda: None)})
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--only", "tokenizer"])
    with pytest.raises(SystemExit, match=r"bench_tokenizer\.py has no jobs for cuda"):
        run.main()


# A GPU for the jobs to think of, which computes where the tests do, and has a cache of four kilobytes.
HOST_GPU = replace(
    CUDA,
    name="cpu",
    captures=False,
    turn=timing.host_turn,
    machine=lambda: {"card": "none"},
    free_bytes=lambda: 2.0**40,
    cache_bytes=lambda: 1 << 12,
    fresh=torch.empty,
    peak_bytes=timing.peak_bytes,
    peak_resident_bytes=timing.peak_bytes,
    captured=lambda function: function,
)

TINY: dict[str, object] = {
    "vocab_size": 11,
    "num_tokens": 50,
    "num_rows": 5,
    "batch_size": 3,
    "short": 20,
    "sizes": [8, 16, 32],
}

CUDA_JOBS = [(bench, job) for bench in run.BENCHES for job in run.jobs_of(bench, CUDA)]


def tiny(job: Job) -> Job:
    """The same job with small numbers in place of all its sizes."""
    if not isinstance(job, partial):
        return job
    sizes = {name: size for name, size in TINY.items() if job.keywords.get(name) is not None}
    return partial(job.func, **{**job.keywords, **sizes})


class TestCudaJobs:
    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Enough for small numbers."""
        with machine.threads(1):
            yield

    @pytest.fixture(autouse=True)
    def _peers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Peers that are there wherever the tests run."""

        def identity(function: Callable[..., object], dynamic: bool) -> Callable[..., object]:
            return function

        monkeypatch.setattr(torch, "compile", identity)
        liger = SimpleNamespace(LigerCrossEntropyLoss=torch.nn.CrossEntropyLoss)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
        monkeypatch.setattr(timing, "_TURN", 0.0)
        names = ["kernel", "another kernel", "Memset (Device)"]
        monkeypatch.setattr(bench_embedding_cross_entropy, "launched", lambda _step: names)

    @pytest.mark.parametrize("job", [pytest.param(job, id=bench) for bench, job in CUDA_JOBS])
    def test_all_run_at_small_sizes(self, job: Job) -> None:
        result = tiny(job)(Effort(seconds=0, min_rounds=1, quick=False, device=HOST_GPU))
        assert result.skipped == {}
        assert all(reach.figure is not None for reach in result.reaches), "a reach names who is not there"
        if result.series:
            assert {len(values) for values in result.series.values()} == {3}
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
        assert result.job in report.markdown({}, [result], report.SECTIONS[1])

    def test_kernels_are_counted_apart_from_copies(self) -> None:
        (reached,) = bench_embedding_cross_entropy.launches(replace(ONCE, device=HOST_GPU)).reaches
        assert report.reached(reached) == "2 kernels, beside 1 copies and memsets; eager 2 (<= 3)"

    def test_a_profiler_that_sees_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_embedding_cross_entropy, "launched", lambda _step: [])
        result = bench_embedding_cross_entropy.launches(replace(ONCE, device=HOST_GPU))
        assert result.reaches[0].met is None
        assert result.skipped == {OURS: "the profiler saw nothing on the GPU"}

    def test_what_does_not_fit_is_skipped(self) -> None:
        small = replace(ONCE, device=replace(HOST_GPU, free_bytes=lambda: 0.0))
        result = bench_embedding_cross_entropy.large_table(small, 11, [faster_than("eager", 10)])
        assert result.skipped == {OURS: "needs 2.7e-06 GiB of memory, 0.0 are free"}
        assert result.reaches[0].met is None
