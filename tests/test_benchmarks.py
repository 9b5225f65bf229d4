"""The benchmarks' own machinery: turns, checks of the peers, reaches, the README's table."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import peers, report, run, timing
from benchmarks.race import OURS, Effort, Race, Reached, Result, as_tensor, faster_than, ns_a_token, within

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
        text = report.markdown({"processor": "P", "cores": "2"}, [RESULT])
        assert "processor P, cores 2" in text
        assert (
            "| a job | 2 us | 5 us, JAX: 2.5x | 4.25x eager (>= 4); **2x a copy (<= 1.5)** | 1x a read | `--only job` |"
        ) in text
        assert "| a job | 2 GB/s | 1.5 KB | eager 2 MB |" in text

    def test_cost_curves_are_pictures(self) -> None:
        curve = replace(RESULT, series={"N": [1.0, 2.0], OURS: [0.1, 0.2]})
        text = report.markdown({}, [curve])
        assert "![a job](benchmarks/results/cost_over_n.png)" in text
        assert "| a job | 2 us |" not in text

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

    def test_the_block_between_the_markers_is_replaced(self) -> None:
        text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
        assert report.replaced(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
        with pytest.raises(ValueError, match="expected the markers"):
            report.replaced("no markers", "new")

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


def test_one_file_replaces_its_own_results(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    first = [{"bench": "adamw", "job": "old"}, {"bench": "exp", "job": "kept"}]
    run.write(out, first, kept=False)
    run.write(out, [{"bench": "adamw", "job": "new"}, {"bench": "adamw", "job": "more"}], kept=True)
    assert [result["job"] for result in json.loads(out.read_text())["results"]] == ["new", "more", "kept"]
    content = json.loads(out.read_text())
    content["machine"]["processor"] = "another"
    out.write_text(json.dumps(content))
    run.write(out, first[:1], kept=True)
    assert [result["job"] for result in json.loads(out.read_text())["results"]] == ["old"]
