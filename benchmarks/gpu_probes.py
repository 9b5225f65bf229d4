"""What first_gpu_run.py runs in processes of their own: python -m benchmarks.gpu_probes NAME [ARGUMENT]."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EMULATED = "BIGRAMX_EXTENSION" in os.environ


def versions() -> None:
    """Prints what the machine has."""
    import torch

    print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
    print("cores", os.cpu_count())
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
    commands = (
        ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        ("nvcc", "--version"),
        ("c++", "--version"),
        ("ninja", "--version"),
        ("ncu", "--version"),
        ("compute-sanitizer", "--version"),
    )
    for command in commands:
        if shutil.which(command[0]) is None:
            print(command[0], "is not found")
        else:
            print(command[0], subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def build(out: str) -> None:
    """Compiles the extension for the card, or takes what an earlier call kept of the same sources, torch and card."""
    import torch

    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    sources = sorted([ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())])
    content = b"".join(path.read_bytes() for path in sources) + f"{torch.__version__} {architecture}".encode()
    kept = Path(out, f"built-{hashlib.sha256(content).hexdigest()[:16]}")
    if kept.exists():
        for path in kept.iterdir():
            shutil.copy(path, ROOT / "bigramx")
        print("taken from", kept)
        return
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture, "BIGRAMX_CUDA": "1"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    kept.mkdir(parents=True)
    for built in glob.glob(str(ROOT / "bigramx/_C*.so")):
        shutil.copy(built, kept)
    print("built for", architecture)


# ------------------------------------------------------------------------------------------------- each op once


def load_extension() -> None:
    """The emulator's, where it is to run the kernels; says which. Comes before the package is imported."""
    import tests  # noqa: F401
    from bigramx import _C

    print("kernels of", os.path.relpath(_C.__file__, ROOT))


def device() -> Any:
    """Where the kernels run."""
    import torch

    return torch.device("cpu" if EMULATED else "cuda")


def embedding_cross_entropy() -> None:
    """Each strategy, and both gradients, against the reference."""
    import torch

    from bigramx import functional, reference

    # All in one block; counted; grouped in one block and by several, where a warp or a block takes a row.
    for num_rows, num_classes, num_pairs in (
        (65, 65, 257),
        (400, 60, 257),
        (300, 500, 257),
        (300, 500, 2**13 + 1),
        (9, 3000, 257),
        (9, 3000, 2**13 + 1),
    ):
        weight = torch.randn(num_rows, num_classes, requires_grad=True)
        on_device = weight.detach().to(device()).requires_grad_()
        idx, targets = torch.randint(num_rows, (num_pairs,)), torch.randint(num_classes, (num_pairs,))
        expected = reference.embedding_cross_entropy(idx, weight, targets)
        expected.backward()
        for sparse in (False, True):
            on_device.grad = None
            loss = functional.embedding_cross_entropy(idx.to(device()), on_device, targets.to(device()), sparse=sparse)
            loss.backward()
            assert on_device.grad is not None
            gradient = on_device.grad.to_dense() if sparse else on_device.grad
            torch.testing.assert_close(loss.cpu(), expected)
            torch.testing.assert_close(gradient.cpu(), weight.grad)


def get_batch() -> None:
    """The batches of the CPU's generator."""
    import torch

    from bigramx import data, reference

    tokens = torch.randint(60000, (5000,), dtype=torch.int32).to(torch.uint16)
    batches = [
        function(where, 32, 8, generator=torch.Generator().manual_seed(1))
        for function, where in ((data.get_batch, tokens.to(device())), (reference.get_batch, tokens.int()))
    ]
    for actual, expected in zip(*batches, strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


def count_bigrams() -> None:
    """Small and large tables."""
    import torch

    from bigramx import functional, reference

    for vocab_size in (65, 900):
        tokens = torch.randint(vocab_size, (10_001,))
        counts = functional.count_bigrams(tokens.to(device()), vocab_size)
        torch.testing.assert_close(counts.cpu(), reference.count_bigrams(tokens, vocab_size))


def multinomial() -> None:
    """One draw, several with and without replacement; the reference's for a generator on the CPU."""
    import torch

    from bigramx import functional, reference

    probs = torch.rand(5, 300)
    for num_samples, replacement in ((1, False), (7, True), (7, False)):
        samples = [
            function(where, num_samples, replacement, sampler="philox", generator=torch.Generator().manual_seed(1))
            for function, where in ((functional.multinomial, probs.to(device())), (reference.multinomial, probs))
        ]
        torch.testing.assert_close(samples[0].cpu(), samples[1])


def generate() -> None:
    """By the cumulative table, by the logits, step by step, and the most likely tokens."""
    import torch

    from bigramx import functional, reference

    options: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}]
    for vocab_size in (65, 300):
        weight, idx = torch.randn(vocab_size, vocab_size), torch.randint(vocab_size, (3, 2))
        for option in options:
            tokens = [
                function(*inputs, 9, sampler="philox", generator=torch.Generator().manual_seed(1), **option)
                for function, inputs in (
                    (functional.generate, (idx.to(device()), weight.to(device()))),
                    (reference.generate, (idx, weight)),
                )
            ]
            torch.testing.assert_close(tokens[0].cpu(), tokens[1])


def adamw_() -> None:
    """A step, with and without AMSGrad."""
    import torch

    from bigramx import functional, reference

    options: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    for is_amsgrad in (False, True):
        state = [torch.rand(1001) for _ in range(5 if is_amsgrad else 4)]
        on_device = [tensor.to(device(), copy=True) for tensor in state]
        functional.adamw_(*on_device, step=torch.ones((), device=device()), **options)
        reference.adamw_(*state, step=torch.ones(()), **options)
        torch.testing.assert_close([tensor.cpu() for tensor in on_device], state)


OPS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (embedding_cross_entropy, get_batch, count_bigrams, multinomial, generate, adamw_)
}


def op(name: str) -> None:
    """Runs an op and compares what it returns."""
    import torch

    load_extension()
    torch.manual_seed(1)
    OPS[name]()
    if not EMULATED:
        torch.cuda.synchronize()
    print(name, "returns what it should")


# ------------------------------------------------------------------------------------------------ what takes long


def jobs() -> dict[str, tuple[Callable[[], object], float]]:
    """What the table shows: a call, and the bytes that it must move at least."""
    import torch

    from bigramx import functional

    where = device()
    result: dict[str, tuple[Callable[[], object], float]] = {}
    size = 1 << 12 if EMULATED else 1 << 28
    source, target = torch.ones(size, device=where), torch.empty(size, device=where)
    result["a copy of 1 GiB"] = (functools.partial(target.copy_, source), 8 * size)

    def backward(idx: Any, weight: Any, targets: Any, sparse: bool) -> None:
        weight.grad = None
        functional.embedding_cross_entropy(idx, weight, targets, sparse=sparse).backward()

    for vocab_size in (40, 1100) if EMULATED else (8192, 32000):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(vocab_size, vocab_size, device=where, dtype=dtype, requires_grad=True)
            pairs = [torch.randint(vocab_size, (32 if EMULATED else vocab_size,), device=where) for _ in range(2)]
            for sparse in (False, True):
                call = functools.partial(backward, pairs[0], weight, pairs[1], sparse)
                rows = len(pairs[0].unique())
                moved = (rows + (rows if sparse else vocab_size)) * vocab_size * dtype.itemsize
                name = f"V={vocab_size} N={len(pairs[0])} {str(dtype)[6:]}{' sparse' if sparse else ''}"
                result[name] = (call, moved)
    shape = (300, 100) if EMULATED else (1000, 1000)
    weight = torch.randn(shape, device=where, requires_grad=True)
    for num_pairs in (2**13, 2**13 + 1):  # grouped in one block, and by several
        pairs = [torch.randint(size, (num_pairs,), device=where) for size in shape]
        call = functools.partial(backward, pairs[0], weight, pairs[1], sparse=False)
        result[f"V={shape[0]} N={num_pairs} float32"] = (call, 2 * weight.nbytes)
    tokens = torch.randint(65, (10_000 if EMULATED else 10**8,), device=where, dtype=torch.int32).to(torch.uint16)
    result["count_bigrams, V=65, uint16"] = (functools.partial(functional.count_bigrams, tokens, 65), tokens.nbytes)
    small, idx = torch.randn(65, 65, device=where), torch.zeros((8 if EMULATED else 4096, 1), device=where).long()
    num_tokens = 10 if EMULATED else 1000
    draw = functools.partial(functional.generate, idx, small, num_tokens)
    result[f"generate, {len(idx)} chains of {num_tokens}, V=65"] = (draw, len(idx) * num_tokens * 8)
    return result


def captured_step() -> Callable[[], object]:
    """A replay of the lecture's whole step, V=65 B=32 T=8; over the emulator the step itself."""
    import torch

    from benchmarks.device import CPU, CUDA
    from bigramx import BigramLanguageModel, data, optim

    where = device()
    model = BigramLanguageModel(65).to(where)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, capturable=not EMULATED)
    tokens, generator = torch.randint(65, (5000,), device=where), torch.Generator(where).manual_seed(1)

    def step() -> object:
        idx, targets = data.get_batch(tokens, 32, 8, generator=generator)
        optimizer.zero_grad()
        _logits, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return (CPU if EMULATED else CUDA).capture(step)


def table() -> None:
    """Prints times, rates, and which kernels take them."""
    load_extension()
    from benchmarks.device import CPU, CUDA

    clock = CPU if EMULATED else CUDA
    rows = {**jobs(), "captured step, V=65 B=32 T=8": (captured_step(), 0.0)}
    for name, (call, num_bytes) in rows.items():
        call()
        repeats = 1 if EMULATED else 10
        seconds = statistics.median(clock.elapsed(call, repeats) / repeats for _ in range(5))
        rate = f", {num_bytes / seconds / 1e9:.0f} GB/s" if num_bytes else ""
        print(f"{name}: {seconds * 1e6:.1f} us{rate}")
        for kernel, microseconds in kernel_times(call):
            print(f"    {microseconds:10.1f} us  {kernel}")


def kernel_times(call: Callable[[], object]) -> list[tuple[str, float]]:
    """What a call runs on the GPU, in order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if EMULATED:
        return []
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or [] if event.device_type.name == "CUDA"]
    return [(kernel_name(event.name), event.device_time) for event in sorted(events, key=lambda e: e.time_range.start)]


def kernel_name(name: str) -> str:
    """Without namespaces, arguments and the types that say nothing."""
    name = re.sub(r"\(anonymous namespace\)::|bigramx::cuda::|^void |at::native::", "", name)
    return name.partition("(")[0][:110]


def kernels() -> None:
    """Runs each job of the table twice, for a profiler around the process."""
    load_extension()
    for call, _num_bytes in jobs().values():
        call()
        call()


if __name__ == "__main__":
    NAMES: dict[str, Callable[..., None]] = {each.__name__: each for each in (versions, build, op, table, kernels)}
    NAMES[sys.argv[1]](*sys.argv[2:])
