"""data.get_batch against the batches of the lecture's script."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import data, reference
from tests.devices import capturing, draws_frozen_by_a_graph, on_device
from tests.interrupts import call_beside, call_until_handled

pytestmark = pytest.mark.usefixtures("device")


def lectures_get_batch(tokens: torch.Tensor, batch_size: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ix = torch.randint(len(tokens) - block_size, (batch_size,), device="cpu")
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return x, y


@given(
    seed=st.integers(0, 2**32),
    batch_size=st.sampled_from([1, 4, 32]),
    block_size=st.sampled_from([1, 8, 17]),
    extra=st.sampled_from([1, 2, 1000]),
    dtype=st.sampled_from([torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64]),
)
def test_draws_the_lectures_batches(
    seed: int, batch_size: int, block_size: int, extra: int, dtype: torch.dtype
) -> None:
    tokens = torch.randint(200, (block_size + extra,))
    torch.manual_seed(seed)
    expected, state = lectures_get_batch(tokens, batch_size, block_size), torch.get_rng_state()
    torch.manual_seed(seed)
    actual = data.get_batch(tokens.to(dtype), batch_size, block_size)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.int64
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch_size", [447, 448, 449, 896, 1000])
def test_batches_of_many_blocks(batch_size: int) -> None:
    """A GPU gets the starts in launches of at most 448."""
    tokens = torch.randint(200, (5000,))
    torch.manual_seed(1)
    expected = lectures_get_batch(tokens, batch_size, 3)
    torch.manual_seed(1)
    assert torch.equal(torch.stack(data.get_batch(tokens, batch_size, 3)), torch.stack(expected))


@pytest.mark.cpu_only
@pytest.mark.parametrize(("batch_size", "block_size"), [(300_000, 1), (1000, 200), (3, 200_000)])
def test_batches_in_chunks(batch_size: int, block_size: int) -> None:
    """The offsets of some 65536 tokens are drawn at a time."""
    tokens = torch.randint(200, (500_000,))
    ours, references = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    idx, targets = data.get_batch(tokens, batch_size, block_size, generator=ours)
    offsets = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=references)
    positions = offsets + torch.arange(block_size)
    assert torch.equal(idx, tokens[positions])
    assert torch.equal(targets, tokens[positions + 1])
    assert torch.equal(ours.get_state(), references.get_state())


@pytest.mark.cpu_only
def test_handlers_and_other_threads_run_during_a_call() -> None:
    tokens, generator = torch.randint(200, (10**6,), dtype=torch.uint8), torch.Generator()

    def prepare(size: int) -> Callable[[], object]:
        return partial(data.get_batch, tokens, size * 2 * 10**7, 1, generator=generator)

    _, size = call_until_handled(prepare)
    assert call_beside(prepare(size), lambda: torch.rand((), generator=generator)) > 0


def test_a_generator_leaves_the_default_one_unchanged() -> None:
    tokens, state = torch.arange(100), torch.get_rng_state()
    first = data.get_batch(tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    again = data.get_batch(tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.arange(8), 4, 8), ValueError, "more than block_size = 8 tokens, got 8"),
        ((torch.arange(0), 4, 8), ValueError, "got 0"),
        ((torch.arange(9), 0, 8), ValueError, ">= 1, got 0 and 8"),
        ((torch.arange(9), 4, 0), ValueError, ">= 1, got 4 and 0"),
        ((torch.zeros(3, 9), 4, 8), RuntimeError, r"1-D, got shape \[3, 9\]"),
        ((torch.arange(9), 2**61, 8), RuntimeError, r"batch_size \* block_size .*, got 2305843009213693952 \* 8"),
        ((torch.arange(9), 2**58, 8), RuntimeError, "Storage size calculation overflowed"),
        ((torch.arange(9), 2**50, 8), RuntimeError, "memory"),
        ((torch.arange(9), 2**63 - 1, 1), RuntimeError, "Storage size calculation overflowed"),
        ((torch.arange(9), 1, 2**63 - 1), ValueError, "more than block_size = 9223372036854775807 tokens, got 9"),
        ((torch.arange(9), -(2**63), -(2**63)), ValueError, ">= 1, got -9223372036854775808 and"),
        (([1, 2, 3], 4, 8), TypeError, "'Tensor' for argument 'tokens'"),
        ((torch.arange(9), 4.5, 8), TypeError, "'int' for argument 'batch_size'"),
        ((torch.zeros(9), 4, 8), RuntimeError, r"\[Byte, UInt16, UInt32, Int, Long\], got Float"),
    ],
)
def test_bad_batches(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.get_batch(*map(on_device, arguments))


def test_tokens_that_are_not_contiguous() -> None:
    tokens = torch.randint(200, (1000, 3))[:, 1]
    expected = data.get_batch(tokens.clone(), 4, 8, generator=torch.Generator().manual_seed(1))
    actual = data.get_batch(tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_draws_from_long_texts_as_torch_does() -> None:
    tokens = torch.zeros(1, dtype=torch.uint8).expand(2**28 + 9)  # beyond 2^28 starts, torch draws 64 bits each
    torch.manual_seed(1)
    torch.randint(len(tokens) - 8, (32,), device="cpu")
    state = torch.get_rng_state()
    torch.manual_seed(1)
    data.get_batch(tokens, 32, 8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cpu_only
def test_devices_without_a_kernel_draw_the_same() -> None:
    tokens = torch.randint(200, (1000,), dtype=torch.int32)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    op = torch.ops.bigramx.get_batch.default
    actual = op.redispatch(keys, tokens, 4, 8, torch.Generator().manual_seed(1))
    expected = op(tokens, 4, 8, torch.Generator().manual_seed(1))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("num_shards", [1, 2])
def test_batches_on_another_device(num_shards: int) -> None:
    tokens = torch.randint(200, (1000,)).to(torch.uint16)
    source = data.TokenShards(list(tokens.split(len(tokens) // num_shards)))
    for batch, module in itertools.product((4, 1000), (data, reference)):
        here = module.get_batch(source, batch, 8, generator=torch.Generator().manual_seed(1))
        there = module.get_batch(source, batch, 8, generator=torch.Generator().manual_seed(1), device="meta")
        for ours, expected in zip(there, here, strict=True):
            assert (ours.shape, ours.dtype, ours.device.type) == (expected.shape, torch.int64, "meta")
        again = module.get_batch(source, batch, 8, generator=torch.Generator().manual_seed(1), device="cpu")
        assert torch.equal(torch.stack(again), torch.stack(here).cpu())


@pytest.mark.gpu_only
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["default", "given"])
def test_a_graph_does_not_capture_the_cpus_draws(generator: torch.Generator | None) -> None:
    tokens = torch.arange(50)
    for source in (tokens, data.TokenShards([tokens[:25], tokens[25:]])):
        data.get_batch(source, 3, 4, generator=generator)
        with draws_frozen_by_a_graph("get_batch"), capturing():
            data.get_batch(source, 3, 4, generator=generator)


@pytest.mark.cpu_only
def test_a_device_that_does_not_exist_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(RuntimeError, match="nowhere"):
        data.get_batch(torch.arange(100), 4, 8, generator=generator, device="nowhere")
    assert torch.equal(generator.get_state(), before)
