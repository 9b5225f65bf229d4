"""A job, its contestants, its floors and what it is to reach; what a race between them gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.device import COPY, CPU, Device
from benchmarks.timing import Function, Times

OURS = "bigramx"


@dataclass(frozen=True)
class Effort:
    """How long to measure, and where.

    Attributes:
        seconds: What the rounds of a race last.
        min_rounds: How many there are, even where they last longer.
        quick: Whether jobs that take minutes are left out.
        device: Where the job's tensors lie, and what measures it.
    """

    seconds: float
    min_rounds: int
    quick: bool
    device: Device = CPU


@dataclass(frozen=True)
class Reach:
    """What a job is to reach.

    Attributes:
        unit: Of the figure, as it is written behind it.
        relation: Of the figure to the target.
        target: What is to be reached.
        figure: From the medians of a race; a KeyError where a contestant was not there.
    """

    unit: str
    relation: Literal[">=", "<="]
    target: float
    figure: Callable[[Mapping[str, float]], float]


def faster_than(peer: str, target: float) -> Reach:
    """The time of ``peer`` over ours."""
    return Reach(f"x {peer}", ">=", target, lambda seconds: seconds[peer] / seconds[OURS])


def within(floor: str, target: float) -> Reach:
    """Our time over that of ``floor``."""
    return Reach(f"x {floor}", "<=", target, lambda seconds: seconds[OURS] / seconds[floor])


def percent_of(floor: str, target: float) -> Reach:
    """Our rate, in percent of that of ``floor``, which moves as many bytes."""
    return Reach(f" % of {floor}", ">=", target, lambda seconds: 100 * seconds[floor] / seconds[OURS])


def ns_a_token(num_tokens: int, target: float) -> Reach:
    """Our time over the number of tokens."""
    return Reach(" ns a token", "<=", target, lambda seconds: seconds[OURS] / num_tokens * 1e9)


@dataclass(frozen=True)
class Reached:
    """A reach and the figure that a race gave; None: not measured."""

    unit: str
    relation: str
    target: float
    figure: float | None

    @property
    def met(self) -> bool | None:
        """Whether the figure is where it is to be; None: not measured."""
        if self.figure is None:
            return None
        return self.figure >= self.target if self.relation == ">=" else self.figure <= self.target


@dataclass
class Result:
    """What a race gave.

    Attributes:
        job: What was done.
        bench: The file that did it, bench_<bench>.py.
        seconds: The median time of each contestant, ours under "bigramx".
        quartiles: The lower and the upper quartile of each time, those of the floors too.
        floors: The median time of each floor.
        reaches: The figures that were to be reached.
        skipped: Contestants that were not there, each with the reason; "bigramx": the whole job.
        bytes_moved: What the job must read and write at least.
        bytes_per_second: At which rate we do.
        peak_bytes: The most memory that a contestant held at once, beyond what it was given.
        series: Of a cost curve: the sizes under their name, and the seconds of each contestant.
    """

    job: str
    bench: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, list[float]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    reaches: list[Reached] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_moved: int | None = None
    bytes_per_second: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, with whether each reach was met."""
        reaches = [{**asdict(reach), "met": reach.met} for reach in self.reaches]
        return {**asdict(self), "reaches": reaches}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """What ``to_json`` gave."""
        reaches = [
            Reached(reach["unit"], reach["relation"], reach["target"], reach["figure"]) for reach in content["reaches"]
        ]
        return cls(**{**content, "reaches": reaches})


Job = Callable[[Effort], Result]


def assert_within(tolerance: float) -> Callable[[Any, Any], None]:
    """Raises an AssertionError where two contestants returned different things.

    Tensors may differ by the tolerance times the number or, near zero, times the largest.
    """

    def check(actual: Any, expected: Any) -> None:
        if isinstance(expected, tuple):
            for one, other in zip(actual, expected, strict=True):
                check(one, other)
        elif expected is None or isinstance(expected, str):
            assert actual == expected, "the texts differ"
        else:
            numbers = as_tensor(expected)
            largest = float(numbers.abs().max())
            torch.testing.assert_close(
                as_tensor(actual), numbers, rtol=tolerance, atol=tolerance * largest, check_dtype=False
            )

    return check


assert_equal = assert_within(1e-5)


def assert_means_within(tolerance: float) -> Callable[[Any, Any], None]:
    """For contestants with draws of their own: the means of what they return may differ by the tolerance."""

    def check(actual: Any, expected: Any) -> None:
        means = as_tensor(actual).double().mean(), as_tensor(expected).double().mean()
        torch.testing.assert_close(*means, rtol=0, atol=tolerance)

    return check


def as_tensor(values: Any) -> Tensor:
    """Numbers of any library."""
    if isinstance(values, (Tensor, float, int, list)):
        return torch.as_tensor(values)
    import numpy

    return torch.from_numpy(numpy.array(values))


class Race:
    """A job, done by bigramx and by others on the same data.

    Args:
        job: What is done.
        reaches: What is to be reached.
        bytes_moved: What the job must read and write at least.
        same: Raises where what a contestant returns is not what another returned. All are called once with the same
            seed, before anything is timed: a wrong peer is no peer.
    """

    def __init__(
        self,
        job: str,
        reaches: Sequence[Reach] = (),
        *,
        bytes_moved: int | None = None,
        same: Callable[[Any, Any], None] = assert_equal,
    ) -> None:
        self._result = Result(job, bytes_moved=bytes_moved)
        self._reaches = reaches
        self._same = same
        self._contestants: dict[str, Function] = {}
        self._may_fail: set[str] = set()
        self._floors: dict[str, Function] = {}

    def add(self, name: str, function: Function) -> None:
        """A contestant; ours is named "bigramx"."""
        self._contestants[name] = function

    def add_peer(self, name: str, make: Callable[[], Function]) -> None:
        """A contestant that may not be there, or not work on this machine: ``make`` imports what it needs."""
        self._may_fail.add(name)
        try:
            self.add(name, make())
        except ModuleNotFoundError as error:
            self._result.skipped[name] = f"{error.name} is not installed"
        except Exception as error:
            self._result.skipped[name] = does_not_work(error)

    def add_copy(self, device: Device, moved_bytes: int) -> None:
        """The floor of a job on a GPU that does nothing but move so many bytes."""
        self.add_floor(COPY, device.copy(moved_bytes))

    def add_floor(self, name: str, function: Function) -> None:
        """The least that the job costs whoever does it; what it returns counts for nothing."""
        self._floors[name] = function

    def skip(self, reason: str) -> Result:
        """The result of a race that cannot be held here."""
        self._result.skipped = {OURS: reason}
        return self._finish({})

    def run(
        self, effort: Effort, *, memory: Callable[[Function], int] | None = None, memory_of: Sequence[str] = ()
    ) -> Result:
        """Checks that the contestants do the same job, then times them, then measures the memory of some."""
        self._check()
        times = effort.device.side_by_side(
            {**self._contestants, **self._floors}, seconds=effort.seconds, min_rounds=effort.min_rounds
        )
        result = self._finish(times)
        if memory is not None:
            result.peak_bytes = {
                name: memory(self._contestants[name]) for name in memory_of if name in self._contestants
            }
        return result

    def _check(self) -> None:
        expected = self._first_call(OURS)
        for name in [name for name in self._contestants if name != OURS]:
            self._check_peer(name, expected)

    def _check_peer(self, name: str, expected: object) -> None:
        try:
            actual = self._first_call(name)
        except torch.OutOfMemoryError as error:
            self._leave_out(name, f"needs more memory: {first_line(error)}")
            return
        except Exception as error:
            if name not in self._may_fail:
                raise
            self._leave_out(name, does_not_work(error))
            return
        try:
            self._same(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{self._result.job}: {name} does another job: {error}") from None

    def _first_call(self, name: str) -> object:
        torch.manual_seed(0)
        return self._contestants[name]()

    def _leave_out(self, name: str, reason: str) -> None:
        del self._contestants[name]
        self._result.skipped[name] = reason

    def _finish(self, times: Mapping[str, Times]) -> Result:
        result = self._result
        medians = {name: time.median for name, time in times.items()}
        result.seconds = {name: medians[name] for name in self._contestants if name in medians}
        result.floors = {name: medians[name] for name in self._floors if name in medians}
        result.quartiles = {name: [time.lower, time.upper] for name, time in times.items()}
        result.reaches = [
            Reached(reach.unit, reach.relation, reach.target, _figure(reach, medians)) for reach in self._reaches
        ]
        if result.bytes_moved is not None and OURS in medians:
            result.bytes_per_second = result.bytes_moved / medians[OURS]
        return result


def does_not_work(error: Exception) -> str:
    """What is said of a peer that raised it."""
    return f"does not work here: {type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().partition("\n")[0]


def in_powers_of_ten(count: int) -> str:
    """As jobs write their sizes: 2*10^7."""
    digits = str(count).rstrip("0")
    return f"{digits}*10^{len(str(count)) - len(digits)}".removeprefix("1*")


def _figure(reach: Reach, medians: Mapping[str, float]) -> float | None:
    try:
        return reach.figure(medians)
    except KeyError:
        return None
