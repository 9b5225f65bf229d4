"""A comparison of bigramx with others doing the same work; what it should reach, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.device import CPU, Device
from benchmarks.timing import Function, Times, rotating, side_by_side

OURS = "bigramx"
COPY = "a copy that moves as many bytes"
Relation = Literal[">=", "<="]


@dataclass(frozen=True)
class RunConfig:
    """How long to measure, and where."""

    seconds: float  # of the rounds of a comparison
    min_rounds: int  # even if they last longer
    quick: bool  # without the cases that take minutes
    device: Device = CPU


@dataclass(frozen=True)
class Outcome:
    """A target and the figure that was measured; None: not measured."""

    figure: float | None
    unit: str
    relation: Relation
    target: float

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches the target; None: not measured."""
        if self.figure is None:
            return None
        return self.figure >= self.target if self.relation == ">=" else self.figure <= self.target


Medians = Mapping[str, float]  # seconds of implementations and lower bounds
Target = Callable[[Medians], Outcome]
Check = Callable[[Any, Any], None]  # of an implementation's value and ours; raises an AssertionError if they differ


def _target(relation: Relation, target: float, unit: str, figure: Callable[[Medians], float]) -> Target:
    def outcome(medians: Medians) -> Outcome:
        try:
            return Outcome(figure(medians), unit, relation, target)
        except KeyError:  # an implementation was skipped
            return Outcome(None, unit, relation, target)

    return outcome


at_least = partial(_target, ">=")
at_most = partial(_target, "<=")


def faster_than(peer: str, target: float) -> Target:
    """The time of the peer over ours."""
    return at_least(target, f"x {peer}", lambda medians: medians[peer] / medians[OURS])


def within(lower_bound: str, target: float) -> Target:
    """Our time over the lower bound."""
    return at_most(target, f"x {lower_bound}", lambda medians: medians[OURS] / medians[lower_bound])


def percent_of(lower_bound: str, target: float) -> Target:
    """Our rate as a percentage of that of the lower bound, which moves as many bytes."""
    return at_least(target, f" % of {lower_bound}", lambda medians: 100 * medians[lower_bound] / medians[OURS])


def ns_per_token(num_tokens: int, target: float) -> Target:
    """Our time over the number of tokens."""
    return at_most(target, " ns per token", lambda medians: medians[OURS] / num_tokens * 1e9)


@dataclass
class Result:
    """What was measured of a case."""

    case: str
    bench: str = ""  # the file of the case is bench_<bench>.py
    headline: str = ""  # the case in the words of the project's README, or empty if it does not appear there
    implementations: dict[str, Times] = field(default_factory=dict)  # ours under "bigramx"
    lower_bounds: dict[str, Times] = field(default_factory=dict)
    targets: list[Outcome] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # implementations and reasons; "bigramx": the whole case
    bytes_moved: int | None = None  # what must be read and written at least
    peak_bytes: dict[str, int] = field(default_factory=dict)  # held at once, beyond what an implementation was given
    series: dict[str, list[float]] = field(default_factory=dict)  # of a cost curve: sizes, seconds by implementation

    to_json = asdict

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """The result of which ``to_json`` returned the content."""
        timed = {
            key: {name: Times(**times) for name, times in content[key].items()}
            for key in ("implementations", "lower_bounds")
        }
        return cls(**{**content, **timed, "targets": [Outcome(**target) for target in content["targets"]]})


class Case:
    """A function that measures, its arguments but for the run's configuration, and perhaps a headline."""

    def __init__(self, function: Callable[..., Result], *, headline: str = "", **arguments: Any) -> None:
        self.function, self.headline, self.arguments = function, headline, arguments

    def run(self, config: RunConfig) -> Result:
        """The result, with the headline."""
        return replace(self.function(config, **self.arguments), headline=self.headline)


class Comparison:
    """The same work on the same data, done by bigramx and by others.

    Args:
        case: What is done.
        targets: What should be reached.
        bytes_moved: What must be read and written at least.
        check: Applied before anything is timed to what each implementation returns, called with the same seed.
    """

    def __init__(
        self, case: str, targets: Sequence[Target] = (), *, bytes_moved: int | None = None, check: Check | None = None
    ) -> None:
        self._result = Result(case, bytes_moved=bytes_moved)
        self._targets = targets
        self._check = check or assert_equal
        self._makers: dict[str, Callable[[], Function]] = {}
        self._optional: set[str] = set()
        self._lower_bounds: dict[str, Function] = {}

    def add(self, name: str, function: Function) -> None:
        """An implementation; ours is named "bigramx" and comes first."""
        self._makers[name] = lambda: function

    def add_peer(self, name: str, make: Callable[[], Function]) -> None:
        """An implementation that may be missing or not work on this machine; ``make`` imports what it needs."""
        self._makers[name] = make
        self._optional.add(name)

    def add_lower_bound(self, name: str, function: Function) -> None:
        """The least that the work costs, whoever does it; what it returns is not checked."""
        self._lower_bounds[name] = function

    def add_copy(self, device: Device, moved_bytes: int) -> None:
        """The lower bound of work that does nothing but move bytes: half of them are read, half written."""

        def buffers() -> tuple[Tensor, Tensor]:
            source = torch.randint(256, (moved_bytes // 2,), dtype=torch.uint8, device=device.name)
            return source, torch.empty_like(source)

        copy = rotating(lambda source, target: target.copy_(source), device.input_sets(buffers))
        self.add_lower_bound(COPY, copy)

    def skip(self, reason: str) -> Result:
        """The result where it cannot be measured."""
        self._result.skipped = {OURS: reason}
        self._result.targets = [target({}) for target in self._targets]
        return self._result

    def run(
        self, config: RunConfig, *, memory: Callable[[Function], int] | None = None, memory_of: Sequence[str] = ()
    ) -> Result:
        """Checks that all implementations return the same, times them, and measures the memory of some."""
        implementations = self._checked()
        functions = {**implementations, **self._lower_bounds}
        times = side_by_side(functions, config.device.elapsed, seconds=config.seconds, min_rounds=config.min_rounds)
        medians = {name: time.median for name, time in times.items()}
        result = self._result
        result.implementations = {name: times[name] for name in implementations}
        result.lower_bounds = {name: times[name] for name in self._lower_bounds}
        result.targets = [target(medians) for target in self._targets]
        if memory is not None:
            result.peak_bytes = {name: memory(implementations[name]) for name in memory_of if name in implementations}
        return result

    def _checked(self) -> dict[str, Function]:
        """The implementations that work here; they return the same."""
        working: dict[str, Function] = {}
        expected: object = None
        for name, make in self._makers.items():
            try:
                function = make()
                torch.manual_seed(0)
                actual = function()
            except Exception as error:
                if name == OURS or not (name in self._optional or isinstance(error, torch.OutOfMemoryError)):
                    raise
                self._result.skipped[name] = _reason(error)
                continue
            working[name] = function
            if name == OURS:
                expected = actual
                continue
            try:
                self._check(actual, expected)
            except Exception as error:
                raise AssertionError(f"{self._result.case}: {name} returns something else: {error}") from error
        return working


def assert_within(tolerance: float) -> Check:
    """Numbers may differ by the tolerance times the number or, near zero, times the largest."""

    def check(actual: Any, expected: Any) -> None:
        if isinstance(expected, tuple):
            for one, other in zip(actual, expected, strict=True):
                check(one, other)
        elif expected is None or isinstance(expected, str):
            assert actual == expected, "the texts differ"
        else:
            numbers = as_tensor(expected)
            atol = tolerance * float(numbers.abs().max())
            torch.testing.assert_close(as_tensor(actual), numbers, rtol=tolerance, atol=atol, check_dtype=False)

    return check


assert_equal = assert_within(1e-5)


def assert_means_within(tolerance: float) -> Check:
    """For implementations that draw differently: only the means are compared."""

    def check(actual: Any, expected: Any) -> None:
        means = as_tensor(actual).double().mean(), as_tensor(expected).double().mean()
        torch.testing.assert_close(*means, rtol=0, atol=tolerance)

    return check


def as_tensor(values: Any) -> Tensor:
    """Numbers of any library."""
    is_foreign = hasattr(values, "__array__") and not isinstance(values, Tensor)
    return torch.as_tensor(values.__array__().copy() if is_foreign else values)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    problem = "needs more memory" if isinstance(error, torch.OutOfMemoryError) else "does not work here"
    return f"{problem}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
