"""Whether a table can fit, from the files in which Linux tells its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigramx import memory

CPU = torch.device("cpu")
GB = 10**9
NO_LIMIT = str(2**63 - 4096)


def machine(root: Path, files: dict[str, str], ram: int = 16, swap: int = 2) -> Path:
    """A machine with so many gibibytes."""
    meminfo = f"MemTotal: {ram * 2**20} kB\nMemAvailable: 1 kB\nSwapTotal: {swap * 2**20} kB\nHugePages_Total: 0\n"
    for name, content in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "gibibytes"),
    [
        ({}, 18),
        ({"proc/self/cgroup": "0::/\n"}, 18),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 18),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2**32}\n"}, 6),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2**40}\n"}, 18),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{2**32}\n"}, 6),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": f"{2**32}\n"}, 6),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/c/memory.max": f"{2**32}\n"}, 18),
        ({"proc/self/cgroup": "3:cpu:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2**32}\n"}, 18),
        ({"proc/self/cgroup": "3:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2**32}\n"}, 6),
        ({"proc/self/cgroup": "3:memory:/host\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**32}\n"}, 6),
        ({"proc/self/cgroup": "3:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{NO_LIMIT}\n"}, 18),
        (
            {
                "proc/self/cgroup": "4:memory:/a:b\n0::/c\n",
                "sys/fs/cgroup/memory/a:b/memory.limit_in_bytes": f"{2**33}\n",
                "sys/fs/cgroup/c/memory.max": f"{2**32}\n",
            },
            6,
        ),
    ],
    ids=repr,
)
def test_memory_in_all(tmp_path: Path, files: dict[str, str], gibibytes: int) -> None:
    assert memory.total_memory(CPU, machine(tmp_path, files)) == gibibytes * 2**30


@pytest.mark.parametrize(
    "meminfo", ["", "MemTotal: 3 kB\n", "no colon\n", "MemTotal: x kB\nSwapTotal: 1 kB\n"], ids=repr
)
def test_systems_that_do_not_tell(tmp_path: Path, meminfo: str) -> None:
    assert memory.total_memory(CPU, tmp_path) is None
    assert memory.total_memory(CPU, machine(tmp_path, {"proc/meminfo": meminfo})) is None
    for device in ("meta", "mps", "xla"):
        assert memory.total_memory(torch.device(device), machine(tmp_path, {})) is None


@pytest.mark.cuda
def test_memory_of_a_gpu() -> None:
    total = memory.total_memory(torch.device("cuda"))
    assert total == torch.cuda.mem_get_info()[1]
    with pytest.raises(MemoryError, match="cuda has"):
        memory.check_training(10**7, device="cuda")


@pytest.fixture
def sixteen_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: 16 * GB if device.type == "cpu" else None)


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({}, 31622),
        ({"sparse": True}, 63245),
        ({"sparse": True, "num_states": 2}, 36514),
        ({"dtype": torch.bfloat16}, 44721),
        ({"dtype": torch.float64}, 22360),
        ({"num_states": 0}, 44721),
        ({"has_gradient": False}, 36514),
        ({"num_states": 4}, 25819),
        ({"num_counts": 2}, 22360),
        ({"device": "cpu"}, 31622),
    ],
    ids=str,
)
def test_the_largest_vocabulary_that_fits(sixteen_gigabytes: None, options: dict[str, int], largest: int) -> None:
    memory.check_training(largest, **options)  # type: ignore[arg-type]
    with pytest.raises(
        MemoryError, match=f"V = {largest + 1:,} takes .* cpu has 16.0 GB .* at most V = {largest:,}[, ]"
    ):
        memory.check_training(largest + 1, **options)  # type: ignore[arg-type]
    for unknown in ("meta", "mps"):
        memory.check_training(10**9, **{**options, "device": unknown})  # type: ignore[arg-type]


def test_the_message_says_what_would_fit(sixteen_gigabytes: None) -> None:
    def message(**options: object) -> str:
        with pytest.raises(MemoryError) as caught:
            memory.check_training(50257, **options)  # type: ignore[arg-type]
        return str(caught.value)

    assert message() == (
        "training a table with V = 50,257 takes 10.1 GB for the table + 10.1 GB for its gradient + 20.2 GB for the "
        "optimizer's states, and cpu has 16.0 GB of memory in all; at most V = 31,622, V = 63,245 with sparse=True, "
        "V = 44,721 with dtype=torch.bfloat16 would fit"
    )
    assert "sparse=True" not in message(sparse=True, dtype=torch.float64)
    assert "bfloat16" not in message(dtype=torch.float16)
    assert "20.2 GB for the pair counts" in message(num_counts=1)


def test_defaults_are_pytorchs(sixteen_gigabytes: None) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(MemoryError, match="V = 22,360"):
            memory.check_training(30000)
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        memory.check_training(10**9)


def test_this_machine() -> None:
    memory.check_training(1000)
    if memory.total_memory(CPU) is not None:  # on Linux
        with pytest.raises(MemoryError, match=r"takes 4,000,000,000\.0 GB for the table"):
            memory.check_training(10**9, dtype=torch.float32)
