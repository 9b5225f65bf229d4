"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests import devices, tree

# Code that torch.compile caches under one CPU capability corrupts memory under another, and for one schema does not fit
# another: each gets its own folder.
_SCHEMAS = zlib.crc32((tree.CSRC / "bindings.cpp").read_bytes())
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"bigramx_inductor_{torch.backends.cpu.get_cpu_capability()}_{_SCHEMAS:08x}"),
)

# A processor that is emulated, or shared, is no reason to fail.
settings.register_profile(
    "bigramx",
    deadline=None,
    max_examples=15 if devices.IN_SIMT else 60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("few", settings.get_profile("bigramx"), max_examples=5)
# Where tests are to fail, the first example that does is as good as the smallest.
settings.register_profile("first-failure", settings.get_profile("bigramx"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("bigramx")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds options for shorter and longer runs, which meet each test all the same."""
    parser.addoption("--every", type=int, default=1, metavar="K", help="of each test run one of K cases")
    parser.addoption("--long", action="store_true", help="leave nothing out where the suite has a short form")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thins out the cases of each test; one at least stays."""
    tests = itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0])
    items[:] = [item for _name, cases in tests for item in thinned_out(list(cases), config)]


def thinned_out(cases: list[pytest.Item], config: pytest.Config) -> list[pytest.Item]:
    """Those cases of a test that the options and its marks leave."""
    every = config.getoption("--every", 1)
    if every > 1 and cases[0].get_closest_marker("once"):
        return []
    if not config.getoption("--long", False):
        mark = cases[0].get_closest_marker("short_form")
        every = max(every, mark.args[0] if mark else 1)
        cases = [case for case in cases if not case.get_closest_marker("long")]
    return cases[min(every, len(cases)) // 2 :: every]  # the first are often the smallest sizes, which show least


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks."""
    config.addinivalue_line("markers", "short_form(k): of the cases of this test one of k runs, without --long")
    config.addinivalue_line("markers", "long: this case runs with --long alone")
    config.addinivalue_line("markers", "once: shows the same whatever kernels run, and is left out with --every")
    for mark in devices.MARKS:
        config.addinivalue_line("markers", f"{mark}: see tests/devices.py")


def marks_of(item: pytest.Item) -> set[str]:
    """The names of a test's marks."""
    return {mark.name for mark in item.iter_markers()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `device` on each device that its marks allow."""
    marks = marks_of(metafunc.definition)
    if "num_threads" in metafunc.fixturenames:
        places = devices.devices_and_threads_of(marks)
        metafunc.parametrize(("device", "num_threads"), places, indirect=True)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices.devices_of(marks), indirect=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests here rather than in a fixture, for which pytest would report each test in a line of its own."""
    marks = marks_of(item)
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "cpu_only" in marks:
        devices.skip_without_cpu_kernels()
    if "cuda" in marks or params.get("device") == "cuda":
        devices.skip_without_gpu()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of tensors that are created without one."""
    chosen = torch.device(request.param)
    if chosen.type == "cuda":
        torch.set_default_device(chosen)
    yield chosen
    torch.set_default_device(None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, however many the machine has; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """This many threads, however many the machine has; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def keyboard_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even where the tests were started with SIGINT ignored or blocked."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
