"""The memory of gradients on the CPU is used again, never twice at once, and within its limits."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bigramx
from bigramx import functional, memory, reference
from tests import processes

ON_LINUX = sys.platform.startswith("linux")
MB = 2**20
V = 512  # a gradient of 1 MiB
SPARSE = [pytest.param(False, id="dense"), pytest.param(True, id="sparse")]


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    """Empty, and large enough."""
    before = memory.gradient_pool_info().limit
    memory.set_gradient_pool_limit(2**30)
    yield
    memory.set_gradient_pool_limit(before)


def table(vocab_size: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(vocab_size, vocab_size, dtype=dtype).requires_grad_()


def backward(weight: Tensor, *, num_rows: int | None = None, sparse: bool = False) -> Tensor:
    """The gradient, of which `weight` keeps no reference."""
    num_classes = weight.size(1)
    idx = torch.arange(num_rows or num_classes)
    loss = functional.embedding_cross_entropy(idx, weight, (idx * 7 + 1) % num_classes, sparse=sparse)
    loss.backward()
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    return gradient


def memory_of(gradient: Tensor) -> int:
    return (gradient._values() if gradient.is_sparse else gradient).data_ptr()


def held() -> int:
    return memory.gradient_pool_info().held


# ---------------------------------------------------------------------------------------------- is used again


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_next_gradient_takes_the_memory_of_the_last(sparse: bool, dtype: torch.dtype) -> None:
    weight = table(dtype=dtype)
    gradient = backward(weight, sparse=sparse)
    where = memory_of(gradient)
    assert where % 64 == 0
    assert held() == 0
    for _ in range(3):
        del gradient
        assert held() == weight.nbytes
        gradient = backward(weight, sparse=sparse)
        assert memory_of(gradient) == where
        assert held() == 0


def test_the_loop_of_the_lecture() -> None:
    """The new gradient is computed while the old one is still there: two take turns."""
    weight = table()
    idx = torch.arange(V)
    places: list[int] = []
    for _ in range(6):
        loss = functional.embedding_cross_entropy(idx, weight, idx)
        weight.grad = None
        loss.backward()
        assert weight.grad is not None
        places.append(weight.grad.data_ptr())
    assert places[0] != places[1]
    assert places == places[:2] * 3
    assert held() == weight.nbytes


def test_accumulated_gradients() -> None:
    """What is added to the gradient is kept, once it has been added."""
    weight = table()
    idx = torch.arange(V)
    for k in range(1, 4):
        functional.embedding_cross_entropy(idx, weight, idx).backward()
        assert weight.grad is not None
        assert held() == (weight.nbytes if k > 1 else 0)
    expected = torch.softmax(weight.detach(), 1) - torch.eye(V)
    torch.testing.assert_close(weight.grad, 3 * expected / V)


@pytest.mark.parametrize(
    "alias",
    [
        lambda gradient: gradient[3:5, 7:],
        lambda gradient: gradient.detach(),
        lambda gradient: gradient.numpy(),
        lambda gradient: gradient.untyped_storage(),
        lambda gradient: gradient.__dlpack__(),
        lambda gradient: torch.empty(0).set_(gradient),
        lambda gradient: [gradient],
    ],
    ids=["view", "detach", "numpy", "storage", "dlpack", "set_", "itself"],
)
def test_not_while_it_is_referenced(alias: Callable[[Tensor], object]) -> None:
    weight = table()
    gradient = backward(weight)
    where = memory_of(gradient)
    reference_to_it = alias(gradient)
    del gradient
    other = backward(weight)
    assert memory_of(other) != where
    del reference_to_it
    assert held() == weight.nbytes
    assert memory_of(backward(weight)) == where


def test_sparse_gradients_of_other_numbers_of_rows() -> None:
    """A block serves four fifths of its rows too; one that is too small is freed before a larger one is made."""
    weight = table()
    row = weight.nbytes // V
    for num_rows, expected in [(400, 400), (390, 400), (320, 400), (420, 420), (400, 420), (512, 512)]:
        gradient = backward(weight, num_rows=num_rows, sparse=True)
        assert gradient._values().shape == (num_rows, V)
        assert gradient._values().untyped_storage().nbytes() == num_rows * row
        assert held() == 0
        del gradient
        assert held() == expected * row, num_rows


def test_the_larger_of_two_is_kept() -> None:
    weight = table()
    gradients = [backward(weight, num_rows=rows, sparse=True) for rows in (500, 512, 480)]
    for gradient in gradients:
        assert gradient._values().untyped_storage().nbytes() <= weight.nbytes
    gradients.clear()
    assert held() == weight.nbytes


def test_models_of_two_sizes() -> None:
    """In turn, in the order of the lecture: each model finds the memory of its own last gradient but one."""
    weights = [table(256), table(512)]
    places: list[list[int]] = [[], []]
    gradients = [backward(weight) for weight in weights]
    for k in range(40):
        new = backward(weights[k % 2])
        places[k % 2].append(memory_of(new))
        gradients[k % 2] = new
        del new
    assert [len(set(place)) for place in places] == [2, 2]
    assert held() == sum(weight.nbytes for weight in weights)


def test_what_is_not_used_any_more_is_freed() -> None:
    large, small = table(512), table(256)
    backward(large)
    for _ in range(20):
        backward(small)
    assert held() == small.nbytes


def test_fresh_memory_beside_one_block_at_most() -> None:
    weights = [table(size) for size in (256, 384, 512, 724)]
    for _ in range(3):
        for weight in weights:
            gradient = backward(weight)
            assert held() in {0, *(other.nbytes for other in weights)}
            del gradient
            assert held() <= 2 * weights[-1].nbytes


def test_small_gradients_are_left_to_the_c_library() -> None:
    before = memory.gradient_pool_info()
    backward(table(65))
    backward(table(0), num_rows=0)
    assert memory.gradient_pool_info() == before


# ---------------------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("sparse", SPARSE)
def test_gradients_do_not_depend_on_the_pool(sparse: bool) -> None:
    """Whatever the memory holds, of other tables and dtypes too."""
    weights = [table(V), table(V, torch.float64), table(500), table(V, torch.bfloat16), table(700)]
    gradients: dict[int, list[Tensor]] = {}
    for limit in (0, 2**30, 2**30):
        memory.set_gradient_pool_limit(limit)
        gradients[limit] = []
        for weight in weights * 2:
            gradient = backward(weight, num_rows=weight.size(0) - 7, sparse=sparse)
            gradients[limit].append(gradient.to_dense().clone())
            (gradient._values() if sparse else gradient).fill_(float("nan"))
    for actual, expected in zip(gradients[2**30], gradients[0], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["deterministic", "no mode"])
def test_the_gradient_is_that_of_pytorch(mode: str) -> None:
    weight = table()
    torch.use_deterministic_algorithms(mode == "deterministic")
    try:
        for _ in range(2):
            backward(weight).fill_(float("nan"))
        actual = backward(weight)
    finally:
        torch.use_deterministic_algorithms(False)
    idx = torch.arange(V)
    reference.embedding_cross_entropy(idx, weight, (idx * 7 + 1) % V).backward()
    torch.testing.assert_close(actual, weight.grad)


def resized(gradient: Tensor, *size: int) -> Tensor:
    return gradient.resize_(size)


def resized_storage(gradient: Tensor, num_bytes: int) -> Tensor:
    storage = gradient.untyped_storage()
    storage.resize_(num_bytes)
    return torch.tensor([storage.nbytes()])


def emptied_and_refilled(gradient: Tensor) -> Tensor:
    """As FSDP does with what it gathers."""
    values, storage = gradient.clone(), gradient.untyped_storage()
    num_bytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(num_bytes)
    return gradient.copy_(values)


def saved(gradient: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(gradient, file)
    loaded: Tensor = torch.load(io.BytesIO(file.getvalue()))
    return loaded


@pytest.mark.parametrize(
    "use",
    [
        lambda gradient: resized(gradient, V, V - 1),
        lambda gradient: resized(gradient, V + 9, V)[:V],
        lambda gradient: resized(gradient, 3),
        lambda gradient: resized(gradient, 0),
        lambda gradient: resized_storage(gradient, 2 * gradient.nbytes),
        lambda gradient: resized_storage(gradient, 0),
        emptied_and_refilled,
        lambda gradient: gradient.set_(torch.ones(3)),
        lambda gradient: torch.ones(3).set_(gradient.untyped_storage()),
        lambda gradient: gradient.share_memory_(),
        lambda gradient: copy.deepcopy(gradient),
        lambda gradient: copy.copy(gradient),
        lambda gradient: pickle.loads(pickle.dumps(gradient)),
        saved,
        lambda gradient: torch.from_numpy(gradient.numpy()),
        lambda gradient: gradient.clone().add_(gradient),
        lambda gradient: gradient.t().contiguous(),
        lambda gradient: gradient.view(torch.int32),
        lambda gradient: torch._lazy_clone(gradient).mul_(2) + gradient,
        lambda gradient: torch.tensor(
            [gradient._version, gradient.untyped_storage().nbytes(), gradient.untyped_storage().resizable()]
        ),
        lambda gradient: torch.tensor(
            [gradient.is_inference(), gradient.is_leaf, gradient.is_shared(), gradient.is_pinned()]
        ),
    ],
)
def test_it_behaves_as_a_plain_tensor(use: Callable[[Tensor], Tensor]) -> None:
    weight = table()
    for _ in range(2):
        gradient = backward(weight)
        plain = gradient.clone()
        assert torch.equal(use(gradient), use(plain))
        del gradient
    assert held() <= 3 * weight.nbytes


def test_a_gradient_of_inference_mode() -> None:
    idx = torch.arange(V)
    for _ in range(2):
        with torch.inference_mode():
            arguments = (idx, torch.zeros(V, V), idx, None, -100, 1, 0.0, 0.0, -1, False, False, True)
            values = torch.ops.bigramx.embedding_cross_entropy_forward(*arguments)[3]
        assert values.is_inference()
        del values
        assert held() == 4 * V * V


def test_the_profiler_sees_each_gradient() -> None:
    weight = table()
    backward(weight)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        gradient = backward(weight)
        del gradient
    assert held() == weight.nbytes
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events.count(weight.nbytes) == 1
    assert events.count(-weight.nbytes) == 1


# ---------------------------------------------------------------------------------------------- threads, processes


def test_threads() -> None:
    """Each thread finds its gradients right, whoever frees them."""
    weights = [table(size) for size in (300, 300, 512, 350)]
    expected = [backward(weight) for weight in weights]
    wrong: list[int] = []
    left: list[Tensor] = []

    def work(k: int) -> None:
        for _ in range(25):
            gradient = backward(weights[k])
            if not torch.equal(gradient, expected[k]):
                wrong.append(k)
            gradient.fill_(float("nan"))
            left.append(gradient)
            if len(left) > 6:
                left.pop(0)
            if k == 3:
                memory.empty_gradient_pool()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(weights))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    left.clear()
    expected.clear()
    assert held() <= 2 * 4 * 512 * 512
    memory.empty_gradient_pool()
    assert held() == 0


def test_fork() -> None:
    """A child has the kept block too, and neither sees what the other writes."""
    script = """
import os, torch
from bigramx import functional, memory
torch.set_num_threads(1)
memory.set_gradient_pool_limit(2**30)
weight, idx = torch.randn(512, 512, requires_grad=True), torch.arange(512)
def gradient(): return torch.autograd.grad(functional.embedding_cross_entropy(idx, weight, idx), weight)[0]
expected, where = gradient().clone(), gradient().data_ptr()
live = gradient()
copy = gradient()
del copy
pid = os.fork()
for _ in range(20):
    one = gradient()
    assert torch.equal(one, expected) and torch.equal(live, expected)
    assert memory.gradient_pool_info().held == 0
    one.fill_(pid)
    del one
    assert memory.gradient_pool_info().held == weight.nbytes
live.fill_(pid)
memory.empty_gradient_pool()
assert memory.gradient_pool_info().held == 0
if pid: print(os.waitpid(pid, 0)[1], live.eq(pid).all().item())
"""
    assert processes.run([sys.executable, "-c", script], check=True).stdout == "0 True\n"


def test_gradients_that_outlive_the_interpreter() -> None:
    script = """
import atexit, builtins, sys, threading, torch, bigramx
bigramx.memory.set_gradient_pool_limit(2**30)
weight, idx = torch.randn(512, 512, requires_grad=True), torch.arange(512)
def gradient(loss=bigramx.functional.embedding_cross_entropy):
    return torch.autograd.grad(loss(idx, weight, idx), weight)[0]
builtins.kept, torch.kept, sys.kept = gradient(), gradient(), [gradient()]
sys.kept.append(sys.kept)
local = threading.local()
local.gradient = gradient()
atexit.register(lambda kept=gradient(): kept.resize_(700, 700).fill_(1))
for name in [name for name in sys.modules if name.startswith("bigramx")]: del sys.modules[name]
del bigramx
weight.grad = gradient()
"""
    result = processes.run([sys.executable, "-c", script])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


PEAK = """
import sys, torch
from pathlib import Path
from bigramx import functional, memory
torch.set_num_threads(1)
def resident(name): return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024
def step(weight, num_rows, sparse=False):
    idx = torch.arange(num_rows)
    loss = functional.embedding_cross_entropy(idx, weight, idx, sparse=sparse)
    weight.grad = None
    loss.backward()
def peak(limit, work):
    memory.set_gradient_pool_limit(limit)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    memory.empty_gradient_pool()
    return resident("VmHWM") - before
"""


SEQUENCES = """
V = 1448
work = {
    "one size": [(V, V)] * 3,
    "ever smaller": [(2 * V, V // 2)] * 2 + [(V, V)] * 2 + [(1024, 1024)] * 2,
    "ever larger": [(1024, 1024)] * 2 + [(V, V)] * 2 + [(2 * V, V // 2)] * 2,
    "in turn": [(V, V), (1024, 1024), (1300, 1300)] * 3,
    "about the same number of rows": [(V, 600 + 83 * k % 100) for k in range(12)],
    "other numbers of rows": [(V, 300 + 977 * k % 1000) for k in range(12)],
}
for name, sizes in work.items():
    tables = {size: torch.randn(size, size, requires_grad=True) for size, _rows in sizes}
    def train():
        for size, num_rows in sizes: step(tables[size], num_rows, sparse=size != num_rows)
        for weight in tables.values(): weight.grad = None
    train()
    none_kept, kept = peak(0, train), peak(2**40, train)
    largest = max(4 * size * num_rows for size, num_rows in sizes)
    print(f"{name}: {none_kept / largest} {kept / largest}")
"""


FRESH_PAGES = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: 512 pages would be one fault
weight = torch.zeros(3000, 3000, requires_grad=True)
def faults(limit):
    memory.set_gradient_pool_limit(limit)
    for _ in range(2): step(weight, 3000)  # the second takes a block too: the first one's gradient is still there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): step(weight, 3000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(2**40), faults(0))
"""


def printed_by(script: str) -> str:
    """In a process whose C library keeps no freed memory: that of this one does, as other tests have left it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    return processes.run([sys.executable, "-c", PEAK + script], env=environment, check=True).stdout


@pytest.mark.skipif(not ON_LINUX, reason="the peak is told by Linux")
def test_the_peak_grows_by_one_gradient_at_most() -> None:
    """Of the resident memory, against the same work with nothing kept."""
    lines = re.findall("(.+): (.+) (.+)", printed_by(SEQUENCES))
    peaks = {name: (float(none_kept), float(kept)) for name, none_kept, kept in lines}
    assert len(peaks) == 6
    assert peaks["one size"] == pytest.approx((2, 2), abs=0.1)
    assert all(kept - none_kept < 1.1 for none_kept, kept in peaks.values()), peaks


@pytest.mark.skipif(not ON_LINUX, reason="page faults are counted by Linux")
def test_a_step_takes_no_fresh_pages() -> None:
    kept, none_kept = map(int, printed_by(FRESH_PAGES).split())
    assert kept < none_kept / 100


@pytest.mark.skipif(
    not ON_LINUX or "LazyFree" not in Path("/proc/self/smaps").read_text(), reason="the system does not tell"
)
def test_the_system_may_take_large_blocks() -> None:
    def lazily_freed() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree:"))

    weight = torch.zeros(3000, 3000, requires_grad=True)
    gradient = backward(weight)
    expected = gradient.clone()
    before = lazily_freed()
    del gradient
    assert held() == weight.nbytes
    assert lazily_freed() - before > weight.nbytes / 2  # it may have taken some already
    gradient = backward(weight)
    assert torch.equal(gradient, expected)
    assert lazily_freed() - before < 6 * MB


# ---------------------------------------------------------------------------------------------- limits


def test_the_limit() -> None:
    weight, small = table(), table(256)
    for limit, kept in [(0, 0), (weight.nbytes - 1, 0), (weight.nbytes, weight.nbytes), (2**80, weight.nbytes)]:
        memory.set_gradient_pool_limit(limit)
        assert memory.gradient_pool_info().limit == min(limit, 2**63 - 1)
        assert held() == 0
        backward(weight)
        assert held() == kept
    memory.set_gradient_pool_limit(np.int64(weight.nbytes))
    backward(weight)
    backward(small)
    assert held() == small.nbytes
    memory.empty_gradient_pool()
    assert held() == 0
    backward(weight)
    assert held() == weight.nbytes


def test_a_wrong_limit_changes_nothing() -> None:
    weight = table()
    backward(weight)
    before = memory.gradient_pool_info()
    with pytest.raises(ValueError, match="expected num_bytes >= 0, got -1"):
        memory.set_gradient_pool_limit(-1)
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError, match="integer"):
            memory.set_gradient_pool_limit(wrong)  # type: ignore[arg-type]
    assert memory.gradient_pool_info() == before


def test_hits_and_misses_are_told() -> None:
    weight = table()
    before = memory.gradient_pool_info()
    for _ in range(4):
        backward(weight)
    after = memory.gradient_pool_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 1)
    told = bigramx.build_info()["gradient_pool"]
    assert told == f"{weight.nbytes} of {2**30} bytes held, {after.hits} hits, {after.misses} misses"


def test_the_environment_variable() -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "BIGRAMX_GRADIENT_POOL_LIMIT": "1 GB"}
    result = processes.run([sys.executable, "-c", "import bigramx"], env=environment)
    expected = "ValueError: bigramx: expected BIGRAMX_GRADIENT_POOL_LIMIT to be a number of bytes, got '1 GB'\n"
    assert result.stderr.endswith(expected)


@pytest.mark.parametrize("wrong", ["-1", "x", "1.5", "1e9", " 5", "0x10", "\u0663", "9" * 5000])
def test_wrong_values_of_the_environment_variable(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGRAMX_GRADIENT_POOL_LIMIT", wrong)
    with pytest.raises(ValueError, match="expected BIGRAMX_GRADIENT_POOL_LIMIT to be a number of bytes, got"):
        memory._initial_limit()


def test_the_limit_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the memory; nothing where memory that is kept counts as used."""
    monkeypatch.delenv("BIGRAMX_GRADIENT_POOL_LIMIT", raising=False)
    assert memory._initial_limit(tmp_path) == 2**30
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nSwapTotal: 0 kB\n")
    for overcommit, limit in [("0", 2**20), ("1", 2**20), ("2", 0)]:
        (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{overcommit}\n")
        assert memory._initial_limit(tmp_path) == limit
    monkeypatch.setenv("BIGRAMX_GRADIENT_POOL_LIMIT", "7")
    assert memory._initial_limit(tmp_path) == 7


@pytest.mark.skipif(not ON_LINUX, reason="the address space cannot be limited")
def test_a_limited_address_space() -> None:
    """What is kept makes room, before a failing malloc takes it for an arena; then nothing is kept.

    Too large a gradient raises torch's own error.
    """
    script = """
import resource, torch
from pathlib import Path
from bigramx import functional, memory
torch.set_num_threads(1)
memory.set_gradient_pool_limit(2**40)
def gradient(weight, idx=torch.arange(8)):
    return torch.autograd.grad(functional.embedding_cross_entropy(idx, weight, idx), weight)[0]
large, larger = torch.zeros(5000, 5000, requires_grad=True), torch.zeros(8000, 8000, requires_grad=True)
gradient(large)
print(memory.gradient_pool_info().held == large.nbytes)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# Room for what is kept and the 128 MB that glibc asks for; not for the larger one and the 64 that an arena keeps.
resource.setrlimit(resource.RLIMIT_AS, (used + larger.nbytes - 80 * 10**6, resource.RLIM_INFINITY))
print(gradient(larger).shape, memory.gradient_pool_info().held)
print(torch.equal(gradient(large), gradient(large)), memory.gradient_pool_info().held)
weight = torch.empty_strided((10**5, 10**5), (10, 1), requires_grad=True)
for call in (lambda: gradient(weight), lambda: torch.empty(10**5, 10**5)):
    try: call()
    except RuntimeError as error: print(str(error).partition("alloc_cpu.cpp")[2])
"""
    lines = processes.run([sys.executable, "-c", script], check=True).stdout.splitlines()
    assert lines[:3] == ["True", "torch.Size([8000, 8000]) 0", "True 0"]
    assert lines[3] == lines[4]
    assert "can't allocate memory: you tried to allocate 40000000000 bytes" in lines[3]
