"""Checks that run on all ranks of a process group. tests/test_distributed.py starts them, and names each as a test."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import bigramx
from bigramx import BigramLanguageModel, distributed, functional, optim, reference
from tests import forked_ranks

CHECKS: dict[str, Callable[[Path], None]] = {}  # each is given a folder of its own


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


@contextlib.contextmanager
def raises(kind: type[Exception], part: str = "") -> Iterator[None]:
    """As pytest.raises; the error is raised on this rank, and its message has this part."""
    try:
        yield
    except kind as error:
        if part not in str(error):
            raise AssertionError(f"expected {part!r} in the message") from error
    else:
        raise AssertionError(f"{kind.__name__} was not raised on rank {dist.get_rank()}")


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def place(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(tensor, mesh, placements)


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    full: Tensor = tensor.full_tensor()
    return full


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ the loss

ROWS, WHOLE = Shard(0), Replicate()
Layout = tuple[tuple[int, ...], list[Placement], list[Placement]]  # of the mesh, the table, the batch

ROWS_AND_WHOLE_BATCH: Layout = ((4,), [ROWS], [WHOLE])
ROWS_AND_BATCH: Layout = ((4,), [ROWS], [ROWS])
BATCH: Layout = ((4,), [WHOLE], [ROWS])
NOTHING: Layout = ((4,), [WHOLE], [WHOLE])
ROWS_BESIDE_BATCH: Layout = ((2, 2), [WHOLE, ROWS], [ROWS, WHOLE])
ROWS_TWICE: Layout = ((2, 2), [ROWS, ROWS], [ROWS, ROWS])
LAYOUTS = [ROWS_AND_WHOLE_BATCH, ROWS_AND_BATCH, BATCH, NOTHING, ROWS_BESIDE_BATCH, ROWS_TWICE]
RARE_LAYOUTS: list[Layout] = [
    ((4,), [Shard(1)], [ROWS]),
    ((4,), [Partial()], [ROWS]),
    ((4,), [ROWS], [Shard(1)]),
    ((2, 2), [WHOLE, ROWS], [ROWS, ROWS]),
    ((2, 2), [ROWS, ROWS], [WHOLE, WHOLE]),
    ((2, 2), [ROWS, WHOLE], [WHOLE, ROWS]),
    ((2, 2), [WHOLE, WHOLE], [ROWS, ROWS]),
    ((2, 2), [Shard(1), ROWS], [WHOLE, ROWS]),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "ignore_index": 3, "class_weight": True},
    {"class_weight": True, "z_loss": 0.1, "label_smoothing": 0.2, "padding_idx": -2},
    {"class_weight": True, "z_loss": 0.1, "reduction": "sum"},
    {"ignore_index": 3, "z_loss": 0.1, "padding_idx": 1},
]


def compare_losses(
    layout: Layout,
    options: dict[str, Any],
    *,
    num_rows: int = 10,
    num_classes: int = 7,
    pairs: tuple[int, ...] = (8, 3),
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
    is_soft: bool = False,
) -> None:
    """The loss, its gradient, and the logits, against PyTorch's of the whole table and batch in this process."""
    torch.manual_seed(1)
    shape, table, batch = layout
    mesh, options = mesh_of(*shape), dict(options)
    weight, idx = torch.randn(num_rows, num_classes).to(dtype), torch.randint(num_rows, pairs)
    targets = torch.randn(*pairs, num_classes).softmax(-1).to(dtype) if is_soft else torch.randint(num_classes, pairs)
    class_weight = torch.rand(num_classes).to(dtype) if options.pop("class_weight", False) else None
    grad_loss = torch.rand(pairs if options.get("reduction") == "none" else ()).to(dtype)

    exact = [None if tensor is None else tensor.double() for tensor in (weight, class_weight, grad_loss)]
    expected_weight = exact[0].requires_grad_()  # type: ignore[union-attr]
    exact_targets = targets.double() if is_soft else targets
    expected = reference.embedding_cross_entropy(idx, expected_weight, exact_targets, class_weight=exact[1], **options)
    expected.backward(exact[2])

    def assert_close(actual: Tensor, expected: Tensor | None) -> None:
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)

    for function in (functional.embedding_cross_entropy, functional.embedding_cross_entropy_with_logits):
        parameter: Any = nn.Parameter(place(weight, mesh, *table))
        result: Any = function(
            place(idx, mesh, *batch), parameter, place(targets, mesh, *batch), class_weight=class_weight, **options
        )
        loss, logits = result if isinstance(result, tuple) else (result, None)
        loss.backward(place(grad_loss, mesh, *loss.placements))
        assert loss.dtype == dtype
        assert_close(whole(loss), expected.detach())
        # As PyTorch places it; a rank with a part of the rows has that part of the gradient.
        expected_placements = tuple(WHOLE if kind.is_partial() else kind for kind in parameter.placements)
        assert parameter.grad.placements == expected_placements
        assert parameter.grad.to_local().shape == parameter.to_local().shape
        assert_close(whole(parameter.grad), expected_weight.grad)
        if logits is not None:
            assert torch.equal(whole(logits), F.embedding(idx, weight).view(-1, num_classes))


@check
def losses_and_gradients(_folder: Path) -> None:
    for layout, options in itertools.product(LAYOUTS, OPTIONS):
        compare_losses(layout, options)
    for layout, options in itertools.product(RARE_LAYOUTS, OPTIONS[2:4]):
        compare_losses(layout, options)


@check
def uneven_and_empty_shards(_folder: Path) -> None:
    """Ranks without a row, batches that do not divide, tables that are not square."""
    sizes: list[tuple[int, tuple[int, ...]]] = [(1, (1, 2)), (3, (3, 2)), (9, (5,)), (5, ())]
    for layout, (num_rows, pairs) in itertools.product(LAYOUTS, sizes):
        if pairs or layout[2] == [WHOLE]:
            compare_losses(layout, {"padding_idx": -1}, num_rows=num_rows, pairs=pairs)
    compare_losses(ROWS_AND_BATCH, {"reduction": "none"}, num_rows=3, pairs=(5, 2))
    compare_losses(BATCH, {"reduction": "none"}, num_rows=3, pairs=(5, 2))


@check
def no_pairs(_folder: Path) -> None:
    """The mean is NaN, and the gradient zero, not NaN."""
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((0,), {}),
        ((4, 1), {"ignore_index": 0}),
        ((0, 2), {"reduction": "none"}),
    ]
    for layout, (pairs, options) in itertools.product((ROWS_AND_WHOLE_BATCH, ROWS_AND_BATCH, BATCH), cases):
        compare_losses(layout, options, pairs=pairs, num_classes=1)


@check
def dtypes(_folder: Path) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for layout in (ROWS_AND_BATCH, BATCH):
            for options in ({}, {"class_weight": True, "z_loss": 0.1}, {"reduction": "none"}):
                compare_losses(layout, options, dtype=dtype, tolerance=tolerance)


@check
def small_integers(_folder: Path) -> None:
    """As uint8 the ignore_index -100 would be the token 156."""
    table = torch.randn(200, 200)
    idx, targets = torch.arange(200, dtype=torch.int32), torch.arange(200, dtype=torch.uint8)
    expected = reference.embedding_cross_entropy(idx, table, targets)
    for placement in (ROWS, WHOLE):
        loss = functional.embedding_cross_entropy(idx, place(table, mesh_of(4), placement), targets)
        torch.testing.assert_close(whole(loss), expected)


@check
def sums_of_float16_do_not_overflow(_folder: Path) -> None:
    """The sum of the losses is beyond float16, their mean is not. Autocast has the loss in float32."""
    weight = place(torch.zeros(8, 8192, dtype=torch.float16), mesh_of(4), ROWS)
    idx = torch.arange(8).repeat(4096)
    loss = functional.embedding_cross_entropy(idx, weight, idx)
    torch.testing.assert_close(whole(loss), torch.tensor(8192.0).log().half())
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.embedding_cross_entropy(idx, weight, idx).dtype == torch.float32


@check
def probabilities_as_targets(_folder: Path) -> None:
    for layout in LAYOUTS:
        for options in ({}, {"class_weight": True, "z_loss": 0.1, "label_smoothing": 0.1}, {"reduction": "none"}):
            compare_losses(layout, options, is_soft=True)


@check
def backward_as_often_and_as_high_as_in_pytorch(_folder: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(6, 6, dtype=torch.float64)
    idx, targets = torch.randint(6, (2, 8))

    def gradient(weight: Tensor, loss_of: Callable[..., Tensor]) -> Any:
        loss = loss_of(idx, weight, targets)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        (grad**2).sum().backward(retain_graph=True)
        loss.backward()
        return weight.grad

    expected = gradient(table.clone().requires_grad_(), reference.embedding_cross_entropy)
    for placement in (ROWS, WHOLE):
        for loss_of in (
            functional.embedding_cross_entropy,
            lambda *pairs: functional.embedding_cross_entropy_with_logits(*pairs)[0],
        ):
            weight = place(table, mesh_of(4), placement).requires_grad_()
            torch.testing.assert_close(whole(gradient(weight, loss_of)), expected)


@check
def the_loss_depends_on_the_logits(_folder: Path) -> None:
    """Their gradient, and gradients with respect to them, are there."""
    torch.manual_seed(0)
    idx, weight = torch.randint(6, (8,)), torch.randn(6, 6, requires_grad=True)
    loss, logits = reference.embedding_cross_entropy_with_logits(idx, weight, idx)
    logits.retain_grad()
    (loss + logits.sum()).backward()
    for placements in ((ROWS, WHOLE), (WHOLE, ROWS), (ROWS, ROWS)):
        shards, own_idx = (
            place(tensor, mesh_of(4), kind) for tensor, kind in zip((weight.detach(), idx), placements, strict=True)
        )
        own_loss, own_logits = functional.embedding_cross_entropy_with_logits(own_idx, shards.requires_grad_(), own_idx)
        own_logits.retain_grad()
        (own_loss + own_logits.sum()).backward()
        torch.testing.assert_close(whole(own_logits.grad), logits.grad)  # type: ignore[arg-type]
        torch.testing.assert_close(whole(shards.grad), weight.grad)  # type: ignore[arg-type]


@check
def one_sum_over_the_ranks_and_nothing_else(_folder: Path) -> None:
    """Neither the table nor its gradient is ever gathered."""
    for layout, in_forward, in_backward in ((ROWS_AND_WHOLE_BATCH, 1, 0), (BATCH, 1, 1), (NOTHING, 0, 0)):
        shape, table, batch = layout
        weight = place(torch.randn(8, 8), mesh_of(*shape), *table).requires_grad_()
        idx = place(torch.randint(8, (8,)), mesh_of(*shape), *batch)
        with CommDebugMode() as communication:
            loss = functional.embedding_cross_entropy(idx, weight, idx)
        assert communication.get_total_counts() == in_forward, layout
        with CommDebugMode() as communication:
            loss.backward()
        assert communication.get_total_counts() == in_backward, layout


# ------------------------------------------------------------------------------------------------------------ mistakes

LOSSES: list[Any] = [functional.embedding_cross_entropy, functional.embedding_cross_entropy_with_logits]


@check
def tokens_out_of_range_raise_on_all_ranks(_folder: Path) -> None:
    """Also where one rank alone has them; and afterwards the ranks go on together."""
    for layout in (ROWS_AND_WHOLE_BATCH, ROWS_AND_BATCH, BATCH, NOTHING):
        _shape, table, batch = layout
        weight = place(torch.randn(5, 5), mesh_of(4), *table)
        idx = place(torch.tensor([1, 2, 3, 4]), mesh_of(4), *batch)
        for bad in ([1, 2, 5, 4], [-1, 2, 3, 4]):
            wrong = place(torch.tensor(bad), mesh_of(4), *batch)
            for loss_of, reduction in itertools.product(LOSSES, ("mean", "none")):
                with raises(IndexError):
                    loss_of(wrong, weight, idx, reduction=reduction)
                with raises(IndexError):
                    loss_of(idx, weight, wrong, reduction=reduction)
        functional.embedding_cross_entropy(idx, weight, idx)


@check
def mistakes_raise_on_all_ranks(_folder: Path) -> None:
    """The errors of PyTorch, or of the kernel, where a rank has no row, and no pair, as well."""
    mesh = mesh_of(4)
    weight, idx = place(torch.randn(5, 5), mesh, ROWS), torch.tensor([1, 2, 3])
    for loss_of in LOSSES:
        with raises(RuntimeError, "got mixed torch.Tensor and DTensor"):
            loss_of(place(idx, mesh, WHOLE), torch.randn(5, 5), idx)
        with raises(ValueError, "shape (3,), got (2,)"):
            loss_of(idx, weight, idx[:2])
        with raises(RuntimeError, "idx"):
            loss_of(idx.float(), weight, idx)
        with raises(RuntimeError, "class_weight"):
            loss_of(idx, weight, idx, class_weight=torch.ones(4))
        with raises(AssertionError, "Padding_idx"):
            loss_of(idx, weight, idx, padding_idx=5)
        with raises(NotImplementedError, "sparse"):
            loss_of(idx, weight, idx, sparse=True)
        with raises(ValueError, "reduction"):
            loss_of(idx, weight, idx, reduction="max")
        with raises(RuntimeError, "same mesh"):
            loss_of(place(idx, mesh_of(2, 2), WHOLE, WHOLE), weight, idx)
        with raises(RuntimeError, "same device"):
            loss_of(idx.to("meta"), weight, idx)
        with raises(TypeError, "list"):
            loss_of([1], weight, idx)
    with raises(
        MemoryError if dist.get_rank() == 2 else RuntimeError, "this rank" if dist.get_rank() == 2 else "another"
    ):
        distributed._agree(mesh, error=MemoryError("this rank") if dist.get_rank() == 2 else None)


@check
def plain_tensors_are_the_same_on_every_rank_or_raise(_folder: Path) -> None:
    idx, table = torch.tensor([[1, 2], [3, 4]]), torch.arange(25.0).view(5, 5)
    is_last = dist.get_rank() == 3
    expected, expected_logits = reference.embedding_cross_entropy_with_logits(idx, table, idx)
    for shape, placements in (((4,), [ROWS]), ((4,), [WHOLE]), ((2, 2), [ROWS, WHOLE])):
        weight = place(table, mesh_of(*shape), *placements)
        torch.testing.assert_close(whole(functional.embedding_cross_entropy(idx, weight, idx)), expected)
        loss, logits = functional.embedding_cross_entropy_with_logits(idx, weight, idx)
        torch.testing.assert_close((whole(loss), whole(logits)), (expected, expected_logits))
        for own in (idx - int(is_last), idx.flip(0) if is_last else idx, idx[:1] if is_last else idx):
            for loss_of in LOSSES:
                with raises(ValueError, "the same on every rank"):
                    loss_of(own, weight, own)
        with raises(ValueError, "the same on every rank"):
            functional.generate(idx - int(is_last), weight, 2)
        with raises(IndexError):
            functional.generate(idx + int(is_last), weight, 2)


# ------------------------------------------------------------------------------------------------------------ sampling

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5, "top_k": 3},
    {"temperature": 0.0},
    {"top_p": 0.7, "min_p": 0.05},
    {"stop": 2},
    {"sampler": "philox", "top_k": 4, "stop": [2, 3]},
]


@check
def generated_tokens_and_the_generator_afterwards(_folder: Path) -> None:
    torch.manual_seed(0)
    table, prompt = torch.randn(7, 7) * 2, torch.tensor([[1, 2], [3, 4], [5, 6], [0, 0], [2, 1]])
    for (shape, placements, batch), options in itertools.product(LAYOUTS, SAMPLING):
        mesh = mesh_of(*shape)
        weight = place(table, mesh, *placements)
        expected = functional.generate(prompt, table, 8, generator=(generator := seeded()), **options)
        plain = functional.generate(prompt, weight, 8, generator=(own := seeded()), **options)
        assert torch.equal(plain, expected)
        assert torch.equal(own.get_state(), generator.get_state())
        sharded = functional.generate(place(prompt, mesh, *batch), weight, 8, generator=seeded(), **options)
        assert torch.equal(whole(sharded), expected)


@check
def generate_raises_on_all_ranks(_folder: Path) -> None:
    weight, idx = place(torch.randn(5, 5), mesh_of(4), ROWS), torch.tensor([[1]])
    generate: Any = functional.generate
    with raises(ValueError, "states of generators"):
        generate(idx, weight, 3, generator=seeded(dist.get_rank()))
    generate(idx, weight, 3, temperature=0.0, generator=seeded(dist.get_rank()))  # draws nothing
    with raises(IndexError):
        generate(idx + 4, weight, 3)
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2.0}, {"stop": 5}):
        with raises(ValueError, next(iter(options))):
            generate(idx, weight, 3, **options)
    with raises(ValueError, "max_new_tokens"):
        generate(idx, weight, -1)
    with raises(RuntimeError, "square"):
        generate(idx, place(torch.randn(5, 6), mesh_of(4), ROWS), 1)
    with raises(RuntimeError, "2-D"):
        generate(idx[0], weight, 1)
    with raises(RuntimeError, "got mixed torch.Tensor and DTensor"):
        generate(place(idx, mesh_of(4), WHOLE), torch.randn(5, 5), 1)


@check
def drawn_samples(_folder: Path) -> None:
    torch.manual_seed(0)
    probs = torch.rand(6, 9)
    draw: Any = functional.multinomial
    for options in ({}, {"replacement": True}, {"sampler": "philox"}):
        for placement in (ROWS, WHOLE, Shard(1)):
            expected = draw(probs, 3, generator=(generator := seeded()), **options)
            samples = draw(place(probs, mesh_of(4), placement), 3, generator=(own := seeded()), **options)
            assert samples.placements == (ROWS if placement == ROWS else WHOLE,)
            assert torch.equal(whole(samples), expected)
            assert torch.equal(own.get_state(), generator.get_state())
        one = draw(place(probs[0], mesh_of(4), ROWS), 3, generator=seeded(), **options)
        assert torch.equal(whole(one), draw(probs[0], 3, generator=seeded(), **options))
    with raises(ValueError, "states of generators"):
        draw(place(probs, mesh_of(4), ROWS), 3, generator=seeded(dist.get_rank()))


# -------------------------------------------------------------------------------------------------------------- models

V, LR = 11, 0.1
BATCHES = torch.randint(V, (3, 2, 8, 5), generator=seeded(5))  # steps, idx and targets, B, T
TOKENS = torch.randint(V, (500,), generator=seeded(6))
WEIGHT = "token_embedding_table.weight"
Take = Callable[[Tensor], Tensor]  # a batch -> what this rank has of it


def make_model() -> BigramLanguageModel:
    torch.manual_seed(0)
    return BigramLanguageModel(V)


@functools.cache
def trained() -> BigramLanguageModel:
    """By one process, on the whole batches, by PyTorch alone."""
    torch.manual_seed(0)
    lecture: Any = reference.BigramLanguageModel(V)
    train(lecture, lambda batch: batch, torch.optim.AdamW(lecture.parameters(), lr=LR))
    model = BigramLanguageModel(V)
    model.load_state_dict(lecture.state_dict())
    return model


def own_part(mesh: DeviceMesh) -> Take:
    """Takes some of the sequences."""
    return lambda batch: batch.chunk(mesh.size(0))[mesh.get_local_rank(0)]


def train(model: nn.Module, take: Take, optimizer: Any, batches: Tensor = BATCHES, **options: Any) -> None:
    for idx, targets in batches:
        optimizer.zero_grad()
        model(take(idx), take(targets), **options)[1].backward()
        optimizer.step()


def train_by_ours(model: nn.Module, take: Take, **options: Any) -> None:
    train(model, take, optim.AdamW(model.parameters(), lr=LR), **options)


def whole_weight(model: nn.Module) -> Tensor:
    return whole(model.state_dict()[WEIGHT])


def assert_equals_one_process(model: BigramLanguageModel, folder: Path) -> None:
    """In its weights, the tokens that it generates, its exact loss, and the file that it saves."""
    torch.testing.assert_close(whole_weight(model), trained().token_embedding_table.weight)
    start = torch.zeros(2, 1, dtype=torch.long)
    for options in ({}, {"top_k": 3, "stop": 2}):
        tokens, expected = (
            each.generate(start, 20, generator=seeded(), **options)  # type: ignore[arg-type]
            for each in (model, trained())
        )
        assert torch.equal(tokens, expected)
    exact = trained().evaluate(TOKENS)
    assert abs(model.evaluate(TOKENS) - exact) < 1e-5
    model.save(folder / "model.safetensors")
    loaded = BigramLanguageModel.load(folder / "model.safetensors")
    assert torch.equal(loaded.token_embedding_table.weight, whole_weight(model))
    dist.barrier()  # before the file is written again


def shard_rows(model: BigramLanguageModel, mesh: DeviceMesh, placements: Sequence[Placement] = (ROWS,)) -> None:
    table = model.token_embedding_table
    table.weight = nn.Parameter(place(table.weight.detach(), mesh, *placements))


@check
def models_under_fully_shard(folder: Path) -> None:
    def shard_table(model: BigramLanguageModel, **options: Any) -> None:
        fully_shard(model.token_embedding_table, **options)

    def shard_both(model: BigramLanguageModel, **options: Any) -> None:
        shard_table(model, **options)
        fully_shard(model, **options)

    for shard, reshard in ((fully_shard, True), (fully_shard, False), (shard_table, None), (shard_both, None)):
        for return_logits in (True, False):
            model = make_model()
            shard(model, mesh=mesh_of(4), reshard_after_forward=reshard)
            train_by_ours(model, own_part(mesh_of(4)), return_logits=return_logits)
        assert_equals_one_process(model, folder)


@check
def mixed_precision_under_fully_shard(folder: Path) -> None:
    """As the lecture's class under the same policy; the file has the precision of the shards."""
    weights = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model in (make_model(), reference.BigramLanguageModel(V)):
        model.load_state_dict(make_model().state_dict())
        fully_shard(model, mesh=mesh_of(4), mp_policy=policy)
        train_by_ours(model, own_part(mesh_of(4)))
        weights.append(whole_weight(model))
    model = make_model()
    fully_shard(model, mesh=mesh_of(4), mp_policy=policy, reshard_after_forward=False)
    model(BATCHES[0, 0])  # leaves the table gathered, in bfloat16
    model.save(folder / "model.safetensors")
    loaded = BigramLanguageModel.load(folder / "model.safetensors")
    assert torch.equal(loaded.token_embedding_table.weight, make_model().token_embedding_table.weight)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)


@check
def models_with_sharded_rows(folder: Path) -> None:
    for shape, table, batch in (ROWS_AND_BATCH, ROWS_AND_WHOLE_BATCH, BATCH, ROWS_BESIDE_BATCH):
        mesh = mesh_of(*shape)
        for return_logits in (True, False):
            model = make_model()
            shard_rows(model, mesh, table)
            assert not model.is_fused
            take = functools.partial(distribute_tensor, device_mesh=mesh, placements=batch)
            train_by_ours(model, take, return_logits=return_logits)
        assert_equals_one_process(model, folder)
        counts = functional.count_bigrams(TOKENS, V)
        assert abs(model.evaluate_counts(counts) - trained().evaluate_counts(counts)) < 1e-6
        assert math.isnan(model.evaluate_counts(torch.zeros_like(counts)))
    with raises(RuntimeError, "got mixed torch.Tensor and DTensor"):  # as nn.Embedding
        model(TOKENS)


@check
def options_of_a_model_with_sharded_rows(_folder: Path) -> None:
    losses = []
    for mesh in (None, mesh_of(4)):
        torch.manual_seed(0)
        model = BigramLanguageModel(V, class_weight=torch.rand(V), ignore_index=3, label_smoothing=0.1)
        if mesh is not None:
            shard_rows(model, mesh)
        losses.append(model.evaluate(TOKENS))
    assert abs(losses[0] - losses[1]) < 1e-5


@check
def a_parallel_table(folder: Path) -> None:
    """The hooks of RowwiseParallel take plain tensors, which every rank has, and give such."""
    model = make_model()
    parallelize_module(model, mesh_of(4), {"token_embedding_table": RowwiseParallel(input_layouts=WHOLE)})
    train_by_ours(model, lambda batch: batch)
    assert_equals_one_process(model, folder)


@check
def fully_shard_of_a_parallel_table(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    model = make_model()
    parallelize_module(model, mesh["rows"], {"token_embedding_table": RowwiseParallel(input_layouts=WHOLE)})
    fully_shard(model, mesh=mesh["data"])
    train_by_ours(model, own_part(mesh["data"]))
    weight = model.token_embedding_table.weight  # both dimensions shard its rows, the second first
    loss = functional.embedding_cross_entropy(TOKENS[:-1], weight, TOKENS[1:])
    torch.testing.assert_close(whole(loss), F.cross_entropy(whole(weight)[TOKENS[:-1]], TOKENS[1:]))
    assert_equals_one_process(model, folder)


@check
def training_of_sharded_models_by_fit(_folder: Path) -> None:
    histories = []
    shards: list[Callable[[BigramLanguageModel], object]] = [
        lambda _model: None,
        lambda model: shard_rows(model, mesh_of(4)),
        lambda model: fully_shard(model, mesh=mesh_of(4)),
    ]
    for shard in shards:
        model = make_model()
        shard(model)
        torch.manual_seed(1)
        histories.append(bigramx.fit(model, TOKENS, max_steps=3, eval_interval=3, lr=LR))
    for history in histories[1:]:
        torch.testing.assert_close(history.train_losses, histories[0].train_losses)


# ----------------------------------------------------------------------------------------------------------- optimizers


@check
def wrappers_of_plain_parameters(_folder: Path) -> None:
    """DDP, the first version of FSDP, and ZeRO."""
    expected, cpu = trained().token_embedding_table.weight.detach(), torch.device("cpu")
    for wrap in (
        functools.partial(DistributedDataParallel, gradient_as_bucket_view=True),
        functools.partial(FullyShardedDataParallel, device_id=cpu, use_orig_params=True),
        functools.partial(FullyShardedDataParallel, device_id=cpu),
    ):
        wrapped: nn.Module = wrap(make_model())
        train_by_ours(wrapped, own_part(mesh_of(4)))
        (weight,) = wrapped.state_dict().values()
        torch.testing.assert_close(weight, expected)
    wrapped = DistributedDataParallel(make_model())
    zero = ZeroRedundancyOptimizer(wrapped.parameters(), optim.AdamW, lr=LR)
    train(wrapped, own_part(mesh_of(4)), zero)
    torch.testing.assert_close(wrapped.state_dict()[f"module.{WEIGHT}"], expected)


@check
def deferred_steps_under_ddp(_folder: Path) -> None:
    """Each rank defers by itself, and all tables agree to the bit, and with AdamW on the dense gradient."""
    weights = []
    for is_deferred in (True, False):
        torch.manual_seed(4)
        model = BigramLanguageModel(60, sparse=is_deferred)
        wrapped = DistributedDataParallel(model)
        optimizer = optim.DeferredAdamW(wrapped, lr=0.1) if is_deferred else optim.AdamW(wrapped.parameters(), lr=0.1)
        generator = seeded(dist.get_rank())
        for _ in range(25):
            idx, targets = torch.randint(60, (2, 3), generator=generator)
            loss = wrapped(idx, targets, return_logits=False)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(wrapped.state_dict()["module.token_embedding_table.weight"].clone())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)  # the average of the ranks rounds in another order
    others = [torch.empty_like(weights[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weights[0])
    assert all(torch.equal(other, weights[0]) for other in others)


@check
def states_that_are_not_sharded_as_their_parameter(_folder: Path) -> None:
    """Torch's step, or its error."""
    outcomes = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        param = nn.Parameter(place(torch.ones(4, 4), mesh_of(4), ROWS))
        param.grad = place(torch.ones(4, 4), mesh_of(4), ROWS)
        optimizer = optimizer_class([param])
        optimizer.step()
        outcomes.append(str(whole(param.detach())))
        optimizer.state[param]["exp_avg"] = torch.zeros(4, 4)
        try:
            optimizer.step()
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[:2] == outcomes[2:]


@check
def distributed_checkpoints(folder: Path) -> None:
    """Of the model and of the optimizer, into other shards, and on from there."""
    mesh = mesh_of(4)

    def make(is_fsdp: bool) -> tuple[BigramLanguageModel, Any, Take]:
        model = make_model()
        if is_fsdp:
            fully_shard(model, mesh=mesh)
        else:
            shard_rows(model, mesh)
        take = own_part(mesh) if is_fsdp else functools.partial(distribute_tensor, device_mesh=mesh, placements=[ROWS])
        return model, optim.AdamW(model.parameters(), lr=LR), take

    for was_fsdp, is_fsdp in ((True, False), (False, True)):
        model, optimizer, take = make(was_fsdp)
        train(model, take, optimizer, BATCHES[:2])
        states: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        save_checkpoint(states, checkpoint_id=folder / f"fsdp {was_fsdp}")
        model, optimizer, take = make(is_fsdp)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        load_checkpoint(states, checkpoint_id=folder / f"fsdp {was_fsdp}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        train(model, take, optimizer, BATCHES[2:])
        assert_equals_one_process(model, folder)


def run_rank(folder: Path) -> None:
    """Runs the checks, and writes what each rank raised."""
    warnings.simplefilter("ignore")  # PyTorch's, about itself
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    problems: dict[str, list[str]] = {}
    for name, function in CHECKS.items():
        problem = ""
        own_folder = folder / name
        own_folder.mkdir(exist_ok=True)
        try:
            function(own_folder)
        except Exception:
            problem = traceback.format_exc()
        problems[name] = [""] * dist.get_world_size()
        dist.all_gather_object(problems[name], problem)
        if dist.get_rank() == 0:
            (folder / "problems.json").write_text(json.dumps(problems))
    dist.barrier()


if __name__ == "__main__":
    ids = forked_ranks.start(4, lambda _rank: run_rank(Path(sys.argv[1])))
    sys.exit(any(forked_ranks.wait(ids)))
