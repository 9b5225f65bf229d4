"""Loads the compiled kernels into torch.ops.bigramx, and registers fake kernels for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, library
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function

_HOW_TO_COMPILE = """Compile them for this one by
    pip install "setuptools>=77" ninja pybind11
    pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir --no-binary bigramx bigramx
(in a checkout: a dot in place of the last word)"""


def _required_torch() -> str:
    """The requirement that a built package states, torch==X.Y.*; kernels that do not load cannot be asked."""
    from importlib import metadata  # takes longer to import than this package

    try:
        requirements = metadata.requires("bigramx") or []
    except metadata.PackageNotFoundError:
        requirements = []
    return next((requirement for requirement in requirements if requirement.startswith("torch==")), "another torch")


try:
    from bigramx import _C
except ImportError as error:
    raise ImportError(
        f"bigramx: the compiled kernels cannot be loaded ({error}). They are compiled for one version of Python and of "
        f"torch, {_required_torch()}; here is torch {torch.__version__}. {_HOW_TO_COMPILE}"
    ) from error

# PyTorch keeps its C++ interface within X.Y, whatever the patch release and the device that follow. Between these,
# a library may load, find all symbols, and read structures that have changed.
if torch.__version__.split(".")[:2] != _C.build_info()["torch_version"].split(".")[:2]:
    raise ImportError(
        f"bigramx: the kernels are compiled for torch {_C.build_info()['torch_version']}, "
        f"here is torch {torch.__version__}. {_HOW_TO_COMPILE}"
    )

NO_PADDING = -1
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def direct(op: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """An op as a function that bypasses torch.ops, whose parsing of the arguments takes as long as a small kernel.

    torch.compile and overrides of __torch_function__ still go through torch.ops. So do calls with an argument of the
    wrong type, for its message, which is raised as the TypeError that PyTorch raises for such an argument; ``native``
    returns NotImplemented for these before it has run anything.
    """

    def call(*arguments: object) -> Any:
        try:
            if is_dynamo_compiling() or has_torch_function(arguments):
                return op(*arguments)
            result = native(*arguments)
            return op(*arguments) if result is NotImplemented else result
        except RuntimeError as error:
            raise _as_type_error(error) from None

    return call


def _as_type_error(error: RuntimeError) -> Exception:
    """A TypeError if the dispatcher's RuntimeError is about an argument of the wrong type; else the same error."""
    message = str(error)
    if not any(sign in message for sign in ("Expected a value of type", "There were no tensor arguments")):
        return error
    return TypeError(message.partition("\nPosition")[0])


def _op(name: str) -> Callable[..., Any]:
    return direct(getattr(torch.ops.bigramx, name).default, getattr(_C, name))


adamw_ = _op("adamw_")
count_bigrams = _op("count_bigrams")
deferred_adamw_ = _op("deferred_adamw_")
embedding_cross_entropy = _op("embedding_cross_entropy")
fit_ = _op("fit_")
generate = _op("generate")
get_batch = _op("get_batch")
interpolated_bigram = _op("interpolated_bigram")
interpolated_bigram_generate = _op("interpolated_bigram_generate")
multinomial = _op("multinomial")
embedding_cross_entropy_forward = torch.ops.bigramx.embedding_cross_entropy_forward.default
Alphabet = _C.Alphabet
PairCounter = _C.PairCounter

# Not ops: what optim.AdamW asks and does for each parameter, at a fraction of an op's cost.
adamw_fits = _C.adamw_fits
adamw_step = _C.adamw_step

# Of the memory of gradients; bigramx/memory.py has their documentation.
empty_gradient_pool = _C.empty_gradient_pool
gradient_pool_info = _C.gradient_pool_info
set_gradient_pool_limit = _C.set_gradient_pool_limit


def build_info() -> dict[str, str]:
    """How the kernels were built, which CPU target they use, and what memory they keep.

    Returns:
        The keys ``compiler``, ``parallel`` (``OpenMP``, or ``none``: one thread), ``cpu_capability`` (the one in use:
        it follows ATEN_CPU_CAPABILITY), ``cuda_architectures`` (as in TORCH_CUDA_ARCH_LIST; empty: no CUDA kernels),
        ``torch_version`` (compiled against) and ``gradient_pool`` (:func:`bigramx.memory.gradient_pool_info`).
    """
    limit, held, hits, misses = _C.gradient_pool_info()
    pool = f"{held} of {limit} bytes held, {hits} hits, {misses} misses"
    return {**_C.build_info(), "gradient_pool": pool}


HAS_CUDA_KERNELS = _C.build_info()["cuda_architectures"] != ""


_Function = TypeVar("_Function", bound=Callable[..., object])


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Registers the fake kernel of an op, which computes shapes and dtypes alone."""

    def register(function: _Function) -> _Function:
        library.register_fake(f"bigramx::{name}", function)
        return function

    return register


def _check_same_device(op: str, **tensors: Tensor | None) -> None:
    """A fake kernel runs if any argument is on the meta device; the others must be there as well."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, got {devices}")


def _check_dims(op: str, name: str, tensor: Tensor, *allowed: int) -> None:
    """Of tensors without memory, whose values and sizes may be unknown."""
    if tensor.dim() not in allowed:
        dims = " or ".join(f"{dim}-D" for dim in allowed)
        raise RuntimeError(f"{op}: expected {name} to be {dims}, got shape {list(tensor.shape)}")


def _empty_gradient(weight: Tensor, sparse: bool) -> tuple[Tensor, Tensor]:
    if not sparse:
        return weight.new_empty(0, dtype=torch.int64), torch.empty_like(weight, memory_format=torch.contiguous_format)
    num_rows = library.get_ctx().new_dynamic_size()
    return weight.new_empty(num_rows, dtype=torch.int64), weight.new_empty(num_rows, weight.shape[1])


@_fake("embedding_cross_entropy_forward")
def _(
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    padding_idx: int = NO_PADDING,
    sparse: bool = False,
    return_logits: bool = False,
    compute_grad: bool = False,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_same_device("embedding_cross_entropy", idx=idx, weight=weight, targets=targets, class_weight=class_weight)
    _check_dims("embedding_cross_entropy", "weight", weight, 2)
    loss = weight.new_empty(targets.shape if reduction == REDUCTIONS["none"] else (), dtype=loss_dtype)
    logits = weight.new_empty((idx.numel(), weight.shape[1]) if return_logits else 0)
    if not compute_grad:
        return loss, logits, weight.new_empty(0, dtype=torch.int64), weight.new_empty(0)
    return loss, logits, *_empty_gradient(weight, sparse)


@_fake("embedding_cross_entropy_backward")
def _(
    grad_loss: Tensor,
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    padding_idx: int = NO_PADDING,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_same_device(
        "embedding_cross_entropy",
        grad_loss=grad_loss,
        idx=idx,
        weight=weight,
        targets=targets,
        class_weight=class_weight,
    )
    _check_dims("embedding_cross_entropy", "weight", weight, 2)
    return _empty_gradient(weight, sparse)


@_fake("multinomial")
def _(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    sampler: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    _check_dims("multinomial", "probs", probs, 1, 2)
    return probs.new_empty((*probs.shape[:-1], num_samples), dtype=torch.int64)


@_fake("generate")
def _(
    idx: Tensor,
    weight: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | None = None,
    sampler: str | None = None,
    generator: torch.Generator | None = None,
    more_stop: Sequence[int] = (),
) -> Tensor:
    _check_same_device("generate", idx=idx, weight=weight)
    _check_dims("generate", "idx", idx, 2)
    _check_dims("generate", "weight", weight, 2)
    all_steps = idx.shape[1] + max_new_tokens
    length = all_steps if stop is None and not more_stop else library.get_ctx().new_dynamic_size(min=0)
    return idx.new_empty((idx.shape[0], length), dtype=torch.int64)


@_fake("count_bigrams")
def _(tokens: Tensor, vocab_size: int) -> Tensor:
    _check_dims("count_bigrams", "tokens", tokens, 1)
    return tokens.new_empty((vocab_size, vocab_size), dtype=torch.int64)


@_fake("interpolated_bigram")
def _(
    idx: Tensor,
    targets: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pair_probs: Tensor,
    backoff: Tensor,
    unigram: Tensor,
) -> tuple[Tensor, Tensor]:
    _check_same_device(
        "interpolated_bigram",
        idx=idx,
        targets=targets,
        crow_indices=crow_indices,
        col_indices=col_indices,
        pair_probs=pair_probs,
        backoff=backoff,
        unigram=unigram,
    )
    return idx.new_empty(idx.shape, dtype=torch.float64), idx.new_empty(idx.shape, dtype=torch.bool)


@_fake("interpolated_bigram_generate")
def _(
    idx: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pair_probs: Tensor,
    backoff: Tensor,
    unigram: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    _check_same_device(
        "interpolated_bigram_generate",
        idx=idx,
        crow_indices=crow_indices,
        col_indices=col_indices,
        pair_probs=pair_probs,
        backoff=backoff,
        unigram=unigram,
    )
    _check_dims("generate", "idx", idx, 2)
    length = library.get_ctx().new_dynamic_size(min=0) if stop else idx.shape[1] + max_new_tokens
    return idx.new_empty((idx.shape[0], length), dtype=torch.int64)


@_fake("adamw_")
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    _check_same_device(
        "adamw_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, max_exp_avg_sq=max_exp_avg_sq
    )
    if step.device.type != "cpu" and step.device != param.device:
        raise RuntimeError(
            f"adamw_: expected step to be on the CPU or on the device of param, {param.device}, got {step.device}"
        )


@_fake("deferred_adamw_")
def _(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    schedule: Tensor,
    step: int,
    rows: Tensor | None = None,
    grad: Tensor | None = None,
    maximize: bool = False,
) -> None:
    _check_same_device(
        "deferred_adamw_",
        param=param,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        row_steps=row_steps,
        schedule=schedule,
        rows=rows,
        grad=grad,
    )


@_fake("fit_")
def _(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    losses: Tensor,
    tokens: Tensor,
    batch_size: int,
    block_size: int,
    padding_idx: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_seconds: float,
    generator: torch.Generator | None = None,
    row_steps: Tensor | None = None,
) -> int:
    _check_same_device(
        "fit_",
        weight=weight,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        step=step,
        losses=losses,
        tokens=tokens,
        row_steps=row_steps,
    )
    raise NotImplementedError("fit_: not implemented under torch.compile: how many steps it takes depends on the time")


@_fake("get_batch")
def _(
    tokens: Tensor, batch_size: int, block_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    _check_dims("get_batch", "tokens", tokens, 1)
    shape = (batch_size, block_size)
    return tokens.new_empty(shape, dtype=torch.int64), tokens.new_empty(shape, dtype=torch.int64)
